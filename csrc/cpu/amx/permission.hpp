// Whether this process may use AMX.
#pragma once

#include <string>

namespace rpsft {

// Asks the processor for AMX-TILE, AMX-BF16 and tiles of 16 rows of 64 bytes, and the system for their use. Returns why
// not, or an empty string. Linux grants the tiles to a process, all its threads and its children, and takes them back
// at exec; it is asked by the first call, and the answer holds for the process.
const std::string& amx_refusal();

namespace amx {

// What the answer is made of; the tests put in other processors and systems.
struct System {
  bool tiles = false, bfloat16 = false;            // CPUID leaf 7, EDX bits 24 and 22
  bool xsave = false;                              // CPUID leaf 1, ECX bit 27: XCR0 may be read
  unsigned long long enabled = 0;                  // XCR0
  unsigned tile_bytes = 0, row_bytes = 0;          // CPUID leaf 0x1D, palette 1
  unsigned names = 0, rows = 0;
  bool asks = false;                               // whether this system is one that grants tiles on demand
  int (*request)() = nullptr;                      // 0, or the error number of the system's refusal
};

// Those at hand.
System this_system();

std::string refusal(const System& system);

}  // namespace amx
}  // namespace rpsft
