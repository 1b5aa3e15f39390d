// project_drift on one instruction set: computes blocks of the weight's shorter side in parallel and folds them into C
// in order.
//
// Each round takes one block of the shorter side per thread. A thread computes T = (W - W0) V of its block (for a tall
// weight: of the transpose, with U) into its own slice of the workspace. Then all threads fold the round's slices into
// C, each thread its own columns. Every element of C is thus the same sum in the same order for any number of threads,
// and no thread needs a C of its own.
#pragma once

#include "cpu/kernels.hpp"
#include "cpu/prefetch.hpp"
#include "cpu/range.hpp"
#include "cpu/threads.hpp"

namespace {

using rpsft::Projection;

constexpr Index fold_columns = 64;  // columns of a basis packed at a time
// Chunk lengths are multiples of this, the widest vector.
constexpr Index chunk_step = 16;

// The largest block of the shorter side and chunk of the longer side, and the sizes of a thread's buffers for them in
// 32-bit words. These depend only on the shape and the rank, because C is summed block by block.
struct ProjectLayout {
  Index block_rows, chunk_words, slice_stride;
  Index slice, drift, panel, panels, per_thread;

  template <class Lanes>
  static ProjectLayout of(Index rank, Index long_size) {
    constexpr Index width = panel_width<Lanes>, small_slice = 40 << 10, cached_bytes = 5 << 20;
    ProjectLayout layout;
    layout.slice_stride = round_up(rank, width) + stride_padding;
    // The longer basis is read once per block. Blocks are large where that basis exceeds the cache, or where their
    // slices are small. Longer chunks are cheap too, next to a weight whose basis is that large.
    const bool far = 2 * long_size * rank > cached_bytes, small = 128 * layout.slice_stride <= small_slice;
    layout.block_rows = far || small ? 128 : 64;
    layout.chunk_words = (far ? 10 : 5) * chunk_step;
    layout.slice = layout.block_rows * layout.slice_stride;
    layout.drift = layout.block_rows * layout.chunk_words;
    layout.panel = layout.chunk_words * width;
    layout.panels = larger(2 * layout.panel, layout.block_rows * fold_columns);
    layout.per_thread = layout.slice + 2 * layout.drift + layout.panels;
    return layout;
  }
};

// The weight with its shorter side as lanes, and its bases named by side.
struct Sides {
  View view;
  const Matrix *shorter, *longer;
  Index short_size, long_size, rank;
  bool wide;

  explicit Sides(const Projection& p)
      : shorter(p.weight.rows <= p.weight.cols ? &p.left : &p.right),
        longer(p.weight.rows <= p.weight.cols ? &p.right : &p.left),
        short_size(smaller(p.weight.rows, p.weight.cols)),
        long_size(larger(p.weight.rows, p.weight.cols)),
        rank(p.left.cols),
        wide(p.weight.rows <= p.weight.cols) {
    const Matrix &w = p.weight, &b = p.base;
    view.data = w.data;
    view.base = b.data;
    view.lane_stride = wide ? w.row_stride : w.col_stride;
    view.depth_stride = wide ? w.col_stride : w.row_stride;
    view.base_lane_stride = wide ? b.row_stride : b.col_stride;
    view.base_depth_stride = wide ? b.col_stride : b.row_stride;
    view.flat_lane = wide ? w.cols : 1;
    view.flat_depth = wide ? 1 : w.cols;
    view.begin = p.cut.head;
    view.end = w.rows * w.cols - p.cut.tail;
  }
};

// Number of blocks of a shorter side: even, and enough for a few threads where the side is short. It must not depend on
// the number of threads, because C is summed block by block.
inline Index block_count(Index size, Index block_rows) {
  return larger(round_up(ceil_div(size, block_rows), 2), smaller(8, ceil_div(size, 64)));
}

// Length of a chunk in words, for a longer side of `words`: chunks are about equal, so that multiplying one takes long
// enough to pack the next. At most `most`, which is a multiple of chunk_step.
inline Index chunk_length(Index words, Index most) {
  return round_up(ceil_div(words, ceil_div(words, most)), chunk_step);
}

inline View columns_of(const Matrix& basis) { return {basis.data, basis.col_stride, basis.row_stride}; }

// The slice that compute_slice fills, and the calling thread's buffers.
struct Scratch {
  float* slice;
  // Double buffers: one half is multiplied while the other is packed.
  std::uint32_t *drift[2], *panel[2];
};

// The chunk of the weight that is packed, and the half of the double buffer that holds it.
struct PackedChunk {
  Chunk chunk;
  int half = 0;
};

// Work that a tile overlaps: packs the next chunk of the weight and the next panel of the basis.
template <class Weight, class Basis>
struct Overlapped {
  static constexpr bool idle = false;
  Weight& weight;
  Basis& basis;

  void step() {
    weight.step();
    basis.step();
  }
};

// Computes one thread's part of T: the rows `block`, and the columns of `panels`. Packing an operand overlaps the
// products that precede it. `following` are the rows of the thread's next block: the last products overlap packing its
// first chunk.
template <class First, class W, class B, class V, Order order>
void compute_slice(const Sides& sides, const ProjectLayout& layout, Range block, Range following, Range panels,
                   const Scratch& scratch, PackedChunk& packed) {
  using Lanes = typename First::Lanes;
  using WeightPack = PrefetchPack<First, W, B, order>;
  using BasisPack = PrefetchPack<First, V, NoBase, Order::across>;
  constexpr Index width = panel_width<Lanes>;
  constexpr bool along = order == Order::along;
  const Index stride = layout.slice_stride, drift_step = along ? layout.chunk_words : layout.block_rows;
  const View columns = columns_of(*sides.longer);
  const Index rows = block.end - block.begin, tiles = rows / Lanes::tile_rows;
  const Index step = chunk_length(ceil_div(sides.long_size, First::elements), layout.chunk_words) * First::elements;
  const auto chunk_at = [&](Range of, Index depth0) {
    const Index lanes = of.end - of.begin;
    return Chunk{of.begin, lanes, lanes, depth0, smaller(step, sides.long_size - depth0)};
  };
  const auto after = [&](const Chunk& chunk) {
    const Index end = chunk.depth0 + chunk.depth;
    if (end < sides.long_size) return chunk_at(chunk.lane0 == block.begin ? block : following, end);
    return chunk.lane0 == block.begin ? chunk_at(following, 0) : Chunk{};
  };
  const auto panel_of = [&](const Chunk& chunk, Index panel) {
    const Index column = panel * width;
    return Chunk{column, smaller(width, sides.rank - column), width, chunk.depth0, chunk.empty() ? 0 : chunk.depth};
  };
  Chunk chunk = chunk_at(block, 0);
  if (!(packed.chunk == chunk))
    pack_chunk<First, W, B, order>(sides.view, chunk, scratch.drift[packed.half], drift_step);
  int half = 0;
  pack_chunk<First, V, NoBase, Order::across>(columns, panel_of(chunk, panels.begin), scratch.panel[half], width);
  while (chunk.lane0 == block.begin && !chunk.empty()) {
    const Chunk next = after(chunk), later = next.empty() ? next : after(next);
    const bool ends = next.lane0 != block.begin;
    const Index steps = ceil_div(chunk.depth, First::elements), slots = tiles * (steps / 2);
    const std::uint32_t* drift = scratch.drift[packed.half];
    WeightPack weight(sides.view, next, later, scratch.drift[1 - packed.half], drift_step,
                      (panels.end - panels.begin) * slots);
    for (Index panel = panels.begin; panel < panels.end; ++panel, half = 1 - half) {
      const bool last = panel + 1 == panels.end;
      const Chunk following_panel = last ? ends ? Chunk{} : panel_of(next, panels.begin) : panel_of(chunk, panel + 1);
      BasisPack basis(columns, following_panel, {}, scratch.panel[1 - half], width, slots);
      Overlapped<WeightPack, BasisPack> overlapped{weight, basis};
      for (Index row = 0; row < rows; row += Lanes::tile_rows) {
        const Index present = smaller(Lanes::tile_rows, rows - row);
        const std::uint32_t* words = drift + row * (along ? drift_step : 1);
        const FloatSink<Lanes> sink{scratch.slice + row * stride + panel * width, stride, chunk.depth0 > 0};
        if (present == Lanes::tile_rows) {
          multiply_tile<First, order, Lanes::tile_rows>(words, drift_step, scratch.panel[half], width, steps, sink,
                                                        overlapped);
        } else {
          multiply_partial_tile<First, order, Lanes::tile_rows>(present, words, drift_step, scratch.panel[half], width,
                                                                steps, sink);
        }
      }
      basis.finish();
    }
    weight.finish();
    packed = {next, 1 - packed.half};
    chunk = next;
  }
}

using ComputeSlice = void (*)(const Sides&, const ProjectLayout&, Range, Range, Range, const Scratch&, PackedChunk&);

template <class First, class W, class B>
ComputeSlice select_compute_slice(bool along, rpsft::Dtype basis) {
  // Pairs come only from bfloat16 bases.
  if constexpr (First::elements == 1)
    if (basis == rpsft::Dtype::float32)
      return along ? compute_slice<First, W, B, float, Order::along> : compute_slice<First, W, B, float, Order::across>;
  return along ? compute_slice<First, W, B, Bfloat16, Order::along>
               : compute_slice<First, W, B, Bfloat16, Order::across>;
}

template <class First, class W>
ComputeSlice select_compute_slice(const Matrix& base, bool along, rpsft::Dtype basis) {
  if (!base.data) return select_compute_slice<First, W, NoBase>(along, basis);
  switch (base.dtype) {
    case rpsft::Dtype::bfloat16:
      return select_compute_slice<First, W, Bfloat16>(along, basis);
    case rpsft::Dtype::float16:
      return select_compute_slice<First, W, Float16>(along, basis);
    default:
      return select_compute_slice<First, W, float>(along, basis);
  }
}

template <class First>
ComputeSlice select_compute_slice(const Projection& p, const Sides& sides) {
  // Rows that are contiguous are packed along the depth.
  const bool along = sides.view.depth_stride == 1 || sides.view.lane_stride != 1;
  const rpsft::Dtype basis = sides.longer->dtype;
  switch (p.weight.dtype) {
    case rpsft::Dtype::bfloat16:
      return select_compute_slice<First, Bfloat16>(p.base, along, basis);
    case rpsft::Dtype::float16:
      return select_compute_slice<First, Float16>(p.base, along, basis);
    default:
      return select_compute_slice<First, float>(p.base, along, basis);
  }
}

// Packs neighbouring rows of T into pairs in place: pair j overwrites row 2 j.
template <class Second>
void pair_rows(float* slice, Index stride, Index rows, Range columns) {
  using Lanes = typename Second::Lanes;
  if constexpr (Second::elements == 2) {
    for (Index row = 0; row < rows; row += 2) {
      float* first = slice + row * stride;
      for (Index c = columns.begin; c < columns.end; c += Lanes::width) {
        const auto second = row + 1 < rows ? Lanes::load(first + stride + c) : Lanes::zero();
        Second::across(Lanes::load(first + c), second, reinterpret_cast<std::uint32_t*>(first + c));
      }
    }
  }
}

// Adds a tile to C, also where C ends inside the panel. `lanes` is how many columns C still has.
template <class Second>
void fold_tile(Index present, Index lanes, const std::uint32_t* broadcast, Index broadcast_stride,
               const std::uint32_t* panel, Index panel_stride, Index steps, float* target, Index stride) {
  using Lanes = typename Second::Lanes;
  constexpr Index width = panel_width<Lanes>;
  if (lanes >= width) {
    multiply_partial_tile<Second, Order::across, Lanes::tile_rows>(
        present, broadcast, broadcast_stride, panel, panel_stride, steps, FloatSink<Lanes>{target, stride, true});
    return;
  }
  float sums[Lanes::tile_rows * width];
  multiply_partial_tile<Second, Order::across, Lanes::tile_rows>(
      present, broadcast, broadcast_stride, panel, panel_stride, steps, FloatSink<Lanes>{sums, width, false});
  for (Index r = 0; r < present; ++r)
    for (Index i = 0; i < lanes; ++i) target[r * stride + i] += sums[r * width + i];
}

// One block of T in packed words.
struct Slice {
  Index row0, rows;
  const std::uint32_t* words;
};

// C += S^T T over the slices in order, for columns `shorts` of the shorter side's basis S and columns `longs` of T.
// `packed` is a buffer of `packed_size` words, at least fold_columns columns of one slice.
template <class Second, class SliceAt>
void fold_slices(const Sides& sides, const PackPlan<Second>& basis, const SliceAt& slice_at, Index slices, Range shorts,
                 Range longs, Index stride, std::uint32_t* packed, Index packed_size, float* drift) {
  using Lanes = typename Second::Lanes;
  constexpr Index width = panel_width<Lanes>, tile_rows = Lanes::tile_rows;
  const Index rank = sides.rank, longs_end = smaller(longs.end, rank);
  const View columns = columns_of(*sides.shorter);
  const Index each = ceil_div(slice_at(0).rows, Second::elements) * fold_columns;
  // Fold as many slices at a time as fit, so that a tile of C stays in the cache across them.
  const Index together = larger(1, packed_size / larger(1, each));
  for (Index first = 0; first < slices; first += together) {
    const Index end = smaller(slices, first + together);
    for (Index s0 = shorts.begin; s0 < shorts.end; s0 += fold_columns) {
      const Index some = smaller(fold_columns, shorts.end - s0), present_shorts = smaller(some, rank - s0);
      for (Index i = first; i < end; ++i)
        basis.across(columns, s0, present_shorts, round_up(some, width), slice_at(i).row0, slice_at(i).rows,
                     packed + (i - first) * each, fold_columns);
      const auto fold = [&](Index s, Index l) {
        for (Index i = first; i < end; ++i) {
          const Slice slice = slice_at(i);
          const std::uint32_t *basis_words = packed + (i - first) * each + s, *slice_words = slice.words + l;
          const Index steps = ceil_div(slice.rows, Second::elements), slice_step = stride * Second::elements;
          if (sides.wide) {
            fold_tile<Second>(smaller(tile_rows, present_shorts - s), rank - l, basis_words, fold_columns, slice_words,
                              slice_step, steps, drift + (s0 + s) * rank + l, rank);
          } else {
            fold_tile<Second>(smaller(tile_rows, longs_end - l), rank - s0 - s, slice_words, slice_step, basis_words,
                              fold_columns, steps, drift + l * rank + s0 + s, rank);
          }
        }
      };
      // The inner loop keeps the panel that tiles load as vectors and changes the broadcast operand.
      if (sides.wide) {
        for (Index l = longs.begin; l < longs_end; l += width)
          for (Index s = 0; s < present_shorts; s += tile_rows) fold(s, l);
      } else {
        for (Index s = 0; s < present_shorts; s += width)
          for (Index l = longs.begin; l < longs_end; l += tile_rows) fold(s, l);
      }
    }
  }
}

// Subtracts B and sums the squares: rows in parallel, then their sums in order.
inline void finish_drift(const Projection& p, Index rank, double* row_squares, rpsft::Team& team) {
  const Range rows = split_range(rank, team.rank(), team.size());
  for (Index r = rows.begin; r < rows.end; ++r) {
    float* row = p.drift + r * rank;
    double sums[8] = {};
    for (Index c = 0; c < rank; ++c) {
      if (p.block) row[c] -= p.block[r * rank + c];
      sums[c % 8] += static_cast<double>(row[c]) * row[c];
    }
    row_squares[r] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
  team.wait();
  if (team.rank() == 0) {
    double total = 0;
    for (Index r = 0; r < rank; ++r) total += row_squares[r];
    *p.square = static_cast<float>(total);
  }
}

template <class First, class Second>
void project_one(const Projection& p, std::uint32_t* workspace, double* row_squares, rpsft::Team& team) {
  using Lanes = typename First::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const Sides sides(p);
  const ProjectLayout layout = ProjectLayout::of<Lanes>(sides.rank, sides.long_size);
  const ComputeSlice compute = select_compute_slice<First>(p, sides);
  const PackPlan<Second> shorter = plan_pack<Second>(*sides.shorter);
  const Index panels = ceil_div(sides.rank, width), members = team.size(), me = team.rank();
  const Range zeroed = split_range(sides.rank * sides.rank, me, members);
  for (Index i = zeroed.begin; i < zeroed.end; ++i) p.drift[i] = 0;

  const Index blocks = sides.long_size > 0 ? block_count(sides.short_size, layout.block_rows) : 0;
  const Index rows_each = blocks > 0 ? round_up(ceil_div(sides.short_size, blocks), 2) : 0;
  const auto slice_of = [&](Index slot) { return reinterpret_cast<float*>(workspace + slot * layout.per_thread); };
  std::uint32_t* own_drift = workspace + me * layout.per_thread + layout.slice;
  std::uint32_t* own_panel = own_drift + 2 * layout.drift;
  const Index fold_groups = smaller(members, panels), other_groups = panels ? members / fold_groups : 0;

  // Rows of a block. Where fewer blocks are left than threads, several threads compute one slice, each some of its
  // columns.
  const auto rows_of = [&](Index block) {
    return Range{smaller(block * rows_each, sides.short_size), smaller((block + 1) * rows_each, sides.short_size)};
  };
  const auto slots_of = [&](Index block0) { return smaller(members, blocks - block0); };
  PackedChunk packed;
  for (Index block0 = 0; block0 < blocks; block0 += members) {
    const Index slots = slots_of(block0), groups = members / slots;
    const Index slot = me % slots, group = me / slots;
    if (group < groups) {
      const Range mine = split_range(panels, group, groups), rows = rows_of(block0 + slot);
      if (mine.begin < mine.end && rows.begin < rows.end) {
        const Index next0 = block0 + members;
        const Range following = next0 < blocks ? rows_of(next0 + me % slots_of(next0)) : Range{0, 0};
        compute(sides, layout, rows, following, mine,
                {slice_of(slot), {own_drift, own_drift + layout.drift}, {own_panel, own_panel + layout.panel}}, packed);
        pair_rows<Second>(slice_of(slot), layout.slice_stride, rows.end - rows.begin,
                          {mine.begin * width, mine.end * width});
      }
    }
    team.wait();
    if (panels && me / fold_groups < other_groups) {
      // Split the columns of T first: they were written by other threads, and each should be read by few.
      const Range longs = split_range(panels, me % fold_groups, fold_groups);
      const Range shorts = split_range(panels, me / fold_groups, other_groups);
      const auto slice_at = [&](Index s) {
        const Range rows = rows_of(block0 + s);
        return Slice{rows.begin, rows.end - rows.begin, reinterpret_cast<const std::uint32_t*>(slice_of(s))};
      };
      fold_slices<Second>(sides, shorter, slice_at, slots, {shorts.begin * width, shorts.end * width},
                          {longs.begin * width, longs.end * width}, layout.slice_stride, own_panel, layout.panels,
                          p.drift);
    }
    team.wait();
  }
  team.wait();
  finish_drift(p, sides.rank, row_squares, team);
  team.wait();
}

}  // namespace
