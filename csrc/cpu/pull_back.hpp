// pull_back on one instruction set: computes P = scale * S C for a block of the shorter side, then the block's
// gradient.
//
// The lanes of a tile are columns of the gradient. The basis of that side is packed and transposed panel by panel. The
// rows of the other operand are read in place where possible.
#pragma once

#include "cpu/microkernel.hpp"
#include "cpu/range.hpp"
#include "cpu/threads.hpp"

namespace {

using rpsft::Pullback;

// Sizes of the workspace in 32-bit words. `rows` of the shorter side are computed at a time, and share every packed
// panel.
struct PullBackLayout {
  Index rows, product_stride, product, panel, row, per_thread;

  template <class Word>
  static PullBackLayout of(Index rank) {
    using Lanes = typename Word::Lanes;
    PullBackLayout layout;
    layout.product_stride = round_up(rank, panel_width<Lanes>) / Word::elements + stride_padding;
    // At small ranks packing a panel costs as much as many rows of products, so blocks are larger. At large ranks C
    // needs some of the cache as well.
    const Index product_words = layout.product_stride <= 144 ? 80 << 10 : 56 << 10;
    // 24 is a multiple of the tile_rows of every instruction set.
    layout.rows = larger(192, product_words / layout.product_stride / 24 * 24);
    layout.product = layout.rows * layout.product_stride;
    layout.panel = ceil_div(rank, Word::elements) * panel_width<Lanes>;
    layout.row = Lanes::tile_rows * ceil_div(rank, Word::elements);
    layout.per_thread = layout.panel + layout.row;
    return layout;
  }
};

// Rows of a basis as words to broadcast: read in place where the basis already has that layout, else packed.
template <class Word>
struct BasisRows {
  const Matrix& basis;
  PackPlan<Word> plan;
  std::uint32_t* scratch;
  bool direct;

  BasisRows(const Matrix& matrix, std::uint32_t* buffer)
      : basis(matrix), plan(plan_pack<Word>(matrix)), scratch(buffer) {
    const bool same = Word::elements == 2
                          ? matrix.dtype == rpsft::Dtype::bfloat16 && matrix.cols % 2 == 0 && matrix.row_stride % 2 == 0
                          : matrix.dtype == rpsft::Dtype::float32;
    direct = same && matrix.col_stride == 1 && reinterpret_cast<std::uintptr_t>(matrix.data) % 4 == 0;
  }

  Index stride() const { return direct ? basis.row_stride / Word::elements : ceil_div(basis.cols, Word::elements); }

  const std::uint32_t* at(Index row, Index count) const {
    if (direct) return static_cast<const std::uint32_t*>(basis.data) + row * stride();
    const View view{basis.data, basis.row_stride, basis.col_stride};
    plan.along(view, row, count, 0, basis.cols, scratch, stride());
    return scratch;
  }
};

// Writes scaled sums to a row of packed words.
template <class Word>
struct ProductSink {
  using Lanes = typename Word::Lanes;
  std::uint32_t* target;
  Index stride;
  typename Lanes::Vector scale;

  void put(int row, int lane, typename Lanes::Vector sum) const {
    Word::along(Lanes::multiply(sum, scale), target + row * stride + lane / Word::elements);
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

// The gradient, transposed if its columns are contiguous, so that columns are its contiguous dimension.
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

// Computes the gradient's `rows` and `cols`, panel by panel. `words_of(row, count)` returns the words of `count` rows
// to broadcast, `pack(col, count)` those of a panel of columns.
template <class Word, class G, bool accumulate, class WordsOf, class Pack>
void pull_back_panels(const Target& target, Range rows, Range cols, Index steps, Index row_stride,
                      const WordsOf& words_of, const Pack& pack) {
  using Lanes = typename Word::Lanes;
  constexpr Index width = panel_width<Lanes>, tile_rows = Lanes::tile_rows;
  const Index stride = target.grad.row_stride;
  for (Index col = cols.begin; col < cols.end; col += width) {
    const Index lanes = smaller(width, cols.end - col);
    const std::uint32_t* packed = pack(col, lanes);
    for (Index row = rows.begin; row < rows.end; row += tile_rows) {
      const Index present = smaller(tile_rows, rows.end - row);
      const std::uint32_t* words = words_of(row, present);
      const bool whole = lanes == width && present == tile_rows && target.grad.col_stride == 1 &&
                         target.holds(row, col) && target.holds(row + present - 1, col + lanes - 1);
      if (whole) {
        G* at = static_cast<G*>(target.grad.data) + row * stride + col;
        for (Index r = 0; r < tile_rows; ++r) {
          __builtin_prefetch(at + r * stride, 1);
          __builtin_prefetch(at + r * stride + width - 1, 1);
        }
        multiply_tile<Word, Order::along, Lanes::tile_rows>(words, row_stride, packed, width, steps,
                                                            GradientSink<Lanes, G, accumulate>{at, stride});
        continue;
      }
      float sums[tile_rows * width];
      multiply_partial_tile<Word, Order::along, Lanes::tile_rows>(present, words, row_stride, packed, width, steps,
                                                                  FloatSink<Lanes>{sums, width, false});
      for (Index r = 0; r < present; ++r)
        for (Index i = 0; i < lanes; ++i) put_element<G, accumulate>(target, row + r, col + i, sums[r * width + i]);
    }
  }
}

// P = scale * S C for `rows` of the block that begins at row0 of the basis S, and `panels` of C's columns.
template <class Word>
void compute_product(const Matrix& basis, const View& drift, PackTransposed transposed, PackAcross across, Index rank,
                     float scale, Range rows, Range panels, Index row0, std::uint32_t* product, Index stride,
                     std::uint32_t* packed, std::uint32_t* row_scratch) {
  using Lanes = typename Word::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const BasisRows<Word> source(basis, row_scratch);
  const Index steps = ceil_div(rank, Word::elements);
  for (Index panel = panels.begin; panel < panels.end; ++panel) {
    const Index column = panel * width, lanes = smaller(width, rank - column);
    if (drift.lane_stride == 1) {
      across(drift, column, lanes, width, 0, rank, packed, width);
    } else {
      transposed(drift, column, lanes, width, rank, packed, width);
    }
    for (Index row = rows.begin; row < rows.end; row += Lanes::tile_rows) {
      const Index present = smaller(Lanes::tile_rows, rows.end - row);
      const ProductSink<Word> sink{product + row * stride + column / Word::elements, stride, Lanes::broadcast(scale)};
      multiply_partial_tile<Word, Order::along, Lanes::tile_rows>(present, source.at(row0 + row, present),
                                                                  source.stride(), packed, width, steps, sink);
    }
  }
}

template <class Word, class G, bool accumulate>
void pull_back_one(const Pullback& p, std::uint32_t* workspace, rpsft::Team& team) {
  using Lanes = typename Word::Lanes;
  constexpr Index width = panel_width<Lanes>;
  const Target target(p);
  const Matrix& row_basis = target.transposed ? p.right : p.left;
  const Matrix& col_basis = target.transposed ? p.left : p.right;
  const Index rank = p.left.cols, steps = ceil_div(rank, Word::elements);
  const bool wide = target.grad.rows <= target.grad.cols;
  const Matrix& shorter = wide ? row_basis : col_basis;
  // C with the shorter side's index as depth.
  const bool straight = &shorter == &p.left;
  const View drift{p.drift, straight ? 1 : rank, straight ? rank : 1};
  const Matrix drift_matrix{const_cast<float*>(p.drift)};
  const PackAcross across = plan_pack<Word>(drift_matrix).across;
  const PackTransposed transposed = plan_pack_transposed<Word>(rpsft::Dtype::float32);

  const PullBackLayout layout = PullBackLayout::of<Word>(rank);
  std::uint32_t* product = workspace;
  std::uint32_t* packed = workspace + layout.product + team.rank() * layout.per_thread;
  std::uint32_t* row_scratch = packed + layout.panel;
  const Index stride = layout.product_stride, panels = ceil_div(rank, width), members = team.size(), me = team.rank();
  const Index groups = smaller(members, larger(panels, 1)), row_groups = members / groups;
  const BasisRows<Word> long_rows(row_basis, row_scratch);
  const PackTransposed pack_basis = plan_pack_transposed<Word>(col_basis.dtype);
  const auto product_row = [&](Index row) { return product + row * stride; };

  // Blocks of about equal size.
  const Index parts = larger(1, ceil_div(shorter.rows, layout.rows));
  const Index rows_each = smaller(layout.rows, round_up(ceil_div(shorter.rows, parts), Lanes::tile_rows));
  for (Index row0 = 0; row0 < shorter.rows; row0 += rows_each) {
    const Index rows = smaller(rows_each, shorter.rows - row0);
    if (me / groups < row_groups) {
      const Range some = split_range(ceil_div(rows, Lanes::tile_rows), me / groups, row_groups);
      compute_product<Word>(shorter, drift, transposed, across, rank, p.scale,
                            {some.begin * Lanes::tile_rows, smaller(rows, some.end * Lanes::tile_rows)},
                            split_range(panels, me % groups, groups), row0, product, stride, packed, row_scratch);
    }
    team.wait();
    if (wide) {
      const Range mine = split_range(ceil_div(target.grad.cols, width), me, members);
      pull_back_panels<Word, G, accumulate>(
          target, {row0, row0 + rows}, {mine.begin * width, smaller(target.grad.cols, mine.end * width)}, steps, stride,
          [&](Index row, Index) { return product_row(row - row0); },
          [&](Index col, Index lanes) {
            pack_basis({col_basis.data, col_basis.row_stride, col_basis.col_stride}, col, lanes, width, rank, packed,
                       width);
            return packed;
          });
    } else {
      const Range mine = split_range(ceil_div(target.grad.rows, Lanes::tile_rows), me, members);
      const Range tall{mine.begin * Lanes::tile_rows, smaller(target.grad.rows, mine.end * Lanes::tile_rows)};
      pull_back_panels<Word, G, accumulate>(
          target, tall, {row0, row0 + rows}, steps, long_rows.stride(),
          [&](Index row, Index count) { return long_rows.at(row, count); },
          [&](Index col, Index lanes) {
            // P is in packed words already. Transposing them as float32 moves the bits unchanged.
            pack_transposed<Float32Word<Lanes>, float>({product_row(col - row0), stride, 1}, 0, lanes, width, steps,
                                                       packed, width);
            return packed;
          });
    }
    team.wait();
  }
}

template <class Word, class G>
void pull_back_one(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (accumulate) {
    pull_back_one<Word, G, true>(p, workspace, team);
  } else {
    pull_back_one<Word, G, false>(p, workspace, team);
  }
}

template <class Word>
void pull_back_into(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  switch (p.grad.dtype) {
    case rpsft::Dtype::bfloat16:
      return pull_back_one<Word, Bfloat16>(p, accumulate, workspace, team);
    case rpsft::Dtype::float16:
      return pull_back_one<Word, Float16>(p, accumulate, workspace, team);
    default:
      return pull_back_one<Word, float>(p, accumulate, workspace, team);
  }
}

}  // namespace
