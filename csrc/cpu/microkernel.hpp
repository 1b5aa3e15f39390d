// The microkernel: a tile of a few rows by a few vectors of sums, kept in registers over the whole depth of the sum.
#pragma once

#include "cpu/pack.hpp"

namespace {

#if defined(__GNUC__) && !defined(__clang__)
#define RPSFT_UNROLL _Pragma("GCC unroll 16")
#else
#define RPSFT_UNROLL _Pragma("unroll")
#endif

// Layout of the operand whose words are broadcast: words[row][step] (along), or words[step][row] (across).
enum class Order { along, across };

template <class Lanes>
constexpr int panel_width = Lanes::tile_vectors * Lanes::width;

// Work that a tile does between its products, a little every other step: products leave most of the processor's other
// execution ports idle. This one has nothing to do.
struct NoOverlap {
  static constexpr bool idle = true;
  void step() {}
};

// Multiplies `rows` rows of broadcast words by a panel of vectors and hands the sums to `sink`.
// Never inlined: next to the variables of a caller's loops, compilers spill the sums.
template <class Word, Order order, int rows, class Sink, class Overlap>
__attribute__((noinline)) void multiply_tile(const std::uint32_t* broadcast, Index broadcast_stride,
                                             const std::uint32_t* panel, Index panel_stride, Index steps,
                                             const Sink& sink, Overlap& overlap) {
  using Lanes = typename Word::Lanes;
  constexpr int vectors = Lanes::tile_vectors;
  typename Lanes::Vector sums[rows][vectors];
  RPSFT_UNROLL
  for (int r = 0; r < rows; ++r) {
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) sums[r][v] = Lanes::zero();
  }
  // One pointer per three rows: the other two are one and two times a register away, which x86 addressing can express.
  // A pointer per row would use too many registers.
  constexpr int groups = (rows + 2) / 3;
  const char* group[groups];
  RPSFT_UNROLL
  for (int g = 0; g < groups; ++g)
    group[g] =
        reinterpret_cast<const char*>(order == Order::along ? broadcast + 3 * g * broadcast_stride : broadcast + 3 * g);
  constexpr bool along = order == Order::along;
  const Index next_row = along ? 4 * broadcast_stride : 4, next_step = along ? 4 : 4 * broadcast_stride;
  const auto products = [&]() __attribute__((always_inline)) {
    typename Lanes::Vector loaded[vectors];
    RPSFT_UNROLL
    for (int v = 0; v < vectors; ++v) loaded[v] = Word::load(panel + v * Lanes::width);
    RPSFT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const auto* word = reinterpret_cast<const std::uint32_t*>(group[r / 3] + r % 3 * next_row);
      RPSFT_UNROLL
      for (int v = 0; v < vectors; ++v) sums[r][v] = Word::multiply_add(word, loaded[v], sums[r][v]);
    }
    RPSFT_UNROLL
    for (int g = 0; g < groups; ++g) group[g] += next_step;
    panel += panel_stride;
  };
  Index step = 0;
  if constexpr (!Overlap::idle) {
    for (; step + 2 <= steps; step += 2) {
      overlap.step();
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

template <class Word, Order order, int rows, class Sink>
void multiply_tile(const std::uint32_t* broadcast, Index broadcast_stride, const std::uint32_t* panel,
                   Index panel_stride, Index steps, const Sink& sink) {
  NoOverlap nothing;
  multiply_tile<Word, order, rows>(broadcast, broadcast_stride, panel, panel_stride, steps, sink, nothing);
}

// Multiplies a tile of `present` rows, at most `rows`.
template <class Word, Order order, int rows, class Sink>
void multiply_partial_tile(Index present, const std::uint32_t* broadcast, Index broadcast_stride,
                           const std::uint32_t* panel, Index panel_stride, Index steps, const Sink& sink) {
  if constexpr (rows > 0) {
    if (present == rows) {
      multiply_tile<Word, order, rows>(broadcast, broadcast_stride, panel, panel_stride, steps, sink);
    } else {
      multiply_partial_tile<Word, order, rows - 1>(present, broadcast, broadcast_stride, panel, panel_stride, steps,
                                                   sink);
    }
  }
}

// Writes sums to float32 rows, or adds them. The rows must be long enough for the whole panel.
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
