#include "cpu/isa/portable_lanes.hpp"

#include "cpu/float32_kernels.hpp"

namespace rpsft {

Kernels portable_kernels() { return single_kernels<PortableLanes>("portable"); }

}  // namespace rpsft
