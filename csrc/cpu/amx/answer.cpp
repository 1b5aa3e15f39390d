// In a file of its own, so that tests can link another answer.
#include "cpu/amx/permission.hpp"

namespace rpsft {

const std::string& amx_refusal() {
  static const std::string answer = amx::refusal(amx::this_system());
  return answer;
}

}  // namespace rpsft
