// Operands brought into the order in which a tile reads them: units of one lane group side by side.
#pragma once

#include <cstddef>

#include "cpu/engine.hpp"
#include "cpu/word.hpp"

namespace {

using Index = std::int64_t;

inline Index smaller(Index a, Index b) { return a < b ? a : b; }
inline Index larger(Index a, Index b) { return a > b ? a : b; }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// A matrix of elements (lane, depth), less a base of the same shape where there is one; what lies outside the cut
// counts as zero. `flat` places an element in the row-major order that the cut speaks of.
struct View {
  const void* data;
  Index lane_stride, depth_stride;
  const void* base = nullptr;
  Index base_lane_stride = 0, base_depth_stride = 0;
  Index flat_lane = 0, flat_depth = 0, begin = 0, end = 1;

  bool holds(Index lane, Index depth) const {
    const Index flat = lane * flat_lane + depth * flat_depth;
    return begin <= flat && flat < end;
  }
};

struct NoBase {};

template <class W, class B>
inline float element(const View& view, Index lane, Index depth) {
  if (!view.holds(lane, depth)) return 0;
  float value = widen(static_cast<const W*>(view.data)[lane * view.lane_stride + depth * view.depth_stride]);
  if constexpr (!__is_same(B, NoBase)) {
    const B* base = static_cast<const B*>(view.base) + lane * view.base_lane_stride + depth * view.base_depth_stride;
    // The base as a model of the weight's dtype holds it.
    value -= rounded_to<W>(widen(*base));
  }
  return value;
}

// `width` elements that lie side by side in memory.
template <class Lanes, class W, class B>
inline typename Lanes::Vector elements_at(const View& view, Index offset, Index base_offset) {
  typename Lanes::Vector value = Lanes::load(static_cast<const W*>(view.data) + offset);
  if constexpr (!__is_same(B, NoBase)) {
    typename Lanes::Vector base = Lanes::load(static_cast<const B*>(view.base) + base_offset);
    if constexpr (!__is_same(W, B)) base = Lanes::template round_to<W>(base);
    value = Lanes::subtract(value, base);
  }
  return value;
}

template <class Unit, class W, class B>
inline std::uint32_t unit_of(const View& view, Index lane, Index depth, Index depth_end) {
  const float first = element<W, B>(view, lane, depth);
  const float second =
      Unit::elements == 2 && depth + 1 < depth_end ? element<W, B>(view, lane, depth + 1) : 0.0f;
  return Unit::make(first, second);
}

// units[lane][depth]: lanes [lane0, lane0 + lanes), depths [depth0, depth0 + depth).
template <class Unit, class W, class B>
void pack_along(const View& view, Index lane0, Index lanes, Index depth0, Index depth, std::uint32_t* units,
                Index stride) {
  using Lanes = typename Unit::Lanes;
  const bool side_by_side = view.depth_stride == 1 && (!view.base || view.base_depth_stride == 1);
  for (Index i = 0; i < lanes; ++i, units += stride) {
    const Index lane = lane0 + i;
    Index j = 0;
    if (side_by_side && view.holds(lane, depth0) && view.holds(lane, depth0 + depth - 1)) {
      const Index at = lane * view.lane_stride + depth0, base_at = lane * view.base_lane_stride + depth0;
      for (; j + Lanes::width <= depth; j += Lanes::width)
        Unit::along(elements_at<Lanes, W, B>(view, at + j, base_at + j), units + j / Unit::elements);
    }
    for (; j < depth; j += Unit::elements)
      units[j / Unit::elements] = unit_of<Unit, W, B>(view, lane, depth0 + j, depth0 + depth);
  }
}

// One row of units whose elements all exist and lie side by side; the rest of the lanes is zero.
template <class Unit, class W, class B>
inline void pack_row_across(const View& view, Index at, Index base_at, Index lanes, Index width, std::uint32_t* units) {
  using Lanes = typename Unit::Lanes;
  Index i = 0;
  if constexpr (Unit::elements == 2 && __is_same(W, Bfloat16) && __is_same(B, NoBase)) {
    const Bfloat16* row = static_cast<const Bfloat16*>(view.data) + at;
    for (; i + 2 * Lanes::width <= lanes; i += 2 * Lanes::width)
      Unit::interleave(row + i, row + view.depth_stride + i, units + i);
  }
  for (; i + Lanes::width <= lanes; i += Lanes::width) {
    const auto first = elements_at<Lanes, W, B>(view, at + i, base_at + i);
    if constexpr (Unit::elements == 2) {
      const Index next = at + view.depth_stride + i, base_next = base_at + view.base_depth_stride + i;
      Unit::across(first, elements_at<Lanes, W, B>(view, next, base_next), units + i);
    } else {
      Unit::across(first, first, units + i);
    }
  }
  for (; i < lanes; ++i) {
    float value[Unit::elements];
    for (int e = 0; e < Unit::elements; ++e) {
      value[e] = widen(static_cast<const W*>(view.data)[at + e * view.depth_stride + i]);
      if constexpr (!__is_same(B, NoBase))
        value[e] -= rounded_to<W>(widen(static_cast<const B*>(view.base)[base_at + e * view.base_depth_stride + i]));
    }
    units[i] = Unit::make(value[0], value[Unit::elements - 1]);
  }
  for (; i < width; ++i) units[i] = 0;
}

// units[depth][lane]; lanes from `lanes` to `width` are zero.
template <class Unit, class W, class B>
void pack_across(const View& view, Index lane0, Index lanes, Index width, Index depth0, Index depth,
                 std::uint32_t* units, Index stride) {
  Index j = 0;
  const bool side_by_side = view.lane_stride == 1 && (!view.base || view.base_lane_stride == 1);
  if (side_by_side && lanes > 0 && depth > 0 && view.holds(lane0, depth0) &&
      view.holds(lane0 + lanes - 1, depth0 + depth - 1)) {
    const Index step = Unit::elements * view.depth_stride, base_step = Unit::elements * view.base_depth_stride;
    Index at = lane0 + depth0 * view.depth_stride, base_at = lane0 + depth0 * view.base_depth_stride;
    for (; j + Unit::elements <= depth; j += Unit::elements, units += stride, at += step, base_at += base_step) {
      pack_row_across<Unit, W, B>(view, at, base_at, lanes, width, units);
    }
  }
  for (; j < depth; j += Unit::elements, units += stride) {
    for (Index i = 0; i < lanes; ++i) units[i] = unit_of<Unit, W, B>(view, lane0 + i, depth0 + j, depth0 + depth);
    for (Index i = lanes; i < width; ++i) units[i] = 0;
  }
}

// units[depth][lane] of lanes whose depths lie side by side: blocks are packed along, then transposed.
template <class Unit, class W>
void pack_transposed(const View& view, Index lane0, Index lanes, Index width, Index depth, std::uint32_t* units,
                     Index stride) {
  constexpr Index block = Unit::Lanes::width;
  std::uint32_t scratch[block * block];
  for (Index i = 0; i < width; i += block) {
    const Index some = larger(0, smaller(block, lanes - i));
    for (Index j = 0; j < depth; j += block * Unit::elements) {
      const Index run = smaller(block * Unit::elements, depth - j);
      const std::uint32_t* source = scratch;
      Index source_stride = block;
      if (some == block && run == block * Unit::elements && sizeof(W) * Unit::elements == 4 && view.depth_stride == 1) {
        source = reinterpret_cast<const std::uint32_t*>(static_cast<const W*>(view.data) +
                                                        (lane0 + i) * view.lane_stride + j);
        if (view.lane_stride % Unit::elements == 0) {
          source_stride = view.lane_stride / Unit::elements;
        } else {
          source = scratch;
        }
      }
      if (source == scratch) {
        for (std::uint32_t& unit : scratch) unit = 0;
        pack_along<Unit, W, NoBase>(view, lane0 + i, some, j, run, scratch, block);
      }
      std::uint32_t* target = units + j / Unit::elements * stride + i;
      if (run == block * Unit::elements) {
        Unit::Lanes::transpose(source, source_stride, target, stride);
      } else {
        for (Index d = 0; d < ceil_div(run, Unit::elements); ++d)
          for (Index l = 0; l < block; ++l) target[d * stride + l] = source[l * source_stride + d];
      }
    }
  }
}

// -- one function for every pair of dtypes ---------------------------------------------------------------------

using PackAlong = void (*)(const View&, Index, Index, Index, Index, std::uint32_t*, Index);
using PackAcross = void (*)(const View&, Index, Index, Index, Index, Index, std::uint32_t*, Index);
using PackTransposed = void (*)(const View&, Index, Index, Index, Index, std::uint32_t*, Index);

template <class Unit>
struct Packing {
  PackAlong along;
  PackAcross across;
};

template <class Unit, class W>
Packing<Unit> packing_of(const rpsft::Matrix& base) {
  if (!base.data) return {pack_along<Unit, W, NoBase>, pack_across<Unit, W, NoBase>};
  switch (base.dtype) {
    case rpsft::Dtype::bfloat16:
      return {pack_along<Unit, W, Bfloat16>, pack_across<Unit, W, Bfloat16>};
    case rpsft::Dtype::float16:
      return {pack_along<Unit, W, Float16>, pack_across<Unit, W, Float16>};
    default:
      return {pack_along<Unit, W, float>, pack_across<Unit, W, float>};
  }
}

template <class Unit>
Packing<Unit> packing_of(const rpsft::Matrix& matrix, const rpsft::Matrix& base = {}) {
  switch (matrix.dtype) {
    case rpsft::Dtype::bfloat16:
      return packing_of<Unit, Bfloat16>(base);
    case rpsft::Dtype::float16:
      return packing_of<Unit, Float16>(base);
    default:
      return packing_of<Unit, float>(base);
  }
}

// Of bases and of C: bfloat16 or float32.
template <class Unit>
PackTransposed transposing_of(rpsft::Dtype dtype) {
  return dtype == rpsft::Dtype::bfloat16 ? pack_transposed<Unit, Bfloat16> : pack_transposed<Unit, float>;
}

}  // namespace
