// Words of bfloat16 pairs in AVX512-BF16: packed, and multiplied with vdpbf16ps.
#pragma once

#include "cpu/isa/avx512_lanes.hpp"
#include "cpu/word.hpp"

namespace {

struct Bf16Lanes : Avx512Lanes {
  using Avx512Lanes::store;
  static void store(Bfloat16* target, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

// Two bfloat16 per word.
struct Bfloat16Pair {
  using Lanes = Bf16Lanes;
  using Vector = Lanes::Vector;
  static constexpr int elements = 2;

  static Vector multiply_add(const std::uint32_t* word, Vector vector, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*word)),
                            (__m512bh)_mm512_castps_si512(vector));
  }
  static Vector load(const std::uint32_t* words) { return Lanes::load(reinterpret_cast<const float*>(words)); }

  static std::uint32_t make(float first, float second) {
    Bfloat16 low, high;
    narrow(first, low);
    narrow(second, high);
    return static_cast<std::uint32_t>(high.bits) << 16 | low.bits;
  }

  static void along(Vector row, std::uint32_t* words) { Lanes::store(reinterpret_cast<Bfloat16*>(words), row); }

  static void across(Vector first, Vector second, std::uint32_t* words) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(words, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Packs one vector of lanes from two rows of bfloat16.
  static void pair(const Bfloat16* first, const Bfloat16* second, std::uint32_t* words) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    _mm512_storeu_si512(words, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Packs two vectors of lanes from two rows of bfloat16.
  static void interleave(const Bfloat16* first, const Bfloat16* second, std::uint32_t* words) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi16(a, interleaved(0), b));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi16(a, interleaved(16), b));
  }

 private:
  // The permutation start, start + 32, start + 1, start + 33, ...: indices from 32 on select from the second row.
  static __m512i interleaved(int start) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i pair = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
    return _mm512_add_epi32(pair, _mm512_set1_epi32(32 << 16 | (start << 16) | start));
  }
};

}  // namespace
