#include "cpu/isa/avx2_lanes.hpp"

#include "cpu/float32_kernels.hpp"

namespace rpsft {

Kernels avx2_kernels() { return single_kernels<Avx2Lanes>("avx2"); }

}  // namespace rpsft
