// The inner product of everything: a few rows by a few vectors of sums, held in registers over the whole depth.
#pragma once

#include "cpu/pack.hpp"

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

// What a tile does beside its products: a little, every other step, as products leave most of a processor idle.
struct Nothing {
  static constexpr bool idle = true;
  void step() {}
};

// Never inlined: among the variables of a caller's loops, compilers spill the sums.
template <class Unit, Order order, int rows, class Sink, class Beside>
__attribute__((noinline)) void tile(const std::uint32_t* one, Index one_stride, const std::uint32_t* many,
                                    Index many_stride, Index steps, const Sink& sink, Beside& beside) {
  using Lanes = typename Unit::Lanes;
  constexpr int vectors = Lanes::tile_vectors;
  typename Lanes::Vector sums[rows][vectors];
  RPSFT_UNROLL
  for (int r = 0; r < rows; ++r) {
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) sums[r][v] = Lanes::zero();
  }
  // A pointer for every third row: the two after it are a register and twice that register away, which an x86 address
  // can say. One pointer for each row would not leave registers enough.
  constexpr int groups = (rows + 2) / 3;
  const char* group[groups];
  RPSFT_UNROLL
  for (int g = 0; g < groups; ++g)
    group[g] = reinterpret_cast<const char*>(order == Order::along ? one + 3 * g * one_stride : one + 3 * g);
  constexpr bool along = order == Order::along;
  const Index next_row = along ? 4 * one_stride : 4, next_step = along ? 4 : 4 * one_stride;
  const auto products = [&]() __attribute__((always_inline)) {
    typename Lanes::Vector panel[vectors];
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) panel[v] = Unit::load(many + v * Lanes::width);
    RPSFT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const auto* unit = reinterpret_cast<const std::uint32_t*>(group[r / 3] + r % 3 * next_row);
      RPSFT_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] = Unit::multiply_add(unit, panel[v], sums[r][v]);
    }
    RPSFT_UNROLL
    for (int g = 0; g < groups; ++g) group[g] += next_step;
    many += many_stride;
  };
  Index step = 0;
  if constexpr (!Beside::idle) {
    for (; step + 2 <= steps; step += 2) {
      beside.step();
      products();
      products();
    }
  }
  for (; step < steps; ++step) products();
  RPSFT_UNROLL
  for (int r = 0; r < rows; ++r) {
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) sink.put(r, v * Lanes::width, sums[r][v]);
  }
}

template <class Unit, Order order, int rows, class Sink>
void tile(const std::uint32_t* one, Index one_stride, const std::uint32_t* many, Index many_stride, Index steps,
          const Sink& sink) {
  Nothing nothing;
  tile<Unit, order, rows>(one, one_stride, many, many_stride, steps, sink, nothing);
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
