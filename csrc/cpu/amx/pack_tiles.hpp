// Packing strips of tiles, and doing so while other tiles are multiplied.
#pragma once

#include "cpu/amx/tiles.hpp"
#include "cpu/prefetch.hpp"

namespace {

// The operand's place in a product: rows are packed as words[lane][pair], columns as words[pair][lane].
enum class Side { rows, columns };

inline Index tile_steps(Index depth) { return ceil_div(depth, tile_depth); }

// Whether a matrix is packed along its depth and not across it, as its memory lies.
inline bool lies_along(const View& view) { return view.depth_stride == 1 || view.lane_stride != 1; }

// target[j][i] = source[i][j] for the words of a tile.
template <class Lanes>
void transpose_tile(const std::uint32_t* source, std::uint32_t* target, Index target_stride = tile_lanes) {
  for (Index i = 0; i < tile_lanes; i += Lanes::width)
    for (Index j = 0; j < tile_lanes; j += Lanes::width)
      Lanes::transpose(source + i * tile_lanes + j, tile_lanes, target + j * target_stride + i, target_stride);
}

// Packs a tile that is all there and contiguous along its depth as words[lane][pair].
template <class Word, class W, class B>
void pack_whole_along(const View& view, Index lane0, Index depth0, std::uint32_t* words) {
  using Lanes = typename Word::Lanes;
  Index at = lane0 * view.lane_stride + depth0, base_at = lane0 * view.base_lane_stride + depth0;
  for (Index i = 0; i < tile_lanes; ++i, at += view.lane_stride, base_at += view.base_lane_stride) {
    if constexpr (__is_same(W, Bfloat16) && __is_same(B, NoBase)) {
      std::memcpy(words + i * tile_lanes, static_cast<const W*>(view.data) + at, 2 * tile_depth);
    } else {
      RPSFT_UNROLL
      for (Index j = 0; j < tile_depth; j += Lanes::width)
        Word::along(elements_at<Lanes, W, B>(view, at + j, base_at + j), words + i * tile_lanes + j / 2);
    }
  }
}

// Packs a tile that is all there and contiguous along its lanes as words[pair][lane].
template <class Word, class W, class B>
void pack_whole_across(const View& view, Index lane0, Index depth0, std::uint32_t* words) {
  using Lanes = typename Word::Lanes;
  const Index next = view.depth_stride, base_next = view.base_depth_stride;
  Index at = lane0 + depth0 * next, base_at = lane0 + depth0 * base_next;
  for (Index j = 0; j < tile_depth / 2; ++j, at += 2 * next, base_at += 2 * base_next) {
    RPSFT_UNROLL
    for (Index i = 0; i < tile_lanes; i += Lanes::width) {
      std::uint32_t* target = words + j * tile_lanes + i;
      if constexpr (__is_same(W, Bfloat16) && __is_same(B, NoBase)) {
        const W* row = static_cast<const W*>(view.data) + at + i;
        Word::pair(row, row + next, target);
      } else {
        Word::across(elements_at<Lanes, W, B>(view, at + i, base_at + i),
                     elements_at<Lanes, W, B>(view, at + i + next, base_at + i + base_next), target);
      }
    }
  }
}

// Packs one tile: `lanes` of 16 and `depth` of 32 elements are there, or none; the others become zero.
template <class Word, class W, class B, Side side>
void pack_tile(const View& view, Index lane0, Index lanes, Index depth0, Index depth, std::uint32_t* words) {
  const bool along = lies_along(view), straight = along == (side == Side::rows);
  alignas(64) std::uint32_t scratch[tile_words];
  std::uint32_t* target = straight ? words : scratch;
  const bool whole = lanes >= tile_lanes && depth >= tile_depth && view.holds(lane0, depth0) &&
                     view.holds(lane0 + tile_lanes - 1, depth0 + tile_depth - 1);
  if (whole && view.depth_stride == 1 && (!view.base || view.base_depth_stride == 1)) {
    pack_whole_along<Word, W, B>(view, lane0, depth0, target);
  } else if (whole && !along && (!view.base || view.base_lane_stride == 1)) {
    pack_whole_across<Word, W, B>(view, lane0, depth0, target);
  } else {
    for (Index i = 0; i < tile_words; ++i) target[i] = 0;
    if (lanes > 0 && depth > 0) {
      lanes = smaller(lanes, tile_lanes);
      depth = smaller(depth, tile_depth);
      if (along) {
        pack_along<Word, W, B>(view, lane0, lanes, depth0, depth, target, tile_lanes);
      } else {
        pack_across<Word, W, B>(view, lane0, lanes, tile_lanes, depth0, depth, target, tile_lanes);
      }
    }
  }
  if (!straight) transpose_tile<typename Word::Lanes>(scratch, words);
}

using PackTile = void (*)(const View&, Index, Index, Index, Index, std::uint32_t*);

template <class Word, Side side, class W>
PackTile plan_pack_tile(const Matrix& base) {
  if (!base.data) return pack_tile<Word, W, NoBase, side>;
  switch (base.dtype) {
    case rpsft::Dtype::bfloat16:
      return pack_tile<Word, W, Bfloat16, side>;
    case rpsft::Dtype::float16:
      return pack_tile<Word, W, Float16, side>;
    default:
      return pack_tile<Word, W, float, side>;
  }
}

// How to pack a weight minus its base.
template <class Word, Side side>
PackTile plan_pack_tile(const Matrix& weight, const Matrix& base) {
  switch (weight.dtype) {
    case rpsft::Dtype::bfloat16:
      return plan_pack_tile<Word, side, Bfloat16>(base);
    case rpsft::Dtype::float16:
      return plan_pack_tile<Word, side, Float16>(base);
    default:
      return plan_pack_tile<Word, side, float>(base);
  }
}

// The element size of a dtype in bytes.
inline Index bytes_of(rpsft::Dtype dtype) { return dtype == rpsft::Dtype::float32 ? 4 : 2; }

// An operand, and how it becomes tiles.
struct Source {
  View view;
  PackTile pack;
  Index bytes, base_bytes;  // of an element

  // The tile of 16 lanes from `lane` and 32 depths from `depth`, within a chunk.
  void tile(const Chunk& chunk, Index lane, Index depth, std::uint32_t* words) const {
    pack(view, lane, chunk.lane0 + chunk.lanes - lane, depth, chunk.depth0 + chunk.depth - depth, words);
  }
};

// Words that a chunk takes: strips, one after the other.
inline Index chunk_words(const Chunk& chunk) {
  return ceil_div(chunk.lanes, block_lanes) * tile_steps(chunk.depth) * step_words;
}

// Packs a chunk tile by tile, a few at each step, and prefetches what comes a few tiles later: a weight's contiguous
// runs are too short and too far apart for the hardware prefetcher.
class TilePacker {
 public:
  // `beyond` is the chunk packed after `chunk`. step() will be called about `slots` times.
  TilePacker(const Source& source, const Chunk& chunk, const Chunk& beyond, std::uint32_t* words, Index slots)
      : source_(source),
        chunk_(chunk),
        beyond_(beyond),
        words_(words),
        slots_(slots),
        count_(tiles_of(chunk)),
        ahead_(smaller(tiles_ahead, count_)) {}

  // Spreads the tiles evenly over the slots: all at once would exceed the memory bandwidth.
  void step() {
    owed_ += count_;
    if (owed_ >= slots_) catch_up();
  }

  // Packs whatever the steps have not.
  void finish() {
    while (next_ < count_) pack();
  }

 private:
  // Packing this many tiles takes longer than a cache line from memory.
  static constexpr Index tiles_ahead = 4;

  static Index tiles_of(const Chunk& chunk) { return chunk.empty() ? 0 : chunk_words(chunk) / tile_words; }

  __attribute__((noinline)) void catch_up() {
    for (; owed_ >= slots_; owed_ -= slots_)
      if (next_ < count_) pack();
  }

  // Tiles are packed in the order of memory: along the depth, or across all lanes of a chunk.
  struct Place {
    Index tile, step;
  };
  Place place(const Chunk& chunk, Index number) const {
    const Index steps = tile_steps(chunk.depth), tiles = 2 * ceil_div(chunk.lanes, block_lanes);
    if (lies_along(source_.view)) return {number / steps, number % steps};
    return {number % tiles, number / tiles};
  }

  void pack() {
    const Place at = place(chunk_, next_);
    const Index strip = at.tile / 2, half = at.tile % 2;
    std::uint32_t* words =
        words_ + (strip * tile_steps(chunk_.depth) + at.step) * step_words + half * tile_words;
    source_.tile(chunk_, chunk_.lane0 + at.tile * tile_lanes, chunk_.depth0 + at.step * tile_depth, words);
    const Index later = next_ + ahead_;
    if (later < count_) {
      fetch(chunk_, later);
    } else if (later - count_ < tiles_of(beyond_)) {
      fetch(beyond_, later - count_);
    }
    ++next_;
  }

  // always_inline: GCC 12 considers a function that only prefetches free of side effects and drops calls to it.
  __attribute__((always_inline)) void fetch(const Chunk& chunk, Index number) const {
    const Place at = place(chunk, number);
    const View& view = source_.view;
    const bool along = lies_along(view);
    const Index lane = chunk.lane0 + at.tile * tile_lanes, depth = chunk.depth0 + at.step * tile_depth;
    const Index lines = along ? smaller(tile_lanes, chunk.lane0 + chunk.lanes - lane)
                              : smaller(tile_depth, chunk.depth0 + chunk.depth - depth);
    const char* line = static_cast<const char*>(view.data) +
                       (lane * view.lane_stride + depth * view.depth_stride) * source_.bytes;
    const char* base = static_cast<const char*>(view.base) +
                       (lane * view.base_lane_stride + depth * view.base_depth_stride) * source_.base_bytes;
    const Index next = (along ? view.lane_stride : view.depth_stride) * source_.bytes;
    const Index base_next = (along ? view.base_lane_stride : view.base_depth_stride) * source_.base_bytes;
    // A line of a tile has 64 bytes; 128 of float32 along the depth, and half as many across.
    for (Index i = 0; i < lines; ++i, line += next, base += base_next) {
      __builtin_prefetch(line, 0, 2);
      if (along && source_.bytes == 4) __builtin_prefetch(line + 64, 0, 2);
      if (!view.base) continue;
      __builtin_prefetch(base, 0, 2);
      if (along && source_.base_bytes == 4) __builtin_prefetch(base + 64, 0, 2);
    }
  }

  const Source& source_;
  const Chunk chunk_, beyond_;
  std::uint32_t* words_;
  Index slots_, count_, ahead_, owed_ = 0, next_ = 0;
};

// Packs a chunk at once.
inline void pack_strips(const Source& source, const Chunk& chunk, std::uint32_t* words) {
  TilePacker(source, chunk, {}, words, 1).finish();
}

}  // namespace
