// Packing the next chunk of an operand while the current one is multiplied: work that a tile overlaps with its
// products.
#pragma once

#include "cpu/microkernel.hpp"

namespace {

// The part of an operand that is packed at a time, in the lanes and depths of its View. In the order across, lanes are
// padded with zeros up to `width`.
struct Chunk {
  Index lane0 = 0, lanes = 0, width = 0, depth0 = 0, depth = 0;

  bool empty() const { return lanes == 0 || depth == 0; }
  bool operator==(const Chunk& o) const {
    return lane0 == o.lane0 && lanes == o.lanes && width == o.width && depth0 == o.depth0 && depth == o.depth;
  }
};

template <class Word, class W, class B, Order order>
void pack_chunk(const View& view, const Chunk& chunk, std::uint32_t* words, Index stride) {
  if constexpr (order == Order::along) {
    pack_along<Word, W, B>(view, chunk.lane0, chunk.lanes, chunk.depth0, chunk.depth, words, stride);
  } else {
    pack_across<Word, W, B>(view, chunk.lane0, chunk.lanes, chunk.width, chunk.depth0, chunk.depth, words, stride);
  }
}

// Does what pack_chunk does, one vector per step, and prefetches what will be packed later: a weight's contiguous runs
// are too short and too far apart for the hardware prefetcher.
template <class Word, class W, class B, Order order>
class PrefetchPack {
 public:
  static constexpr bool idle = false;

  // `beyond` is the chunk packed after `chunk`. The tiles will call step() about `slots` times.
  PrefetchPack(const View& view, const Chunk& chunk, const Chunk& beyond, std::uint32_t* words, Index stride,
               Index slots)
      : view_(view), chunk_(chunk), units_(words), stride_(stride), slots_(slots) {
    if (chunk.empty() || !by_vectors()) return;
    lines_ = along ? chunk.lanes : chunk.depth / Word::elements;
    run_ = along ? chunk.depth : chunk.lanes;
    line_ = place_of(chunk.lane0, chunk.depth0);
    out_ = words;
    vectors_ = lines_ * ceil_div(run_, width);
    const Index ahead = ceil_div(vectors_ahead, ceil_div(run_, width));
    turn_ = lines_ - ahead;
    beyond_ = place_of(beyond.lane0, beyond.depth0);
    far_ = turn_ > 0 ? line_.moved(step_of_line(), ahead) : beyond_;
  }

  // Spreads the vectors evenly over the slots: all at once would exceed the memory bandwidth.
  void step() {
    owed_ += vectors_;
    if (owed_ < slots_) return;
    owed_ -= slots_;
    if (lines_ > 0) pack();
  }

  // Packs whatever the steps have not.
  void finish() {
    if (chunk_.empty()) return;
    if (!out_) return pack_chunk<Word, W, B, order>(view_, chunk_, units_, stride_);
    while (lines_ > 0) pack();
  }

 private:
  using Lanes = typename Word::Lanes;
  using Vector = typename Lanes::Vector;
  static constexpr bool along = order == Order::along;
  static constexpr Index width = Lanes::width;
  // Prefetch distance: packing this many vectors takes about as long as a cache line from memory.
  static constexpr Index vectors_ahead = 24;

  void pack() {
    // A line's last vector overlaps the one before it where the width does not divide the line.
    const Index i = smaller(at_, run_ - width);
    const Index w = line_.weight + i, b = line_.base + i;
    const Vector first = elements_at<Lanes, W, B>(view_, w, b);
    if constexpr (along) {
      Word::along(first, out_ + i / Word::elements);
    } else if constexpr (Word::elements == 2) {
      Word::across(first, elements_at<Lanes, W, B>(view_, w + view_.depth_stride, b + view_.base_depth_stride),
                   out_ + i);
    } else {
      Word::across(first, first, out_ + i);
    }
    fetch(i);
    at_ += width;
    if (at_ >= run_) next_line();
  }

  // Offsets of one element in the weight and in its base.
  struct Place {
    Index weight, base;

    Place moved(const Place& by, Index times = 1) const { return {weight + times * by.weight, base + times * by.base}; }
  };

  Place place_of(Index lane, Index depth) const {
    return {lane * view_.lane_stride + depth * view_.depth_stride,
            lane * view_.base_lane_stride + depth * view_.base_depth_stride};
  }
  Place step_of_line() const { return along ? place_of(1, 0) : place_of(0, Word::elements); }

  bool by_vectors() const {
    const Index run_stride = along ? view_.depth_stride : view_.lane_stride;
    const Index base_stride = along ? view_.base_depth_stride : view_.base_lane_stride;
    return run_stride == 1 && (!view_.base || base_stride == 1) && (along || chunk_.lanes == chunk_.width) &&
           chunk_.depth % Word::elements == 0 && (along ? chunk_.depth : chunk_.lanes) >= width &&
           view_.holds(chunk_.lane0, chunk_.depth0) &&
           view_.holds(chunk_.lane0 + chunk_.lanes - 1, chunk_.depth0 + chunk_.depth - 1);
  }

  void next_line() {
    at_ = 0;
    --lines_;
    line_ = line_.moved(step_of_line());
    out_ += stride_;
    far_ = --turn_ == 0 ? beyond_ : far_.moved(step_of_line());
  }

  // always_inline: GCC 12 considers a function that only prefetches free of side effects and drops calls to it.
  __attribute__((always_inline)) void fetch(Index i) const {
    for (int e = 0; e < (along ? 1 : Word::elements); ++e) {
      __builtin_prefetch(static_cast<const W*>(view_.data) + far_.weight + e * view_.depth_stride + i, 0, 2);
      if constexpr (!__is_same(B, NoBase))
        __builtin_prefetch(static_cast<const B*>(view_.base) + far_.base + e * view_.base_depth_stride + i, 0, 2);
    }
  }

  const View& view_;
  const Chunk chunk_;
  std::uint32_t *units_, *out_ = nullptr;
  Index stride_, slots_, vectors_ = 0, owed_ = 0, lines_ = 0, run_ = 0, at_ = 0, turn_ = 0;
  Place line_{}, far_{}, beyond_{};
};

}  // namespace
