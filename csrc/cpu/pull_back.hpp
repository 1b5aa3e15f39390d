// pull_back on one instruction set: P = scale * S C for a block of the shorter side, then the block's gradient.
//
// The lanes of a tile are columns of the gradient. The side that they belong to is packed, transposed, panel by
// panel; the rows of the other side are read as they lie.
#pragma once

#include "cpu/project.hpp"

namespace {

using rpsft::Pullback;

// `rows` of the shorter side are worked on at a time: a packed panel is used for all of them.
struct PullLayout {
  Index rows, product_stride, product, panel, row, per_thread;

  template <class Unit>
  static PullLayout of(Index rank) {
    using Lanes = typename Unit::Lanes;
    PullLayout layout;
    layout.product_stride = round_up(rank, panel_width<Lanes>) / Unit::elements + padding;
    // At small ranks packing a panel costs as much as many rows' products; at large ones a C takes room beside it.
    const Index room = layout.product_stride <= 144 ? 80 << 10 : 56 << 10;
    // A multiple of every tile's rows.
    layout.rows = larger(192, room / layout.product_stride / 24 * 24);
    layout.product = layout.rows * layout.product_stride;
    layout.panel = ceil_div(rank, Unit::elements) * panel_width<Lanes>;
    layout.row = Lanes::tile_rows * ceil_div(rank, Unit::elements);
    layout.per_thread = layout.panel + layout.row;
    return layout;
  }
};

// Rows of a basis as units, for a tile to broadcast: as they lie where they are such already, else copied.
template <class Unit>
struct Rows {
  const Matrix& basis;
  Packing<Unit> packing;
  std::uint32_t* scratch;
  bool direct;

  Rows(const Matrix& matrix, std::uint32_t* room)
      : basis(matrix), packing(packing_of<Unit>(matrix)), scratch(room) {
    const bool same = Unit::elements == 2 ? matrix.dtype == rpsft::Dtype::bfloat16 && matrix.cols % 2 == 0 &&
                                                matrix.row_stride % 2 == 0
                                          : matrix.dtype == rpsft::Dtype::float32;
    direct = same && matrix.col_stride == 1 && reinterpret_cast<std::uintptr_t>(matrix.data) % 4 == 0;
  }

  Index stride() const { return direct ? basis.row_stride / Unit::elements : ceil_div(basis.cols, Unit::elements); }

  const std::uint32_t* at(Index row, Index count) const {
    if (direct) return static_cast<const std::uint32_t*>(basis.data) + row * stride();
    const View view{basis.data, basis.row_stride, basis.col_stride};
    packing.along(view, row, count, 0, basis.cols, scratch, stride());
    return scratch;
  }
};

// Scaled sums as units of a row.
template <class Unit>
struct ProductSink {
  using Lanes = typename Unit::Lanes;
  std::uint32_t* target;
  Index stride;
  typename Lanes::Vector scale;

  void put(int row, int lane, typename Lanes::Vector sum) const {
    Unit::along(Lanes::multiply(sum, scale), target + row * stride + lane / Unit::elements);
  }
};

template <class Lanes, class G, bool accumulate>
struct GradientSink {
  G* target;
  Index stride;

  void put(int row, int lane, typename Lanes::Vector sum) const {
    G* at = target + row * stride + lane;
    if constexpr (accumulate) sum = Lanes::add(sum, Lanes::load(at));
    Lanes::store(at, sum);
  }
};

// The gradient with its longer run of neighbours as columns.
struct Target {
  Matrix grad;
  Index flat_row, flat_col, begin, end;
  bool transposed;

  explicit Target(const Pullback& p)
      : grad(p.grad),
        flat_row(p.grad.cols),
        flat_col(1),
        begin(p.cut.head),
        end(p.grad.rows * p.grad.cols - p.cut.tail),
        transposed(p.grad.col_stride != 1 && p.grad.row_stride == 1) {
    if (transposed) {
      grad.rows = p.grad.cols;
      grad.cols = p.grad.rows;
      grad.row_stride = p.grad.col_stride;
      grad.col_stride = p.grad.row_stride;
      flat_row = 1;
      flat_col = p.grad.cols;
    }
  }

  bool holds(Index row, Index col) const {
    const Index flat = row * flat_row + col * flat_col;
    return begin <= flat && flat < end;
  }
};

template <class G, bool accumulate>
inline void put_element(const Target& target, Index row, Index col, float value) {
  if (!target.holds(row, col)) return;
  G& at = static_cast<G*>(target.grad.data)[row * target.grad.row_stride + col * target.grad.col_stride];
  narrow(accumulate ? value + widen(at) : value, at);
}

// Panels of gradient columns [cols.begin, cols.end), rows [rows.begin, rows.end). `one(row, count)` gives the units
// of a row, `pack(col, count)` those of a panel.
template <class Unit, class G, bool accumulate, class One, class Pack>
void pull_panels(const Target& target, Share rows, Share cols, Index steps, Index one_stride, const One& one,
                 const Pack& pack) {
  using Lanes = typename Unit::Lanes;
  constexpr Index width = panel_width<Lanes>, tile_rows = Lanes::tile_rows;
  const Index stride = target.grad.row_stride;
  for (Index col = cols.begin; col < cols.end; col += width) {
    const Index lanes = smaller(width, cols.end - col);
    const std::uint32_t* packed = pack(col, lanes);
    for (Index row = rows.begin; row < rows.end; row += tile_rows) {
      const Index present = smaller(tile_rows, rows.end - row);
      const std::uint32_t* units = one(row, present);
      const bool whole = lanes == width && present == tile_rows && target.grad.col_stride == 1 &&
                         target.holds(row, col) && target.holds(row + present - 1, col + lanes - 1);
      if (whole) {
        G* at = static_cast<G*>(target.grad.data) + row * stride + col;
        for (Index r = 0; r < tile_rows; ++r) {
          __builtin_prefetch(at + r * stride, 1);
          __builtin_prefetch(at + r * stride + width - 1, 1);
        }
        tile<Unit, Order::along, Lanes::tile_rows>(units, one_stride, packed, width, steps,
                                                   GradientSink<Lanes, G, accumulate>{at, stride});
        continue;
      }
      float sums[tile_rows * width];
      partial_tile<Unit, Order::along, Lanes::tile_rows>(present, units, one_stride, packed, width, steps,
                                                         FloatSink<Lanes>{sums, width, false});
      for (Index r = 0; r < present; ++r)
        for (Index i = 0; i < lanes; ++i)
          put_element<G, accumulate>(target, row + r, col + i, sums[r * width + i]);
    }
  }
}

template <class Unit>
void form_product(const Matrix& basis, const View& drift, PackTransposed transposed, PackAcross across, Index rank,
                  float scale, Share rows, Share panels, Index row0, std::uint32_t* product, Index stride,
                  std::uint32_t* packed, std::uint32_t* row_scratch) {
  using Lanes = typename Unit::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const Rows<Unit> source(basis, row_scratch);
  const Index steps = ceil_div(rank, Unit::elements);
  for (Index panel = panels.begin; panel < panels.end; ++panel) {
    const Index column = panel * width, lanes = smaller(width, rank - column);
    if (drift.lane_stride == 1) {
      across(drift, column, lanes, width, 0, rank, packed, width);
    } else {
      transposed(drift, column, lanes, width, rank, packed, width);
    }
    for (Index row = rows.begin; row < rows.end; row += Lanes::tile_rows) {
      const Index present = smaller(Lanes::tile_rows, rows.end - row);
      const ProductSink<Unit> sink{product + row * stride + column / Unit::elements, stride, Lanes::broadcast(scale)};
      partial_tile<Unit, Order::along, Lanes::tile_rows>(present, source.at(row0 + row, present), source.stride(),
                                                         packed, width, steps, sink);
    }
  }
}

template <class Unit, class G, bool accumulate>
void pull_one(const Pullback& p, std::uint32_t* workspace, rpsft::Team& team) {
  using Lanes = typename Unit::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const Target target(p);
  const Matrix& row_basis = target.transposed ? p.right : p.left;
  const Matrix& col_basis = target.transposed ? p.left : p.right;
  const Index rank = p.left.cols, steps = ceil_div(rank, Unit::elements);
  const bool wide = target.grad.rows <= target.grad.cols;
  const Matrix& shorter = wide ? row_basis : col_basis;
  // C with the shorter side's index as depth.
  const bool straight = &shorter == &p.left;
  const View drift{p.drift, straight ? 1 : rank, straight ? rank : 1};
  const Matrix drift_matrix{const_cast<float*>(p.drift)};
  const PackAcross across = packing_of<Unit>(drift_matrix).across;
  const PackTransposed transposed = transposing_of<Unit>(rpsft::Dtype::float32);

  const PullLayout layout = PullLayout::of<Unit>(rank);
  std::uint32_t* product = workspace;
  std::uint32_t* packed = workspace + layout.product + team.rank() * layout.per_thread;
  std::uint32_t* row_scratch = packed + layout.panel;
  const Index stride = layout.product_stride, panels = ceil_div(rank, width), members = team.size(), me = team.rank();
  const Index groups = smaller(members, larger(panels, 1)), row_groups = members / groups;
  const Rows<Unit> long_rows(row_basis, row_scratch);
  const PackTransposed pack_basis = transposing_of<Unit>(col_basis.dtype);
  const auto product_row = [&](Index row) { return product + row * stride; };

  // In about equal parts.
  const Index parts = larger(1, ceil_div(shorter.rows, layout.rows));
  const Index rows_each = smaller(layout.rows, round_up(ceil_div(shorter.rows, parts), Lanes::tile_rows));
  for (Index row0 = 0; row0 < shorter.rows; row0 += rows_each) {
    const Index rows = smaller(rows_each, shorter.rows - row0);
    if (me / groups < row_groups) {
      const Share some = share_of(ceil_div(rows, Lanes::tile_rows), me / groups, row_groups);
      form_product<Unit>(shorter, drift, transposed, across, rank, p.scale,
                         {some.begin * Lanes::tile_rows, smaller(rows, some.end * Lanes::tile_rows)},
                         share_of(panels, me % groups, groups), row0, product, stride, packed, row_scratch);
    }
    team.wait();
    if (wide) {
      const Share mine = share_of(ceil_div(target.grad.cols, width), me, members);
      pull_panels<Unit, G, accumulate>(
          target, {row0, row0 + rows}, {mine.begin * width, smaller(target.grad.cols, mine.end * width)}, steps, stride,
          [&](Index row, Index) { return product_row(row - row0); },
          [&](Index col, Index lanes) {
            pack_basis({col_basis.data, col_basis.row_stride, col_basis.col_stride}, col, lanes, width, rank, packed,
                       width);
            return packed;
          });
    } else {
      const Share mine = share_of(ceil_div(target.grad.rows, Lanes::tile_rows), me, members);
      const Share tall{mine.begin * Lanes::tile_rows, smaller(target.grad.rows, mine.end * Lanes::tile_rows)};
      pull_panels<Unit, G, accumulate>(
          target, tall, {row0, row0 + rows}, steps, long_rows.stride(),
          [&](Index row, Index count) { return long_rows.at(row, count); },
          [&](Index col, Index lanes) {
            // The product's units are packed already: as float32 numbers they are only moved.
            pack_transposed<Single<Lanes>, float>({product_row(col - row0), stride, 1}, 0, lanes, width, steps, packed,
                                                  width);
            return packed;
          });
    }
    team.wait();
  }
}

template <class Unit, class G>
void pull_one(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (accumulate) {
    pull_one<Unit, G, true>(p, workspace, team);
  } else {
    pull_one<Unit, G, false>(p, workspace, team);
  }
}

template <class Unit>
void pull_into(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  switch (p.grad.dtype) {
    case rpsft::Dtype::bfloat16:
      return pull_one<Unit, Bfloat16>(p, accumulate, workspace, team);
    case rpsft::Dtype::float16:
      return pull_one<Unit, Float16>(p, accumulate, workspace, team);
    default:
      return pull_one<Unit, float>(p, accumulate, workspace, team);
  }
}

}  // namespace
