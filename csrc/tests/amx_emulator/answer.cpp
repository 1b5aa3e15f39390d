// Takes the place of csrc/cpu/amx/answer.cpp where tests are linked: tiles that the processor lacks are emulated.
// Where it has them, the answer is its own: some of the instructions would run there instead of being caught.
#include "amx_emulator/trap.hpp"
#include "cpu/amx/permission.hpp"

namespace rpsft {

const std::string& amx_refusal() {
  static const std::string answer = [] {
    const amx::System here = amx::this_system();
    if (here.tiles) return amx::refusal(here);
    emulator::install();
    return std::string();
  }();
  return answer;
}

}  // namespace rpsft
