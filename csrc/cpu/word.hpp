// The 32-bit units that products are made of: one float32, or a pair of bfloat16 that are neighbours in the sum.
#pragma once

#include "cpu/number.hpp"

namespace {

// Every product of float32 numbers.
template <class L>
struct Single {
  using Lanes = L;
  using Vector = typename L::Vector;
  static constexpr int elements = 1;

  static Vector multiply_add(const std::uint32_t* one, Vector many, Vector sum) {
    return L::multiply_add(L::broadcast(from_bits(*one)), many, sum);
  }
  static Vector load(const std::uint32_t* units) { return L::load(reinterpret_cast<const float*>(units)); }

  static std::uint32_t make(float first, float) { return to_bits(first); }

  // Units of a vector of neighbours in the sum.
  static void along(Vector row, std::uint32_t* units) { L::store(reinterpret_cast<float*>(units), row); }

  // One unit per lane; the second of two neighbours belongs to the next unit.
  static void across(Vector first, Vector, std::uint32_t* units) { L::store(reinterpret_cast<float*>(units), first); }
};

}  // namespace
