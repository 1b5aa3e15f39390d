// project_drift on one instruction set: blocks of the shorter side in parallel, folded into C in their order.
//
// A round takes one block of the shorter side per thread. Each thread forms T = (W - W0) V of its block (for a tall
// weight: of its transpose, with U) in its own slice of the workspace; then all threads together fold the round's
// slices into C, each its own columns. Every element of C is therefore the same sum in the same order for any
// number of threads, and no thread needs a C of its own.
#pragma once

#include "../team.hpp"
#include "kernels.hpp"
#include "tile.hpp"

namespace {

using rpsft::Matrix;
using rpsft::Projection;

constexpr Index block_rows = 192;   // of the shorter side, at most; a multiple of every tile's rows, and even
constexpr Index chunk_units = 192;  // of the longer side: a packed panel of a basis then fits the first-level cache
constexpr Index fold_columns = 96;  // of a basis packed at a time
constexpr Index drift_stride = chunk_units + 16;
// Beyond the padded rank, so that rows do not all fall into one set of a cache.
constexpr Index slice_padding = 16;

struct ProjectLayout {
  Index slice, drift, panel, per_thread;

  template <class Lanes>
  static ProjectLayout of(Index rank) {
    ProjectLayout layout;
    layout.slice = block_rows * slice_stride<Lanes>(rank);
    layout.drift = block_rows * drift_stride;  // the other order takes less
    layout.panel = larger(chunk_units * panel_width<Lanes>, block_rows * fold_columns);
    layout.per_thread = layout.slice + layout.drift + layout.panel;
    return layout;
  }

  template <class Lanes>
  static Index slice_stride(Index rank) {
    return round_up(rank, panel_width<Lanes>) + slice_padding;
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

// Blocks of a shorter side: enough for a few threads where it is short, and a multiple of eight where it is long, so
// that the last round is full for the usual numbers of threads. It must not depend on their number: C is summed block
// by block.
inline Index block_count(Index size) {
  const Index least = ceil_div(size, block_rows);
  return least > 8 ? round_up(least, 8) : smaller(8, ceil_div(size, 64));
}

inline View columns_of(const Matrix& basis) { return {basis.data, basis.col_stride, basis.row_stride}; }

struct Share {
  Index begin, end;
};

// Part `part` of `parts` nearly equal parts of [0, size).
inline Share share_of(Index size, Index part, Index parts) { return {size * part / parts, size * (part + 1) / parts}; }

// One thread's block of T: lanes are rows of the block, columns the panels [panels.begin, panels.end). `following` are
// the rows of the block after it.
template <class First>
void form_slice(const Sides& sides, const Packing<First>& weight, const Packing<First>& basis, Index row0, Index rows,
                Share following, Share panels, float* slice, std::uint32_t* drift, std::uint32_t* packed) {
  using Lanes = typename First::Lanes;
  constexpr Index width = panel_width<Lanes>, chunk = chunk_units * First::elements;
  const Index stride = ProjectLayout::slice_stride<Lanes>(sides.rank);
  const View columns = columns_of(*sides.longer);
  // Rows that lie side by side are packed as they lie.
  const bool along = sides.view.depth_stride == 1 || sides.view.lane_stride != 1;
  for (Index depth0 = 0; depth0 < sides.long_size; depth0 += chunk) {
    const Index depth = smaller(chunk, sides.long_size - depth0), steps = ceil_div(depth, First::elements);
    if (along) {
      weight.along(sides.view, row0, rows, depth0, depth, drift, drift_stride);
    } else {
      weight.across(sides.view, row0, rows, rows, depth0, depth, drift, block_rows);
    }
    // The next chunk, or the next block's first, is on its way while this one is multiplied: a few lines per tile.
    const bool last = depth0 + depth == sides.long_size;
    const Index next_row = last ? following.begin : row0, next_rows = last ? following.end - following.begin : rows;
    const Index next = last ? 0 : depth0 + depth, next_depth = smaller(chunk, sides.long_size - next);
    const Index lines = next_rows > 0 ? (along ? next_rows : next_depth) : 0;
    const Index lines_each = ceil_div(lines, (panels.end - panels.begin) * ceil_div(rows, Lanes::tile_rows));
    Index asked = 0;
    for (Index panel = panels.begin; panel < panels.end; ++panel) {
      const Index column = panel * width;
      basis.across(columns, column, smaller(width, sides.rank - column), width, depth0, depth, packed, width);
      for (Index row = 0; row < rows; row += Lanes::tile_rows) {
        const Index present = smaller(Lanes::tile_rows, rows - row);
        weight.prefetch(sides.view, along, next_row, next_rows, next, next_depth, asked,
                        smaller(lines, asked + lines_each));
        asked = smaller(lines, asked + lines_each);
        const FloatSink<Lanes> sink{slice + row * stride + column, stride, depth0 > 0};
        if (along) {
          partial_tile<First, Order::along, Lanes::tile_rows>(present, drift + row * drift_stride, drift_stride, packed,
                                                              width, steps, sink);
        } else {
          partial_tile<First, Order::across, Lanes::tile_rows>(present, drift + row, block_rows, packed, width, steps,
                                                               sink);
        }
      }
    }
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

// C += S^T T of one block, for columns `shorts` of the shorter side's basis S and `longs` of T.
template <class Second>
void fold_slice(const Sides& sides, const Packing<Second>& basis, Index row0, Index rows, Share shorts, Share longs,
                const float* slice, std::uint32_t* packed, float* drift) {
  using Lanes = typename Second::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const Index stride = ProjectLayout::slice_stride<Lanes>(sides.rank), rank = sides.rank;
  const Index slice_step = stride * Second::elements, steps = ceil_div(rows, Second::elements);
  const std::uint32_t* units = reinterpret_cast<const std::uint32_t*>(slice);
  const View columns = columns_of(*sides.shorter);
  for (Index s0 = shorts.begin; s0 < shorts.end; s0 += fold_columns) {
    const Index some = smaller(fold_columns, shorts.end - s0);
    basis.across(columns, s0, smaller(some, rank - s0), round_up(some, width), row0, rows, packed, fold_columns);
    const Index present_shorts = smaller(some, rank - s0), longs_end = smaller(longs.end, rank);
    if (sides.wide) {
      for (Index l = longs.begin; l < longs_end; l += width)
        for (Index s = 0; s < present_shorts; s += Lanes::tile_rows)
          fold_tile<Second>(smaller(Lanes::tile_rows, present_shorts - s), rank - l, packed + s, fold_columns,
                            units + l, slice_step, steps, drift + (s0 + s) * rank + l, rank);
    } else {
      for (Index s = 0; s < present_shorts; s += width)
        for (Index l = longs.begin; l < longs_end; l += Lanes::tile_rows)
          fold_tile<Second>(smaller(Lanes::tile_rows, longs_end - l), rank - s0 - s, units + l, slice_step, packed + s,
                            fold_columns, steps, drift + l * rank + s0 + s, rank);
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
  const ProjectLayout layout = ProjectLayout::of<Lanes>(sides.rank);
  const Packing<First> weight = packing_of<First>(p.weight, p.base), longer = packing_of<First>(*sides.longer);
  const Packing<Second> shorter = packing_of<Second>(*sides.shorter);
  const Index panels = ceil_div(sides.rank, width), members = team.size(), me = team.rank();
  const Share zeroed = share_of(sides.rank * sides.rank, me, members);
  for (Index i = zeroed.begin; i < zeroed.end; ++i) p.drift[i] = 0;

  const Index blocks = sides.long_size > 0 ? block_count(sides.short_size) : 0;
  const Index rows_each = blocks > 0 ? round_up(ceil_div(sides.short_size, blocks), 2) : 0;
  const auto slice_of = [&](Index slot) { return reinterpret_cast<float*>(workspace + slot * layout.per_thread); };
  std::uint32_t* own_drift = workspace + me * layout.per_thread + layout.slice;
  std::uint32_t* own_panel = own_drift + layout.drift;
  const Index fold_groups = smaller(members, panels), other_groups = panels ? members / fold_groups : 0;

  for (Index block0 = 0; block0 < blocks; block0 += members) {
    // With fewer blocks left than threads, several threads form one slice, each some of its columns.
    const Index slots = smaller(members, blocks - block0), groups = members / slots;
    const Index slot = me % slots, group = me / slots;
    const auto first_row = [&](Index s) { return smaller((block0 + s) * rows_each, sides.short_size); };
    if (group < groups) {
      const Share mine = share_of(panels, group, groups);
      const Index row0 = first_row(slot), rows = first_row(slot + 1) - row0;
      if (mine.begin < mine.end && rows > 0) {
        form_slice<First>(sides, weight, longer, row0, rows,
                          {first_row(slot + members), first_row(slot + members + 1)}, mine, slice_of(slot), own_drift,
                          own_panel);
        pair_rows<Second>(slice_of(slot), ProjectLayout::slice_stride<Lanes>(sides.rank), rows,
                          {mine.begin * width, mine.end * width});
      }
    }
    team.wait();
    if (panels && me / fold_groups < other_groups) {
      const Share shorts = share_of(panels, me % fold_groups, fold_groups);
      const Share longs = share_of(panels, me / fold_groups, other_groups);
      for (Index s = 0; s < slots; ++s) {
        const Index row0 = first_row(s), rows = first_row(s + 1) - row0;
        if (rows > 0)
          fold_slice<Second>(sides, shorter, row0, rows, {shorts.begin * width, shorts.end * width},
                             {longs.begin * width, longs.end * width}, slice_of(s), own_panel, p.drift);
      }
    }
    team.wait();
  }
  team.wait();
  finish_drift(p, sides.rank, row_squares, team);
  team.wait();
}

}  // namespace
