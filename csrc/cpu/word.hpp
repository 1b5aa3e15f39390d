// Packed words: the 32-bit values that the microkernel multiplies. A word holds one float32, or two bfloat16 that are
// neighbours along the dimension of the sum.
#pragma once

#include "cpu/number.hpp"

namespace {

// One float32 number per word.
template <class L>
struct Float32Word {
  using Lanes = L;
  using Vector = typename L::Vector;
  static constexpr int elements = 1;

  // sum + broadcast(*word) * vector, lane by lane.
  static Vector multiply_add(const std::uint32_t* word, Vector vector, Vector sum) {
    return L::multiply_add(L::broadcast(from_bits(*word)), vector, sum);
  }
  static Vector load(const std::uint32_t* words) { return L::load(reinterpret_cast<const float*>(words)); }

  static std::uint32_t make(float first, float) { return to_bits(first); }

  // Packs a vector whose elements are neighbours along the sum.
  static void along(Vector row, std::uint32_t* words) { L::store(reinterpret_cast<float*>(words), row); }

  // Packs one word per lane. `second`, the next element along the sum, belongs to the next word here.
  static void across(Vector first, Vector, std::uint32_t* words) { L::store(reinterpret_cast<float*>(words), first); }
};

}  // namespace
