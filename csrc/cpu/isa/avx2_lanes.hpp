// Vectors of eight floats in AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/number.hpp"

namespace {

struct Avx2Lanes {
  static constexpr int width = 8;
  static constexpr int tile_rows = 6, tile_vectors = 2;
  using Vector = __m256;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }

  static Vector load(const float* source) { return _mm256_loadu_ps(source); }
  static Vector load(const Bfloat16* source) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Float16* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }

  static void store(float* target, Vector v) { _mm256_storeu_ps(target, v); }
  static void store(Bfloat16* target, Vector v) {
    const __m256i high = _mm256_srli_epi32(rounded_bits(v), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* target, Vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  template <class T>
  static Vector round_to(Vector v) {
    if constexpr (sizeof(T) == 4) {
      return v;
    } else {
      alignas(16) T held[width];
      store(held, v);
      return load(held);
    }
  }

  static void transpose(const std::uint32_t* source, std::ptrdiff_t stride, std::uint32_t* target,
                        std::ptrdiff_t target_stride) {
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) target[j * target_stride + i] = source[i * stride + j];
  }

 private:
  // Rounds to nearest even; the bfloat16 is in the upper half of each lane.
  static __m256i rounded_bits(Vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(sum, quiet, nan);
  }
};

}  // namespace
