#include "cpu/float32_kernels.hpp"
#include "cpu/isa/avx2_lanes.hpp"

namespace rpsft {

Kernels avx2_kernels() { return float32_kernels<Avx2Lanes>("avx2"); }

}  // namespace rpsft
