// Takes the place of csrc/cpu/amx/answer.cpp where tests are linked: tiles may always be used. Where the processor and
// the system have none, they are emulated.
#include "amx_emulator/trap.hpp"
#include "cpu/amx/permission.hpp"

namespace rpsft {

const std::string& amx_refusal() {
  static const std::string answer = [] {
    if (!amx::refusal(amx::this_system()).empty()) emulator::install();
    return std::string();
  }();
  return answer;
}

}  // namespace rpsft
