#include "avx2_lanes.hpp"

#include "entries.hpp"

namespace rpsft {

Kernels avx2_kernels() { return single_kernels<Avx2Lanes>("avx2"); }

}  // namespace rpsft
