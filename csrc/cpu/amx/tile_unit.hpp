// The tile registers of AMX. Only for a file that is compiled for AMX, and for threads of a process that may use them.
#pragma once

#include "cpu/range.hpp"

namespace {

// Assembly instead of intrinsics: GCC's are macros that take no template arguments.
struct TileUnit {
  // Gives the calling thread eight tiles of 16 rows of 64 bytes, palette 1.
  static void configure() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    static_assert(sizeof(layout) == 64);
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }

  // Without live tiles the system has nothing of theirs to save when it switches threads.
  static void release() { asm volatile("tilerelease"); }

  static void fence() { asm volatile("" : : : "memory"); }

  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }

  // `stride` is in bytes.
  template <int tile>
  static void load(const void* at, Index stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(tile));
  }

  template <int tile>
  static void store(void* at, Index stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(tile));
  }

  // sums += left x right over 32 bfloat16.
  template <int sums, int left, int right>
  static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(left), "i"(right));
  }
};

}  // namespace
