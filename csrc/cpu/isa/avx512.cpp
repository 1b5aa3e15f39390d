#include "cpu/float32_kernels.hpp"
#include "cpu/isa/avx512_lanes.hpp"

namespace rpsft {

Kernels avx512_kernels() { return float32_kernels<Avx512Lanes>("avx512"); }

}  // namespace rpsft
