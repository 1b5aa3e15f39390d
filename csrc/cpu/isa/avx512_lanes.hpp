// Vectors of sixteen floats in AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>

#include "cpu/number.hpp"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about the undefined lanes inside its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace {

struct Avx512Lanes {
  static constexpr int width = 16;
  // A tile's sums take 24 of the 32 registers.
  static constexpr int tile_rows = 12, tile_vectors = 2;
  using Vector = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }

  static Vector load(const float* source) { return _mm512_loadu_ps(source); }
  static Vector load(const Bfloat16* source) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vector load(const Float16* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }

  static void store(float* target, Vector v) { _mm512_storeu_ps(target, v); }
  static void store(Bfloat16* target, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), narrow_to_bfloat16(v));
  }
  static void store(Float16* target, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  template <class T>
  static Vector round_to(Vector v) {
    if constexpr (sizeof(T) == 4) {
      return v;
    } else {
      alignas(32) T held[width];
      store(held, v);
      return load(held);
    }
  }

  // target[j][i] = source[i][j], for 16 x 16 words.
  static void transpose(const std::uint32_t* source, std::ptrdiff_t stride, std::uint32_t* target,
                        std::ptrdiff_t target_stride) {
    __m512i row[16], pair[16];
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(source + i * stride);
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
      row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
      row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
      row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      pair[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
      pair[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
      pair[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
      pair[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(target + i * target_stride, _mm512_shuffle_i32x4(pair[i], pair[i + 8], 0x88));
      _mm512_storeu_si512(target + (i + 8) * target_stride, _mm512_shuffle_i32x4(pair[i], pair[i + 8], 0xdd));
    }
  }

 protected:
  static __m256i narrow_to_bfloat16(Vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(sum, nan, quiet), 16));
  }
};

}  // namespace
