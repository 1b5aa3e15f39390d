// Values computed by hand from what Intel's manual says of tdpbf16ps, for any tile registers.
#pragma once

#include <initializer_list>

#include "check.hpp"
#include "cpu/number.hpp"

namespace {

inline std::uint16_t bfloat16(float value) {
  Bfloat16 held;
  narrow(value, held);
  CHECK(to_bits(widen(held)) == to_bits(value), "%g is no bfloat16", value);
  return held.bits;
}

struct Product {
  float a0, b0, a1, b1;
};

// One element of the sums: `sum` plus the products of up to 16 pairs.
template <class Unit>
float element(float sum, std::initializer_list<Product> pairs) {
  std::uint32_t a[16][16] = {}, b[16][16] = {}, c[16][16] = {};
  int k = 0;
  for (const Product& p : pairs) {
    a[3][k] = static_cast<std::uint32_t>(bfloat16(p.a1)) << 16 | bfloat16(p.a0);
    b[k][5] = static_cast<std::uint32_t>(bfloat16(p.b1)) << 16 | bfloat16(p.b0);
    ++k;
  }
  c[3][5] = to_bits(sum);
  Unit::configure();
  Unit::fence();
  Unit::template load<0>(c, 64);
  Unit::template load<4>(a, 64);
  Unit::template load<6>(b, 64);
  Unit::template multiply_add<0, 4, 6>();
  Unit::template store<0>(c, 64);
  Unit::fence();
  Unit::release();
  return from_bits(c[3][5]);
}

inline void expect(float got, float wanted, const char* what) {
  CHECK(to_bits(got) == to_bits(wanted), "%s: got %.10g, expected %.10g", what, got, wanted);
}

template <class Unit>
void check_sums() {
  expect(element<Unit>(1, {{2, 5, 3, 7}}), 32, "one pair");
  expect(element<Unit>(0, {}), 0, "no pair");
  // First elements: 2^24 + 1 rounds to 2^24. Second: -2^24 + 1 is exact. Pair by pair the sum would be 2.
  expect(element<Unit>(0, {{4096, 4096, -4096, 4096}, {1, 1, 1, 1}}), 1, "first and second elements add up apart");
  // One at a time, both would be lost in 2^24.
  expect(element<Unit>(0x1p24f, {{1, 1, 1, 1}}), 0x1p24f + 2, "the sum in the tile is added last");
  expect(element<Unit>(0, {{4096, 4096, 0, 0}, {3, 1, 0, 0}}), 16777220, "a tie goes to the even number above");
  expect(element<Unit>(0, {{4096, 4096, 0, 0}, {1, 1, 0, 0}}), 16777216, "a tie goes to the even number below");
  // In order: 2^24 + 1 + 1 stays at 2^24 after each, and the other order would give 2^24 + 2.
  expect(element<Unit>(0, {{4096, 4096, 0, 0}, {1, 1, 0, 0}, {1, 1, 0, 0}}), 16777216, "from the first pair on");
  expect(element<Unit>(0, {{1, 1, 0, 0}, {1, 1, 0, 0}, {4096, 4096, 0, 0}}), 16777218, "from the first pair on");
}

template <class Unit>
void check_denormals() {
  expect(element<Unit>(0, {{0x1p-130f, 0x1p100f, 0, 0}}), 0, "a denormal factor counts as zero");
  expect(element<Unit>(0x1p-127f, {{0x1p-126f, 1, 0, 0}}), 0x1p-126f, "a denormal sum counts as zero");
  expect(element<Unit>(0, {{0x1p-63f, 0x1p-63f, 0, 0}}), 0x1p-126f, "the smallest normal number stays");
  expect(element<Unit>(0, {{0x1p-63f, -0x1p-64f, 0, 0}}), 0.0f, "a denormal result becomes zero, then 0 + -0 = 0");
  expect(element<Unit>(0, {{0x1.8p-63f, 0x1p-63f, 0, 0}, {-0x1p-63f, 0x1p-63f, 0, 0}}), 0, "a denormal difference");
  expect(element<Unit>(0, {{1, 1, 0, 0}, {0x1p-70f, 0x1p-70f, 0, 0}}), 1, "next to a normal number");
  // 2^-126 - 2^-150 has 24 bits below 2^-126; 2^-126 - 2^-151 rounds to 2^-126.
  expect(element<Unit>(0, {{0x1p-63f, 0x1p-63f, 0, 0}, {-0x1p-75f, 0x1p-75f, 0, 0}}), 0, "just below the smallest");
  expect(element<Unit>(0, {{0x1p-63f, 0x1p-63f, 0, 0}, {-0x1p-75f, 0x1p-76f, 0, 0}}), 0x1p-126f, "rounds up to it");
}

// Small integers: every element of a whole tile is exact, whatever its place.
template <class Unit>
void check_places() {
  std::uint32_t a[16][16], b[16][16];
  float c[16][16], wanted[16][16];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      a[i][j] = static_cast<std::uint32_t>(bfloat16(float(i - j))) << 16 | bfloat16(float(2 * i + j));
      b[i][j] = static_cast<std::uint32_t>(bfloat16(float(3 * j - i))) << 16 | bfloat16(float(i + 1));
      c[i][j] = wanted[i][j] = float(100 * i + j);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n)
      for (int k = 0; k < 16; ++k) wanted[m][n] += float((2 * m + k) * (k + 1) + (m - k) * (3 * n - k));
  Unit::configure();
  Unit::fence();
  Unit::template load<1>(c, 64);
  Unit::template load<2>(a, 64);
  Unit::template load<3>(b, 64);
  Unit::template multiply_add<1, 2, 3>();
  Unit::template store<1>(c, 64);
  Unit::template zero<1>();
  Unit::fence();
  Unit::release();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) CHECK(c[m][n] == wanted[m][n], "(%d, %d): %g, %g", m, n, c[m][n], wanted[m][n]);
}

template <class Unit>
void check_tiles() {
  check_sums<Unit>();
  check_denormals<Unit>();
  check_places<Unit>();
}

}  // namespace
