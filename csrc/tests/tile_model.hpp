// A model of the tile registers of AMX: what the processor's manual says that tilezero, tileloadd, tilestored and
// tdpbf16ps do, one number at a time. Kernels run with it where no processor has AMX.
//
// tdpbf16ps, from Intel's Software Developer's Manual: for every row and column of the sums, the products of the first
// elements of all pairs are added up in order from zero, and those of the second elements apart from them, each with
// one rounding per product (fused). Both sums are added, then that is added to the sum in the tile. All roundings are
// to nearest even; denormal inputs count as zero, denormal results become zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/number.hpp"

namespace {

inline float without_denormal(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;  // NaN compares false
}

// a * b + c, rounded once. A result is denormal if it would be below 2^-126 rounded with no bound on the exponent: so
// x86 detects underflow.
inline float tile_multiply_add(float a, float b, float c) {
  a = without_denormal(a);
  b = without_denormal(b);
  c = without_denormal(c);
  const float result = std::fmaf(a, b, c), size = std::fabs(result);
  if (size == 0 || size > 0x1p-126f) return result;
  // Products and sums this small do not overflow when scaled, and then round as if there were no bound.
  const bool small = std::fabs(a) < std::fabs(b);
  const float scaled = std::fmaf(small ? a * 0x1p64f : a, small ? b : b * 0x1p64f, c * 0x1p64f);
  return std::fabs(scaled) < 0x1p-62f ? std::copysign(0.0f, result) : result;
}

inline float tile_add(float a, float b) { return tile_multiply_add(a, 1.0f, b); }

// The tile registers of a thread, all of 16 rows of 64 bytes.
class TileModel {
 public:
  static void configure() {
    require(!state().configured, "configured twice");
    state().configured = true;
    for (auto& tile : state().tiles) std::memset(tile, 0, sizeof tile);
  }
  static void release() {
    require(state().configured, "released without a configuration");
    state().configured = false;
  }
  static void fence() {}

  template <int tile>
  static void zero() {
    std::memset(words(tile), 0, 1024);
  }

  template <int tile>
  static void load(const void* at, std::int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(words(tile)[row], static_cast<const char*>(at) + row * stride, 64);
  }

  template <int tile>
  static void store(void* at, std::int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(at) + row * stride, words(tile)[row], 64);
  }

  template <int sums, int left, int right>
  static void multiply_add() {
    static_assert(sums != left && sums != right && left != right, "the processor refuses equal operands");
    std::uint32_t(*c)[16] = words(sums);
    const std::uint32_t(*a)[16] = words(left);
    const std::uint32_t(*b)[16] = words(right);
    for (int m = 0; m < 16; ++m) {
      float first[16] = {}, second[16] = {};
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          first[n] = tile_multiply_add(low(a[m][k]), low(b[k][n]), first[n]);
          second[n] = tile_multiply_add(high(a[m][k]), high(b[k][n]), second[n]);
        }
      }
      for (int n = 0; n < 16; ++n) c[m][n] = to_bits(tile_add(from_bits(c[m][n]), tile_add(first[n], second[n])));
    }
  }

 private:
  struct State {
    bool configured = false;
    std::uint32_t tiles[8][16][16];
  };
  static State& state() {
    thread_local State own;
    return own;
  }
  using Rows = std::uint32_t (*)[16];

  // Without a configuration the processor raises an exception.
  static Rows words(int tile) {
    require(state().configured, "tiles used without a configuration");
    return state().tiles[tile];
  }
  static void require(bool condition, const char* what) {
    if (condition) return;
    std::printf("tile model: %s\n", what);
    std::abort();
  }
  // The elements of a pair as float32.
  static float low(std::uint32_t word) { return from_bits(word << 16); }
  static float high(std::uint32_t word) { return from_bits(word & 0xffff0000u); }
};

}  // namespace
