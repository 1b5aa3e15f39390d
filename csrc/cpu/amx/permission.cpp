#include "cpu/amx/permission.hpp"

#include <cerrno>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rpsft {
namespace amx {

#if defined(__x86_64__) && defined(__linux__)
namespace {

int request_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? 0 : errno;
}

}  // namespace
#endif

System this_system() {
  System system;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) system.xsave = c >> 27 & 1;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    system.tiles = d >> 24 & 1;
    system.bfloat16 = d >> 22 & 1;
  }
  if (system.xsave) {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    system.enabled = static_cast<unsigned long long>(high) << 32 | low;
  }
  if (system.tiles && __get_cpuid_count(0x1D, 1, &a, &b, &c, &d)) {
    system.tile_bytes = a >> 16;
    system.row_bytes = b & 0xffff;
    system.names = b >> 16;
    system.rows = c & 0xffff;
  }
#if defined(__linux__)
  system.asks = true;
  system.request = request_tiles;
#endif
#endif
  return system;
}

std::string refusal(const System& system) {
  if (!system.tiles || !system.bfloat16) return "this processor has no AMX-BF16";
  // XCR0: the system saves the tiles' configuration (bit 17) and data (bit 18).
  constexpr unsigned long long tile_state = 3ull << 17;
  if (!system.xsave || (system.enabled & tile_state) != tile_state)
    return "the operating system has not enabled the tile registers of AMX";
  if (system.tile_bytes < 1024 || system.row_bytes < 64 || system.names < 8 || system.rows < 16)
    return "the tile registers of this processor are smaller than 16 rows of 64 bytes, or fewer than 8";
  if (!system.asks) return "the tile registers of AMX are asked for on Linux only";
  const int error = system.request();
  if (error == 0) return "";
  std::string words = std::strerror(error);
  // Linux keeps a thread's tiles on its signal stack while a handler runs, and asks for the room before it grants any.
  if (error == ENOSPC) words += "; the alternate signal stack of a thread is too small for them";
  return "Linux refused the tile registers of AMX (arch_prctl ARCH_REQ_XCOMP_PERM: " + words + ")";
}

}  // namespace amx
}  // namespace rpsft
