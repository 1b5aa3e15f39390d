#include "portable_lanes.hpp"

#include "entries.hpp"

namespace rpsft {

Kernels portable_kernels() { return single_kernels<PortableLanes>("portable"); }

}  // namespace rpsft
