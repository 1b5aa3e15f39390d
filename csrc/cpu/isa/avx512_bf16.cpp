// AVX-512 with products of bfloat16 pairs (vdpbf16ps), twice as many as of float32 numbers.
#include "cpu/isa/avx512_lanes.hpp"

#include "cpu/float32_kernels.hpp"

namespace {

struct Bf16Lanes : Avx512Lanes {
  using Avx512Lanes::store;
  static void store(Bfloat16* target, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

struct Pair {
  using Lanes = Bf16Lanes;
  using Vector = Lanes::Vector;
  static constexpr int elements = 2;

  static Vector multiply_add(const std::uint32_t* one, Vector many, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*one)),
                            (__m512bh)_mm512_castps_si512(many));
  }
  static Vector load(const std::uint32_t* units) { return Lanes::load(reinterpret_cast<const float*>(units)); }

  static std::uint32_t make(float first, float second) {
    Bfloat16 low, high;
    narrow(first, low);
    narrow(second, high);
    return static_cast<std::uint32_t>(high.bits) << 16 | low.bits;
  }

  static void along(Vector row, std::uint32_t* units) { Lanes::store(reinterpret_cast<Bfloat16*>(units), row); }

  static void across(Vector first, Vector second, std::uint32_t* units) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(units, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Two vectors' worth of two rows.
  static void interleave(const Bfloat16* first, const Bfloat16* second, std::uint32_t* units) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    _mm512_storeu_si512(units, _mm512_permutex2var_epi16(a, interleaved(0), b));
    _mm512_storeu_si512(units + 16, _mm512_permutex2var_epi16(a, interleaved(16), b));
  }

 private:
  // Elements start, start + 32, start + 1, start + 33, ...: numbers from 32 on are the second row's.
  static __m512i interleaved(int start) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i pair = _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16));
    return _mm512_add_epi32(pair, _mm512_set1_epi32(32 << 16 | (start << 16) | start));
  }
};

using Float = Single<Bf16Lanes>;

void project(const Projection& p, std::uint32_t* workspace, double* sums, rpsft::Team& team) {
  if (!p.left.present()) return project_full<Bf16Lanes>(p, sums, team);
  const bool pairs = p.left.dtype == rpsft::Dtype::bfloat16;
  if (pairs && p.base.data) return project_one<Pair, Pair>(p, workspace, sums, team);
  // Without a base T is as large as the weight, and rounding it would lose the drift: it stays in float32.
  if (pairs && p.weight.dtype == rpsft::Dtype::bfloat16) return project_one<Pair, Float>(p, workspace, sums, team);
  project_one<Float, Float>(p, workspace, sums, team);
}

void pull(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (!p.left.present()) return pull_full<Bf16Lanes>(p, accumulate, team);
  if (p.left.dtype == rpsft::Dtype::bfloat16) return pull_into<Pair>(p, accumulate, workspace, team);
  pull_into<Float>(p, accumulate, workspace, team);
}

}  // namespace

namespace rpsft {

Kernels avx512_bf16_kernels() {
  // Units of float32 numbers need the more room.
  return {"avx512_bf16", project_units<Bf16Lanes>, pull_units<Float>, project, pull};
}

}  // namespace rpsft
