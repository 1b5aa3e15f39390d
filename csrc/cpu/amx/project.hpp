// project_drift with matrix units. Blocks and rounds are those of cpu/project.hpp; blocks and chunks have other sizes,
// and T is multiplied by tiles in both products.
#pragma once

#include "cpu/amx/pack_tiles.hpp"
#include "cpu/project.hpp"

namespace {

// As ProjectLayout. The numbers are from the arithmetic in docs/cpu_engine.md and were never measured.
struct TileLayout {
  Index block_rows, chunk_depth, slice_stride;
  Index slice, drift, panel, panels, per_thread;

  // Columns of the shorter basis that are packed at a time for the second product.
  static constexpr Index fold_lanes = 4 * block_lanes;

  static TileLayout of(Index rank, Index long_size) {
    constexpr Index near_bytes = 1 << 20, slice_words = 104 << 10;
    TileLayout layout;
    layout.slice_stride = round_up(rank, block_lanes) + stride_padding;
    // The longer basis is read and packed once per block. Blocks are large where it does not stay in a core's own cache.
    const Index most = 2 * long_size * rank > near_bytes ? 256 : 128;
    layout.block_rows = most;
    while (layout.block_rows > 64 && layout.block_rows * layout.slice_stride > slice_words) layout.block_rows /= 2;
    layout.chunk_depth = 10 * tile_depth;
    layout.slice = layout.block_rows * layout.slice_stride;
    layout.drift = layout.block_rows * layout.chunk_depth / 2;
    layout.panel = block_lanes * layout.chunk_depth / 2;
    layout.panels = larger(2 * layout.panel, layout.block_rows / 2 * fold_lanes);
    layout.per_thread = layout.slice + 2 * layout.drift + layout.panels;
    return layout;
  }
};

// Computes one thread's part of T, as compute_slice of cpu/project.hpp does: the rows `block`, padded with rows of zeros
// to whole strips, and the columns of `panels`. Packing overlaps the products that precede it.
template <class Unit>
void compute_tiled_slice(const Source& weight, const Source& basis, Index long_size, Index rank,
                         const TileLayout& layout, Range block, Range following, Range panels, const Scratch& scratch,
                         PackedChunk& packed) {
  const Index stride = layout.slice_stride, strips = ceil_div(block.end - block.begin, block_lanes);
  const Index depth_each =
      round_up(ceil_div(long_size, ceil_div(long_size, layout.chunk_depth)), tile_depth);
  const auto chunk_at = [&](Range of, Index depth0) {
    const Index lanes = of.end - of.begin;
    return Chunk{of.begin, lanes, lanes, depth0, smaller(depth_each, long_size - depth0)};
  };
  const auto after = [&](const Chunk& chunk) {
    const Index end = chunk.depth0 + chunk.depth;
    if (end < long_size) return chunk_at(chunk.lane0 == block.begin ? block : following, end);
    return chunk.lane0 == block.begin ? chunk_at(following, 0) : Chunk{};
  };
  const auto panel_of = [&](const Chunk& chunk, Index panel) {
    const Index column = panel * block_lanes;
    return Chunk{column, smaller(block_lanes, rank - column), block_lanes, chunk.depth0,
                 chunk.empty() ? 0 : chunk.depth};
  };
  Chunk chunk = chunk_at(block, 0);
  if (!(packed.chunk == chunk)) pack_strips(weight, chunk, scratch.drift[packed.half]);
  int half = 0;
  pack_strips(basis, panel_of(chunk, panels.begin), scratch.panel[half]);
  while (chunk.lane0 == block.begin && !chunk.empty()) {
    const Chunk next = after(chunk), later = next.empty() ? next : after(next);
    const bool ends = next.empty() || next.lane0 != block.begin;
    const Index steps = tile_steps(chunk.depth), slots = strips * steps;
    const std::uint32_t* drift = scratch.drift[packed.half];
    TilePacker next_weight(weight, next, later, scratch.drift[1 - packed.half], (panels.end - panels.begin) * slots);
    for (Index panel = panels.begin; panel < panels.end; ++panel, half = 1 - half) {
      const bool last = panel + 1 == panels.end;
      const Chunk following_panel = last ? ends ? Chunk{} : panel_of(next, panels.begin) : panel_of(chunk, panel + 1);
      TilePacker next_basis(basis, following_panel, {}, scratch.panel[1 - half], slots);
      Overlapped<TilePacker, TilePacker> overlapped{next_weight, next_basis};
      for (Index strip = 0; strip < strips; ++strip) {
        const Strip rows = packed_strip(drift + strip * steps * step_words), columns = packed_strip(scratch.panel[half]);
        const Block sums{scratch.slice + strip * block_lanes * stride + panel * block_lanes, stride};
        if (chunk.depth0 > 0) {
          multiply_tiles<Unit, true>(rows, columns, steps, sums, overlapped);
        } else {
          multiply_tiles<Unit, false>(rows, columns, steps, sums, overlapped);
        }
      }
      next_basis.finish();
    }
    next_weight.finish();
    packed = {next, 1 - packed.half};
    chunk = next;
  }
}

// Rounds T to tiles of pairs in place: every 32 rows by 16 columns become a tile in the first 16 of these rows. As rows
// of the second product's left side its words are [column of T][pair], as its right side [pair][column of T].
template <class Word>
void tile_slice(float* slice, Index stride, Index rows, Range columns, Side side) {
  using Lanes = typename Word::Lanes;
  for (Index row = 0; row < rows; row += tile_depth) {
    for (Index column = columns.begin; column < columns.end; column += tile_lanes) {
      float* first = slice + row * stride + column;
      alignas(64) std::uint32_t words[tile_words];
      for (Index j = 0; j < tile_depth / 2; ++j)
        for (Index i = 0; i < tile_lanes; i += Lanes::width)
          Word::across(Lanes::load(first + 2 * j * stride + i), Lanes::load(first + (2 * j + 1) * stride + i),
                       words + j * tile_lanes + i);
      auto* target = reinterpret_cast<std::uint32_t*>(first);
      if (side == Side::rows) {
        transpose_tile<Lanes>(words, target, stride);
      } else {
        for (Index j = 0; j < tile_lanes; ++j) std::memcpy(target + j * stride, words + j * tile_lanes, 64);
      }
    }
  }
}

// The strip of a tiled slice at a column of T.
inline Strip slice_strip(const std::uint32_t* slice, Index column, Index stride) {
  return {slice + column, 4 * stride, 4 * tile_depth * stride, 4 * tile_lanes};
}

// Adds left x right to C at (row, column), also where C ends inside the block.
template <class Unit>
void add_to_drift(const Strip& left, const Strip& right, Index steps, float* drift, Index rank, Index row,
                  Index column) {
  if (row + block_lanes <= rank && column + block_lanes <= rank)
    return multiply_tiles<Unit, true>(left, right, steps, {drift + row * rank + column, rank});
  const Index rows = smaller(block_lanes, rank - row), columns = smaller(block_lanes, rank - column);
  alignas(64) float sums[block_lanes * block_lanes] = {};
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; ++c) sums[r * block_lanes + c] = drift[(row + r) * rank + column + c];
  multiply_tiles<Unit, true>(left, right, steps, {sums, block_lanes});
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; ++c) drift[(row + r) * rank + column + c] = sums[r * block_lanes + c];
}

// C += S^T T over the tiled slices in order, for columns `shorts` of the shorter side's basis S and columns `longs` of
// T. `packed` holds fold_lanes columns of one slice's rows of S.
template <class Unit, class SliceAt>
void fold_tiled_slices(const Sides& sides, const Source& basis, const SliceAt& slice_at, Index slices, Range shorts,
                       Range longs, Index stride, std::uint32_t* packed, float* drift) {
  const Index rank = sides.rank;
  for (Index i = 0; i < slices; ++i) {
    const Slice slice = slice_at(i);
    const Index steps = tile_steps(slice.rows);
    if (steps == 0) continue;
    for (Index s0 = shorts.begin; s0 < shorts.end; s0 += TileLayout::fold_lanes) {
      const Index end = smaller(smaller(s0 + TileLayout::fold_lanes, shorts.end), rank);
      pack_strips(basis, {s0, end - s0, end - s0, slice.row0, slice.rows}, packed);
      for (Index l = longs.begin; l < smaller(longs.end, rank); l += block_lanes) {
        const Strip of_slice = slice_strip(slice.words, l, stride);
        for (Index s = s0; s < end; s += block_lanes) {
          const Strip of_basis = packed_strip(packed + (s - s0) / block_lanes * steps * step_words);
          if (sides.wide) {
            add_to_drift<Unit>(of_basis, of_slice, steps, drift, rank, s, l);
          } else {
            add_to_drift<Unit>(of_slice, of_basis, steps, drift, rank, l, s);
          }
        }
      }
    }
  }
}

inline Source basis_source(const Matrix& basis, PackTile pack) { return {columns_of(basis), pack, 2, 0}; }

// With bfloat16 bases. `exact` keeps T in float32 and multiplies it in float32.
template <class Unit, class Word, bool exact>
void project_tiled(const Projection& p, std::uint32_t* workspace, double* row_squares, rpsft::Team& team) {
  using Second = Float32Word<typename Word::Lanes>;
  constexpr Index width = block_lanes;
  const Sides sides(p);
  const TileLayout layout = TileLayout::of(sides.rank, sides.long_size);
  const Source weight{sides.view, plan_pack_tile<Word, Side::rows>(p.weight, p.base), bytes_of(p.weight.dtype),
                      p.base.data ? bytes_of(p.base.dtype) : 0};
  const Source longer = basis_source(*sides.longer, pack_tile<Word, Bfloat16, NoBase, Side::columns>);
  // T is the right side of the second product for a wide weight, and the left side for a tall one.
  const Side slice_side = sides.wide ? Side::columns : Side::rows;
  const Source shorter = basis_source(*sides.shorter, sides.wide ? pack_tile<Word, Bfloat16, NoBase, Side::rows>
                                                                 : pack_tile<Word, Bfloat16, NoBase, Side::columns>);
  const PackPlan<Second> exact_shorter = plan_pack<Second>(*sides.shorter);
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
        compute_tiled_slice<Unit>(weight, longer, sides.long_size, sides.rank, layout, rows, following, mine,
                                  {slice_of(slot), {own_drift, own_drift + layout.drift},
                                   {own_panel, own_panel + layout.panel}},
                                  packed);
        if constexpr (!exact)
          tile_slice<Word>(slice_of(slot), layout.slice_stride, rows.end - rows.begin,
                           {mine.begin * width, mine.end * width}, slice_side);
      }
    }
    team.wait();
    if (panels && me / fold_groups < other_groups) {
      // Split the columns of T first: they were written by other threads, and each should be read by few.
      Range longs = split_range(panels, me % fold_groups, fold_groups);
      Range shorts = split_range(panels, me / fold_groups, other_groups);
      longs = {longs.begin * width, longs.end * width};
      shorts = {shorts.begin * width, shorts.end * width};
      const auto slice_at = [&](Index s) {
        const Range rows = rows_of(block0 + s);
        return Slice{rows.begin, rows.end - rows.begin, reinterpret_cast<const std::uint32_t*>(slice_of(s))};
      };
      if constexpr (exact) {
        fold_slices<Second>(sides, exact_shorter, slice_at, slots, shorts, longs, layout.slice_stride, own_panel,
                            layout.panels, p.drift);
      } else {
        fold_tiled_slices<Unit>(sides, shorter, slice_at, slots, shorts, longs, layout.slice_stride, own_panel,
                                p.drift);
      }
    }
    team.wait();
  }
  team.wait();
  finish_drift(p, sides.rank, row_squares, team);
  team.wait();
}

}  // namespace
