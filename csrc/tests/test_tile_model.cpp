// The model of AMX's tiles against values computed by hand, and the reasons for which AMX is not used.
#include <cerrno>
#include <string>

#include "check.hpp"
#include "cpu/amx/permission.hpp"
#include "tile_cases.hpp"
#include "tile_model.hpp"

namespace {

void reasons() {
  int asked = 0;
  static int* counter;
  counter = &asked;
  static int answer;
  rpsft::amx::System able{true, true, true, 0x602e7, 1024, 64, 8, 16, true, [] { return ++*counter, answer; }};
  CHECK(rpsft::amx::refusal(able).empty() && asked == 1, "%s", rpsft::amx::refusal(able).c_str());
  const auto refused = [&](auto change, const char* words) {
    rpsft::amx::System system = able;
    change(system);
    const std::string reason = rpsft::amx::refusal(system);
    CHECK(reason.find(words) != std::string::npos, "%s: '%s'", words, reason.c_str());
  };
  asked = 0;
  refused([](auto& s) { s.tiles = false; }, "no AMX-BF16");
  refused([](auto& s) { s.bfloat16 = false; }, "no AMX-BF16");
  refused([](auto& s) { s.xsave = false; }, "has not enabled");
  refused([](auto& s) { s.enabled = 0x202e7; }, "has not enabled");
  refused([](auto& s) { s.enabled = 0x402e7; }, "has not enabled");
  refused([](auto& s) { s.rows = 8; }, "smaller");
  refused([](auto& s) { s.names = 4; }, "fewer");
  refused([](auto& s) { s.asks = false; }, "Linux only");
  CHECK(asked == 0, "the system is asked last: %d", asked);
  answer = EINVAL;
  refused([](auto&) {}, "Linux refused the tile registers of AMX (arch_prctl ARCH_REQ_XCOMP_PERM: Invalid argument)");
  CHECK(asked == 1, "%d", asked);
  answer = ENOSPC;
  refused([](auto&) {}, "No space left on device; the alternate signal stack of a thread is too small for them)");
  std::printf("AMX here: %s\n", rpsft::amx_refusal().empty() ? "yes" : rpsft::amx_refusal().c_str());
}

}  // namespace

int main() {
  check_tiles<TileModel>();
  expect(tile_multiply_add(-0x1p-63f, 0x1p-64f, -0.0f), -0.0f, "a flushed result keeps its sign");
  reasons();
  return failures() != 0;
}
