#include "cpu/float32_kernels.hpp"
#include "cpu/isa/portable_lanes.hpp"

namespace rpsft {

Kernels portable_kernels() { return float32_kernels<PortableLanes>("portable"); }

}  // namespace rpsft
