// Packing: copies operands into the order in which the microkernel reads them, as words side by side per lane group.
#pragma once

#include <cstddef>

#include "cpu/engine.hpp"
#include "cpu/range.hpp"
#include "cpu/word.hpp"

namespace {

using rpsft::Matrix;

// A matrix indexed by (lane, depth), minus a base of the same shape if there is one. Depth is the dimension of the sum.
// Elements outside the cut read as zero: [begin, end) bounds the index in the weight's row-major order, which is
// lane * flat_lane + depth * flat_depth.
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
    // W0 is compared in the weight's dtype, so round it as that dtype does.
    value -= rounded_to<W>(widen(*base));
  }
  return value;
}

// Loads `width` elements that are contiguous in memory.
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

template <class Word, class W, class B>
inline std::uint32_t word_at(const View& view, Index lane, Index depth, Index depth_end) {
  const float first = element<W, B>(view, lane, depth);
  const float second = Word::elements == 2 && depth + 1 < depth_end ? element<W, B>(view, lane, depth + 1) : 0.0f;
  return Word::make(first, second);
}

// Packs lanes [lane0, lane0 + lanes) and depths [depth0, depth0 + depth) as words[lane][depth].
template <class Word, class W, class B>
void pack_along(const View& view, Index lane0, Index lanes, Index depth0, Index depth, std::uint32_t* words,
                Index stride) {
  using Lanes = typename Word::Lanes;
  const bool contiguous = view.depth_stride == 1 && (!view.base || view.base_depth_stride == 1);
  for (Index i = 0; i < lanes; ++i, words += stride) {
    const Index lane = lane0 + i;
    Index j = 0;
    if (contiguous && view.holds(lane, depth0) && view.holds(lane, depth0 + depth - 1)) {
      const Index at = lane * view.lane_stride + depth0, base_at = lane * view.base_lane_stride + depth0;
      for (; j + Lanes::width <= depth; j += Lanes::width)
        Word::along(elements_at<Lanes, W, B>(view, at + j, base_at + j), words + j / Word::elements);
    }
    for (; j < depth; j += Word::elements)
      words[j / Word::elements] = word_at<Word, W, B>(view, lane, depth0 + j, depth0 + depth);
  }
}

// Packs one row of words whose elements are all inside the cut and contiguous; lanes past `lanes` become zero.
template <class Word, class W, class B>
inline void pack_row_across(const View& view, Index at, Index base_at, Index lanes, Index width, std::uint32_t* words) {
  using Lanes = typename Word::Lanes;
  Index i = 0;
  if constexpr (Word::elements == 2 && __is_same(W, Bfloat16) && __is_same(B, NoBase)) {
    const Bfloat16* row = static_cast<const Bfloat16*>(view.data) + at;
    for (; i + 2 * Lanes::width <= lanes; i += 2 * Lanes::width)
      Word::interleave(row + i, row + view.depth_stride + i, words + i);
  }
  for (; i + Lanes::width <= lanes; i += Lanes::width) {
    const auto first = elements_at<Lanes, W, B>(view, at + i, base_at + i);
    if constexpr (Word::elements == 2) {
      const Index next = at + view.depth_stride + i, base_next = base_at + view.base_depth_stride + i;
      Word::across(first, elements_at<Lanes, W, B>(view, next, base_next), words + i);
    } else {
      Word::across(first, first, words + i);
    }
  }
  for (; i < lanes; ++i) {
    float value[Word::elements];
    for (int e = 0; e < Word::elements; ++e) {
      value[e] = widen(static_cast<const W*>(view.data)[at + e * view.depth_stride + i]);
      if constexpr (!__is_same(B, NoBase))
        value[e] -= rounded_to<W>(widen(static_cast<const B*>(view.base)[base_at + e * view.base_depth_stride + i]));
    }
    words[i] = Word::make(value[0], value[Word::elements - 1]);
  }
  for (; i < width; ++i) words[i] = 0;
}

// Packs words[depth][lane]; lanes from `lanes` to `width` become zero.
template <class Word, class W, class B>
void pack_across(const View& view, Index lane0, Index lanes, Index width, Index depth0, Index depth,
                 std::uint32_t* words, Index stride) {
  Index j = 0;
  const bool contiguous = view.lane_stride == 1 && (!view.base || view.base_lane_stride == 1);
  if (contiguous && lanes > 0 && depth > 0 && view.holds(lane0, depth0) &&
      view.holds(lane0 + lanes - 1, depth0 + depth - 1)) {
    const Index step = Word::elements * view.depth_stride, base_step = Word::elements * view.base_depth_stride;
    Index at = lane0 + depth0 * view.depth_stride, base_at = lane0 + depth0 * view.base_depth_stride;
    for (; j + Word::elements <= depth; j += Word::elements, words += stride, at += step, base_at += base_step) {
      pack_row_across<Word, W, B>(view, at, base_at, lanes, width, words);
    }
  }
  for (; j < depth; j += Word::elements, words += stride) {
    for (Index i = 0; i < lanes; ++i) words[i] = word_at<Word, W, B>(view, lane0 + i, depth0 + j, depth0 + depth);
    for (Index i = lanes; i < width; ++i) words[i] = 0;
  }
}

// Packs words[depth][lane] of a matrix whose depths are contiguous: packs blocks along the depth, then transposes them.
template <class Word, class W>
void pack_transposed(const View& view, Index lane0, Index lanes, Index width, Index depth, std::uint32_t* words,
                     Index stride) {
  constexpr Index block = Word::Lanes::width;
  std::uint32_t scratch[block * block];
  for (Index i = 0; i < width; i += block) {
    const Index some = larger(0, smaller(block, lanes - i));
    for (Index j = 0; j < depth; j += block * Word::elements) {
      const Index run = smaller(block * Word::elements, depth - j);
      const std::uint32_t* source = scratch;
      Index source_stride = block;
      if (some == block && run == block * Word::elements && sizeof(W) * Word::elements == 4 && view.depth_stride == 1) {
        source = reinterpret_cast<const std::uint32_t*>(static_cast<const W*>(view.data) +
                                                        (lane0 + i) * view.lane_stride + j);
        if (view.lane_stride % Word::elements == 0) {
          source_stride = view.lane_stride / Word::elements;
        } else {
          source = scratch;
        }
      }
      if (source == scratch) {
        for (std::uint32_t& word : scratch) word = 0;
        pack_along<Word, W, NoBase>(view, lane0 + i, some, j, run, scratch, block);
      }
      std::uint32_t* target = words + j / Word::elements * stride + i;
      if (run == block * Word::elements) {
        Word::Lanes::transpose(source, source_stride, target, stride);
      } else {
        for (Index d = 0; d < ceil_div(run, Word::elements); ++d)
          for (Index l = 0; l < block; ++l) target[d * stride + l] = source[l * source_stride + d];
      }
    }
  }
}

// Choosing the functions for a pair of dtypes.

using PackAlong = void (*)(const View&, Index, Index, Index, Index, std::uint32_t*, Index);
using PackAcross = void (*)(const View&, Index, Index, Index, Index, Index, std::uint32_t*, Index);
using PackTransposed = void (*)(const View&, Index, Index, Index, Index, std::uint32_t*, Index);

// The packing functions for one matrix and its base, in both orders.
template <class Word>
struct PackPlan {
  PackAlong along;
  PackAcross across;
};

template <class Word, class W>
PackPlan<Word> plan_pack(const Matrix& base) {
  if (!base.data) return {pack_along<Word, W, NoBase>, pack_across<Word, W, NoBase>};
  switch (base.dtype) {
    case rpsft::Dtype::bfloat16:
      return {pack_along<Word, W, Bfloat16>, pack_across<Word, W, Bfloat16>};
    case rpsft::Dtype::float16:
      return {pack_along<Word, W, Float16>, pack_across<Word, W, Float16>};
    default:
      return {pack_along<Word, W, float>, pack_across<Word, W, float>};
  }
}

template <class Word>
PackPlan<Word> plan_pack(const Matrix& matrix, const Matrix& base = {}) {
  switch (matrix.dtype) {
    case rpsft::Dtype::bfloat16:
      return plan_pack<Word, Bfloat16>(base);
    case rpsft::Dtype::float16:
      return plan_pack<Word, Float16>(base);
    default:
      return plan_pack<Word, float>(base);
  }
}

// Packing functions for U, V and C, which are bfloat16 or float32.
template <class Word>
PackTransposed plan_pack_transposed(rpsft::Dtype dtype) {
  return dtype == rpsft::Dtype::bfloat16 ? pack_transposed<Word, Bfloat16> : pack_transposed<Word, float>;
}

}  // namespace
