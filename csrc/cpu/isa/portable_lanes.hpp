// Vectors of four floats in plain C++ that compilers translate to SSE or NEON, with the same operations as the other
// instruction sets' lanes.
#pragma once

#include "cpu/number.hpp"

namespace {

struct PortableLanes {
  static constexpr int width = 4;
  static constexpr int tile_rows = 6, tile_vectors = 2;
  struct Vector {
    float lane[width];
  };

  static Vector zero() { return {}; }

  static Vector broadcast(float value) {
    Vector v;
    for (float& lane : v.lane) lane = value;
    return v;
  }

  template <class T>
  static Vector load(const T* source) {
    Vector v;
    for (int i = 0; i < width; ++i) v.lane[i] = widen(source[i]);
    return v;
  }

  template <class T>
  static void store(T* target, Vector v) {
    for (int i = 0; i < width; ++i) narrow(v.lane[i], target[i]);
  }

  static Vector add(Vector a, Vector b) {
    for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
    return a;
  }

  static Vector subtract(Vector a, Vector b) {
    for (int i = 0; i < width; ++i) a.lane[i] -= b.lane[i];
    return a;
  }

  static Vector multiply(Vector a, Vector b) {
    for (int i = 0; i < width; ++i) a.lane[i] *= b.lane[i];
    return a;
  }

  static Vector multiply_add(Vector a, Vector b, Vector c) {
    for (int i = 0; i < width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }

  template <class T>
  static Vector round_to(Vector v) {
    for (int i = 0; i < width; ++i) v.lane[i] = rounded_to<T>(v.lane[i]);
    return v;
  }

  static void transpose(const std::uint32_t* source, std::ptrdiff_t stride, std::uint32_t* target,
                        std::ptrdiff_t target_stride) {
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) target[j * target_stride + i] = source[i * stride + j];
  }
};

}  // namespace
