#include "avx512_lanes.hpp"

#include "entries.hpp"

namespace rpsft {

Kernels avx512_kernels() { return single_kernels<Avx512Lanes>("avx512"); }

}  // namespace rpsft
