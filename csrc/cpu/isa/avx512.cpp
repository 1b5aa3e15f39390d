#include "cpu/isa/avx512_lanes.hpp"

#include "cpu/float32_kernels.hpp"

namespace rpsft {

Kernels avx512_kernels() { return single_kernels<Avx512Lanes>("avx512"); }

}  // namespace rpsft
