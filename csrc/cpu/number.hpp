// bfloat16 and float16 as 16-bit patterns: exact widening, and narrowing to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(Bfloat16 value) { return from_bits(static_cast<std::uint32_t>(value.bits) << 16); }

inline float widen(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by a power of two rebiases the exponent, and normalizes subnormal numbers.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

inline void narrow(float value, float& target) { target = value; }

inline void narrow(float value, Bfloat16& target) {
  const std::uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    target.bits = static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // keep NaN a NaN
  } else {
    target.bits = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

inline void narrow(float value, Float16& target) {
  const std::uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and above; smaller values that round up to it carry into the exponent below
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the result, rounded, in the low bits of the sum.
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  target.bits = static_cast<std::uint16_t>(sign | half);
}

// The value after a round trip through type T.
template <class T>
inline float rounded_to(float value) {
  T held;
  narrow(value, held);
  return widen(held);
}

}  // namespace
