// The inner product of everything: a few rows by a few vectors of sums, held in registers over the whole depth.
#pragma once

#include "pack.hpp"

namespace {

#if defined(__GNUC__) && !defined(__clang__)
#define RPSFT_UNROLL _Pragma("GCC unroll 16")
#else
#define RPSFT_UNROLL _Pragma("unroll")
#endif

// How the one operand that is broadcast lies: units[row][step], or units[step][row].
enum class Order { along, across };

template <class Lanes>
constexpr int panel_width = Lanes::tile_vectors * Lanes::width;

template <class Unit, Order order, int rows, class Sink>
inline __attribute__((always_inline)) void tile(const std::uint32_t* one, Index one_stride, const std::uint32_t* many,
                                                Index many_stride, Index steps, const Sink& sink) {
  using Lanes = typename Unit::Lanes;
  constexpr int vectors = Lanes::tile_vectors;
  typename Lanes::Vector sums[rows][vectors];
  RPSFT_UNROLL
  for (int r = 0; r < rows; ++r) {
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) sums[r][v] = Lanes::zero();
  }
  for (Index step = 0; step < steps; ++step, many += many_stride) {
    typename Lanes::Vector panel[vectors];
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) panel[v] = Unit::load(many + v * Lanes::width);
    RPSFT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const std::uint32_t* unit = order == Order::along ? one + r * one_stride : one + r;
      RPSFT_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] = Unit::multiply_add(unit, panel[v], sums[r][v]);
    }
    one += order == Order::along ? 1 : one_stride;
  }
  RPSFT_UNROLL
  for (int r = 0; r < rows; ++r) {
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) sink.put(r, v * Lanes::width, sums[r][v]);
  }
}

// A tile of fewer rows than `rows`.
template <class Unit, Order order, int rows, class Sink>
void partial_tile(Index present, const std::uint32_t* one, Index one_stride, const std::uint32_t* many,
                  Index many_stride, Index steps, const Sink& sink) {
  if constexpr (rows > 0) {
    if (present == rows) {
      tile<Unit, order, rows>(one, one_stride, many, many_stride, steps, sink);
    } else {
      partial_tile<Unit, order, rows - 1>(present, one, one_stride, many, many_stride, steps, sink);
    }
  }
}

// Sums written over, or added to, float32 rows that have room for the whole panel.
template <class Lanes>
struct FloatSink {
  float* target;
  Index stride;
  bool add;

  void put(int row, int lane, typename Lanes::Vector sum) const {
    float* at = target + row * stride + lane;
    Lanes::store(at, add ? Lanes::add(sum, Lanes::load(at)) : sum);
  }
};

}  // namespace
