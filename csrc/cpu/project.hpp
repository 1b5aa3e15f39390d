// project_drift on one instruction set: blocks of the shorter side in parallel, folded into C in their order.
//
// A round takes one block of the shorter side per thread. Each thread forms T = (W - W0) V of its block (for a tall
// weight: of its transpose, with U) in its own slice of the workspace; then all threads together fold the round's
// slices into C, each its own columns. Every element of C is therefore the same sum in the same order for any
// number of threads, and no thread needs a C of its own.
#pragma once

#include "cpu/threads.hpp"
#include "cpu/prefetch.hpp"
#include "cpu/kernels.hpp"

namespace {

using rpsft::Matrix;
using rpsft::Projection;

constexpr Index fold_columns = 64;  // of a basis packed at a time
// Beyond the padded rank, so that rows of T do not all fall into one set of a cache.
constexpr Index padding = 16;
// Chunks are a multiple of it long: the widest vector.
constexpr Index chunk_step = 16;

// How large a block of the shorter side and a chunk of the longer side are at most, and a thread's room for them, in
// units. It depends on the shape and the rank alone: C is summed block by block.
struct ProjectLayout {
  Index block_rows, chunk_units, slice_stride;
  Index slice, drift, panel, panels, per_thread;

  template <class Lanes>
  static ProjectLayout of(Index rank, Index long_size) {
    constexpr Index width = panel_width<Lanes>, small_slice = 40 << 10, near = 5 << 20;
    ProjectLayout layout;
    layout.slice_stride = round_up(rank, width) + padding;
    // The longer basis is read once per block: blocks are large where that comes from afar, or where they cost little
    // room. Beside the weight whose basis is that large, room for longer chunks is little too.
    const bool far = 2 * long_size * rank > near, small = 128 * layout.slice_stride <= small_slice;
    layout.block_rows = far || small ? 128 : 64;
    layout.chunk_units = (far ? 10 : 5) * chunk_step;
    layout.slice = layout.block_rows * layout.slice_stride;
    layout.drift = layout.block_rows * layout.chunk_units;
    layout.panel = layout.chunk_units * width;
    layout.panels = larger(2 * layout.panel, layout.block_rows * fold_columns);
    layout.per_thread = layout.slice + 2 * layout.drift + layout.panels;
    return layout;
  }
};

// The weight seen from its shorter side, and the bases by their sides.
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

// Blocks of a shorter side: enough for a few threads where it is short, and an even number. It must not depend on the
// number of threads: C is summed block by block.
inline Index block_count(Index size, Index block_rows) {
  return larger(round_up(ceil_div(size, block_rows), 2), smaller(8, ceil_div(size, 64)));
}

// Units along a chunk of a longer side of so many: about equal, so that each is time enough to pack the next. It is
// at most `most`, which is a multiple of chunk_step too.
inline Index chunk_length(Index units, Index most) {
  return round_up(ceil_div(units, ceil_div(units, most)), chunk_step);
}

inline View columns_of(const Matrix& basis) { return {basis.data, basis.col_stride, basis.row_stride}; }

struct Share {
  Index begin, end;
};

// Part `part` of `parts` nearly equal parts of [0, size).
inline Share share_of(Index size, Index part, Index parts) { return {size * part / parts, size * (part + 1) / parts}; }

// Rows of a block and the thread's own room for them.
struct Room {
  float* slice;
  // Two of each: one is multiplied while the other is filled.
  std::uint32_t *drift[2], *panel[2];
};

// What lies packed in which half of a thread's room.
struct Packed {
  Chunk chunk;
  int half = 0;
};

// Beside a tile: the next chunk of the weight is packed, and the next panel of the basis.
template <class Weight, class Basis>
struct Beside {
  static constexpr bool idle = false;
  Weight& weight;
  Basis& basis;

  void step() {
    weight.step();
    basis.step();
  }
};

// One thread's block of T: lanes are rows of the block, columns the panels [panels.begin, panels.end). Operands are
// packed beside the products that come before theirs; `following` are the rows of the thread's next block, whose first
// chunk is packed in the end.
template <class First, class W, class B, class V, Order order>
void form_slice(const Sides& sides, const ProjectLayout& layout, Share block, Share following, Share panels,
                const Room& room, Packed& packed) {
  using Lanes = typename First::Lanes;
  using WeightAhead = PackAhead<First, W, B, order>;
  using BasisAhead = PackAhead<First, V, NoBase, Order::across>;
  constexpr Index width = panel_width<Lanes>;
  constexpr bool along = order == Order::along;
  const Index stride = layout.slice_stride, drift_step = along ? layout.chunk_units : layout.block_rows;
  const View columns = columns_of(*sides.longer);
  const Index rows = block.end - block.begin, tiles = rows / Lanes::tile_rows;
  const Index step = chunk_length(ceil_div(sides.long_size, First::elements), layout.chunk_units) * First::elements;
  const auto chunk_at = [&](Share of, Index depth0) {
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
  if (!(packed.chunk == chunk)) pack_chunk<First, W, B, order>(sides.view, chunk, room.drift[packed.half], drift_step);
  int half = 0;
  pack_chunk<First, V, NoBase, Order::across>(columns, panel_of(chunk, panels.begin), room.panel[half], width);
  while (chunk.lane0 == block.begin && !chunk.empty()) {
    const Chunk next = after(chunk), later = next.empty() ? next : after(next);
    const bool ends = next.lane0 != block.begin;
    const Index steps = ceil_div(chunk.depth, First::elements), slots = tiles * (steps / 2);
    const std::uint32_t* drift = room.drift[packed.half];
    WeightAhead weight(sides.view, next, later, room.drift[1 - packed.half], drift_step,
                       (panels.end - panels.begin) * slots);
    for (Index panel = panels.begin; panel < panels.end; ++panel, half = 1 - half) {
      const bool last = panel + 1 == panels.end;
      const Chunk following_panel = last ? ends ? Chunk{} : panel_of(next, panels.begin) : panel_of(chunk, panel + 1);
      BasisAhead basis(columns, following_panel, {}, room.panel[1 - half], width, slots);
      Beside<WeightAhead, BasisAhead> beside{weight, basis};
      for (Index row = 0; row < rows; row += Lanes::tile_rows) {
        const Index present = smaller(Lanes::tile_rows, rows - row);
        const std::uint32_t* one = drift + row * (along ? drift_step : 1);
        const FloatSink<Lanes> sink{room.slice + row * stride + panel * width, stride, chunk.depth0 > 0};
        if (present == Lanes::tile_rows) {
          tile<First, order, Lanes::tile_rows>(one, drift_step, room.panel[half], width, steps, sink, beside);
        } else {
          partial_tile<First, order, Lanes::tile_rows>(present, one, drift_step, room.panel[half], width, steps, sink);
        }
      }
      basis.finish();
    }
    weight.finish();
    packed = {next, 1 - packed.half};
    chunk = next;
  }
}

using FormSlice = void (*)(const Sides&, const ProjectLayout&, Share, Share, Share, const Room&, Packed&);

template <class First, class W, class B>
FormSlice form_slice_of(bool along, rpsft::Dtype basis) {
  // Pairs are made of bfloat16 bases alone.
  if constexpr (First::elements == 1)
    if (basis == rpsft::Dtype::float32)
      return along ? form_slice<First, W, B, float, Order::along> : form_slice<First, W, B, float, Order::across>;
  return along ? form_slice<First, W, B, Bfloat16, Order::along> : form_slice<First, W, B, Bfloat16, Order::across>;
}

template <class First, class W>
FormSlice form_slice_of(const Matrix& base, bool along, rpsft::Dtype basis) {
  if (!base.data) return form_slice_of<First, W, NoBase>(along, basis);
  switch (base.dtype) {
    case rpsft::Dtype::bfloat16:
      return form_slice_of<First, W, Bfloat16>(along, basis);
    case rpsft::Dtype::float16:
      return form_slice_of<First, W, Float16>(along, basis);
    default:
      return form_slice_of<First, W, float>(along, basis);
  }
}

template <class First>
FormSlice form_slice_of(const Projection& p, const Sides& sides) {
  // Rows that lie side by side are packed as they lie.
  const bool along = sides.view.depth_stride == 1 || sides.view.lane_stride != 1;
  const rpsft::Dtype basis = sides.longer->dtype;
  switch (p.weight.dtype) {
    case rpsft::Dtype::bfloat16:
      return form_slice_of<First, Bfloat16>(p.base, along, basis);
    case rpsft::Dtype::float16:
      return form_slice_of<First, Float16>(p.base, along, basis);
    default:
      return form_slice_of<First, float>(p.base, along, basis);
  }
}

// Neighbouring rows of T as pairs, in place: pair j takes the place of row 2 j.
template <class Second>
void pair_rows(float* slice, Index stride, Index rows, Share columns) {
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

// Adds a tile to C where it has not room for the whole panel.
template <class Second>
void fold_tile(Index present, Index lanes, const std::uint32_t* one, Index one_stride, const std::uint32_t* many,
               Index many_stride, Index steps, float* target, Index stride) {
  using Lanes = typename Second::Lanes;
  constexpr Index width = panel_width<Lanes>;
  if (lanes >= width) {
    partial_tile<Second, Order::across, Lanes::tile_rows>(present, one, one_stride, many, many_stride, steps,
                                                          FloatSink<Lanes>{target, stride, true});
    return;
  }
  float sums[Lanes::tile_rows * width];
  partial_tile<Second, Order::across, Lanes::tile_rows>(present, one, one_stride, many, many_stride, steps,
                                                        FloatSink<Lanes>{sums, width, false});
  for (Index r = 0; r < present; ++r)
    for (Index i = 0; i < lanes; ++i) target[r * stride + i] += sums[r * width + i];
}

// One block of T, as units that a tile reads.
struct Slice {
  Index row0, rows;
  const std::uint32_t* units;
};

// C += S^T T of the slices in order, for columns `shorts` of the shorter side's basis S and `longs` of T. `packed` has
// room for the columns of one slice at least, and for `room` units.
template <class Second, class SliceAt>
void fold_slices(const Sides& sides, const Packing<Second>& basis, const SliceAt& slice_at, Index slices, Share shorts,
                 Share longs, Index stride, std::uint32_t* packed, Index room, float* drift) {
  using Lanes = typename Second::Lanes;
  constexpr Index width = panel_width<Lanes>, tile_rows = Lanes::tile_rows;
  const Index rank = sides.rank, longs_end = smaller(longs.end, rank);
  const View columns = columns_of(*sides.shorter);
  const Index each = ceil_div(slice_at(0).rows, Second::elements) * fold_columns;
  // As many slices at a time as fit: their sums then meet in a tile of C that is near.
  const Index together = larger(1, room / larger(1, each));
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
          const std::uint32_t *basis_units = packed + (i - first) * each + s, *slice_units = slice.units + l;
          const Index steps = ceil_div(slice.rows, Second::elements), slice_step = stride * Second::elements;
          if (sides.wide) {
            fold_tile<Second>(smaller(tile_rows, present_shorts - s), rank - l, basis_units, fold_columns, slice_units,
                              slice_step, steps, drift + (s0 + s) * rank + l, rank);
          } else {
            fold_tile<Second>(smaller(tile_rows, longs_end - l), rank - s0 - s, slice_units, slice_step, basis_units,
                              fold_columns, steps, drift + l * rank + s0 + s, rank);
          }
        }
      };
      // What a tile loads as vectors stays, what it broadcasts changes.
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

// Subtracts B and sums the squares: rows in parallel, their sums in order.
inline void finish_drift(const Projection& p, Index rank, double* row_squares, rpsft::Team& team) {
  const Share rows = share_of(rank, team.rank(), team.size());
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
  const FormSlice form = form_slice_of<First>(p, sides);
  const Packing<Second> shorter = packing_of<Second>(*sides.shorter);
  const Index panels = ceil_div(sides.rank, width), members = team.size(), me = team.rank();
  const Share zeroed = share_of(sides.rank * sides.rank, me, members);
  for (Index i = zeroed.begin; i < zeroed.end; ++i) p.drift[i] = 0;

  const Index blocks = sides.long_size > 0 ? block_count(sides.short_size, layout.block_rows) : 0;
  const Index rows_each = blocks > 0 ? round_up(ceil_div(sides.short_size, blocks), 2) : 0;
  const auto slice_of = [&](Index slot) { return reinterpret_cast<float*>(workspace + slot * layout.per_thread); };
  std::uint32_t* own_drift = workspace + me * layout.per_thread + layout.slice;
  std::uint32_t* own_panel = own_drift + 2 * layout.drift;
  const Index fold_groups = smaller(members, panels), other_groups = panels ? members / fold_groups : 0;

  // The rows of the block that a thread works on in the round from block0 on. With fewer blocks left than threads,
  // several threads form one slice, each some of its columns.
  const auto rows_of = [&](Index block) {
    return Share{smaller(block * rows_each, sides.short_size), smaller((block + 1) * rows_each, sides.short_size)};
  };
  const auto slots_of = [&](Index block0) { return smaller(members, blocks - block0); };
  Packed packed;
  for (Index block0 = 0; block0 < blocks; block0 += members) {
    const Index slots = slots_of(block0), groups = members / slots;
    const Index slot = me % slots, group = me / slots;
    if (group < groups) {
      const Share mine = share_of(panels, group, groups), rows = rows_of(block0 + slot);
      if (mine.begin < mine.end && rows.begin < rows.end) {
        const Index next0 = block0 + members;
        const Share following = next0 < blocks ? rows_of(next0 + me % slots_of(next0)) : Share{0, 0};
        form(sides, layout, rows, following, mine,
             {slice_of(slot), {own_drift, own_drift + layout.drift}, {own_panel, own_panel + layout.panel}}, packed);
        pair_rows<Second>(slice_of(slot), layout.slice_stride, rows.end - rows.begin,
                          {mine.begin * width, mine.end * width});
      }
    }
    team.wait();
    if (panels && me / fold_groups < other_groups) {
      // Columns of T are divided first: half of them another thread has made.
      const Share longs = share_of(panels, me % fold_groups, fold_groups);
      const Share shorts = share_of(panels, me / fold_groups, other_groups);
      const auto slice_at = [&](Index s) {
        const Share rows = rows_of(block0 + s);
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
