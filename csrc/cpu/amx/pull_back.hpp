// pull_back with matrix units: P = scale * S C for a block of the shorter side, as tiles, then the block's gradient.
#pragma once

#include "cpu/amx/pack_tiles.hpp"
#include "cpu/pull_back.hpp"

namespace {

// As PullBackLayout. The numbers are from the arithmetic in docs/cpu_engine.md and were never measured.
struct TiledPullLayout {
  Index rows, product, panel, strip, per_thread;

  static constexpr Index sums = block_lanes * block_lanes;

  static TiledPullLayout of(Index rank) {
    // P is read again for every panel of the other side, by all threads: it must fit into each core's own cache.
    constexpr Index product_words = 128 << 10;
    TiledPullLayout layout;
    layout.strip = tile_steps(rank) * step_words;
    layout.rows = larger(256, smaller(1024, product_words / larger(1, layout.strip) * block_lanes));
    layout.product = layout.rows / block_lanes * layout.strip;
    layout.panel = layout.strip;
    layout.per_thread = 2 * layout.panel + layout.strip + 2 * sums;
    return layout;
  }
};

// Strips of rows of a basis: read in place where the basis is a row of tiles already, else packed.
template <class Word>
struct StripsOfBasis {
  const Matrix& basis;
  Source source;
  std::uint32_t* scratch;
  bool direct;

  StripsOfBasis(const Matrix& matrix, std::uint32_t* buffer)
      : basis(matrix),
        source{{matrix.data, matrix.row_stride, matrix.col_stride},
               pack_tile<Word, Bfloat16, NoBase, Side::rows>,
               2,
               0},
        scratch(buffer),
        direct(matrix.col_stride == 1 && matrix.cols % tile_depth == 0) {}

  Strip at(Index row) const {
    if (direct && row + block_lanes <= basis.rows) {
      const Index stride = 2 * basis.row_stride;
      return {static_cast<const char*>(basis.data) + row * stride, stride, 2 * tile_depth, tile_lanes * stride};
    }
    const Index rows = smaller(block_lanes, basis.rows - row);
    pack_strips(source, {row, rows, rows, 0, basis.cols}, scratch);
    return packed_strip(scratch);
  }
};

// P = scale * S C for `strips` of the block that begins at row0 of the basis S, and `panels` of C's columns. P is
// packed as one side of the gradient's product.
template <class Unit, class Word>
void compute_tiled_product(const StripsOfBasis<Word>& basis, const Source& drift, Index rank, float scale, Side side,
                           Range strips, Range panels, Index row0, std::uint32_t* product, std::uint32_t* packed,
                           float* sums) {
  using Lanes = typename Word::Lanes;
  const Index steps = tile_steps(rank);
  const auto scales = Lanes::broadcast(scale);
  for (Index panel = panels.begin; panel < panels.end; ++panel) {
    const Index column = panel * block_lanes, lanes = smaller(block_lanes, rank - column);
    pack_strips(drift, {column, lanes, lanes, 0, rank}, packed);
    for (Index strip = strips.begin; strip < strips.end; ++strip) {
      multiply_tiles<Unit, false>(basis.at(row0 + strip * block_lanes), packed_strip(packed), steps,
                                  {sums, block_lanes});
      // 32 columns of P are one step of the gradient's sum.
      std::uint32_t* target = product + (strip * steps + panel) * step_words;
      for (Index half = 0; half < 2; ++half) {
        alignas(64) std::uint32_t words[tile_words];
        for (Index r = 0; r < tile_lanes; ++r)
          for (Index c = 0; c < block_lanes; c += Lanes::width)
            Word::along(Lanes::multiply(Lanes::load(sums + (half * tile_lanes + r) * block_lanes + c), scales),
                        words + r * tile_lanes + c / 2);
        if (side == Side::rows) {
          std::memcpy(target + half * tile_words, words, sizeof words);
        } else {
          transpose_tile<Lanes>(words, target + half * tile_words);
        }
      }
    }
  }
}

// Where a block of sums belongs in the gradient.
struct GradientBlock {
  const float* sums;
  Index row, column, rows, lanes;
  bool whole;
};

// Writes rows [begin, end) of a block to the gradient, or adds them.
template <class Lanes, class G, bool accumulate>
void write_rows(const Target& target, const GradientBlock& block, Index begin, Index end) {
  for (Index r = begin; r < end; ++r) {
    const float* sums = block.sums + r * block_lanes;
    if (!block.whole) {
      for (Index i = 0; i < block.lanes; ++i)
        put_element<G, accumulate>(target, block.row + r, block.column + i, sums[i]);
      continue;
    }
    G* at = static_cast<G*>(target.grad.data) + (block.row + r) * target.grad.row_stride + block.column;
    RPSFT_UNROLL
    for (Index i = 0; i < block_lanes; i += Lanes::width) {
      auto value = Lanes::load(sums + i);
      if constexpr (accumulate) value = Lanes::add(value, Lanes::load(at + i));
      Lanes::store(at + i, value);
    }
  }
}

using WriteRows = void (*)(const Target&, const GradientBlock&, Index, Index);

template <class Lanes, class G>
WriteRows select_write_rows(bool accumulate) {
  return accumulate ? write_rows<Lanes, G, true> : write_rows<Lanes, G, false>;
}

template <class Lanes>
WriteRows select_write_rows(rpsft::Dtype dtype, bool accumulate) {
  switch (dtype) {
    case rpsft::Dtype::bfloat16:
      return select_write_rows<Lanes, Bfloat16>(accumulate);
    case rpsft::Dtype::float16:
      return select_write_rows<Lanes, Float16>(accumulate);
    default:
      return select_write_rows<Lanes, float>(accumulate);
  }
}

// Writes the latest block to the gradient while the next one is multiplied, a few rows at each step.
class GradientWriter {
 public:
  // `sums` holds two blocks. A block is written over `steps` steps.
  GradientWriter(const Target& target, WriteRows write, float* sums, Index steps)
      : target_(target), write_(write), sums_(sums), each_(ceil_div(block_lanes, larger(1, steps))) {}

  // Where the next block's sums go. Its lines of the gradient are fetched.
  Block begin(Index row, Index column) {
    const Target& t = target_;
    next_ = {sums_ + half_ * TiledPullLayout::sums, row, column, smaller(block_lanes, t.grad.rows - row),
             smaller(block_lanes, t.grad.cols - column), false};
    next_.whole = next_.lanes == block_lanes && t.grad.col_stride == 1 && t.holds(row, column) &&
                  t.holds(row + next_.rows - 1, column + next_.lanes - 1);
    const Index bytes = bytes_of(t.grad.dtype);
    const char* at = static_cast<const char*>(t.grad.data) + (row * t.grad.row_stride + column) * bytes;
    if (next_.whole) {
      for (Index r = 0; r < next_.rows; ++r, at += t.grad.row_stride * bytes) {
        __builtin_prefetch(at, 1);
        __builtin_prefetch(at + block_lanes * bytes - 1, 1);
      }
    }
    half_ = 1 - half_;
    return {const_cast<float*>(next_.sums), block_lanes};
  }

  void step() {
    if (written_ < current_.rows) write(smaller(current_.rows, written_ + each_));
  }

  // The block that was begun is computed.
  void turn() {
    finish();
    current_ = next_;
    written_ = 0;
  }

  void finish() {
    if (written_ < current_.rows) write(current_.rows);
  }

 private:
  __attribute__((noinline)) void write(Index end) {
    write_(target_, current_, written_, end);
    written_ = end;
  }

  const Target& target_;
  WriteRows write_;
  float* sums_;
  Index each_, written_ = 0;
  int half_ = 0;
  GradientBlock current_{}, next_{};
};

template <class Unit, class Word>
void pull_back_tiled(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  const Target target(p);
  const Matrix& row_basis = target.transposed ? p.right : p.left;
  const Matrix& col_basis = target.transposed ? p.left : p.right;
  const Index rank = p.left.cols, steps = tile_steps(rank), panels = steps;
  const bool wide = target.grad.rows <= target.grad.cols;
  const Matrix& shorter = wide ? row_basis : col_basis;
  // C with the shorter side's index as depth.
  const bool straight = &shorter == &p.left;
  const Source drift{{p.drift, straight ? 1 : rank, straight ? rank : 1},
                     pack_tile<Word, float, NoBase, Side::columns>,
                     4,
                     0};
  const Source columns{{col_basis.data, col_basis.row_stride, col_basis.col_stride},
                       pack_tile<Word, Bfloat16, NoBase, Side::columns>,
                       2,
                       0};
  const WriteRows write = select_write_rows<typename Word::Lanes>(p.grad.dtype, accumulate);

  const TiledPullLayout layout = TiledPullLayout::of(rank);
  const Index members = team.size(), me = team.rank();
  std::uint32_t* product = workspace;
  std::uint32_t* own = workspace + layout.product + me * layout.per_thread;
  std::uint32_t* panel_words[2] = {own, own + layout.panel};
  std::uint32_t* strip_words = own + 2 * layout.panel;
  float* sums = reinterpret_cast<float*>(strip_words + layout.strip);
  const StripsOfBasis<Word> short_strips(shorter, strip_words), long_strips(row_basis, strip_words);
  const Index groups = smaller(members, larger(panels, 1)), row_groups = members / groups;

  // Blocks of about equal size.
  const Index parts = larger(1, ceil_div(shorter.rows, layout.rows));
  const Index rows_each = smaller(layout.rows, round_up(ceil_div(shorter.rows, parts), block_lanes));
  for (Index row0 = 0; row0 < shorter.rows; row0 += rows_each) {
    const Index rows = smaller(rows_each, shorter.rows - row0), strips = ceil_div(rows, block_lanes);
    if (me / groups < row_groups)
      compute_tiled_product<Unit>(short_strips, drift, rank, p.scale, wide ? Side::rows : Side::columns,
                                  split_range(strips, me / groups, row_groups), split_range(panels, me % groups, groups),
                                  row0, product, panel_words[0], sums);
    team.wait();
    GradientWriter writer(target, write, sums, steps);
    const auto product_strip = [&](Index strip) { return packed_strip(product + strip * layout.strip); };
    if (wide) {
      const Range mine = split_range(ceil_div(target.grad.cols, block_lanes), me, members);
      const auto panel_of = [&](Index panel) {
        const Index lane = panel * block_lanes, lanes = smaller(block_lanes, target.grad.cols - lane);
        return panel < mine.end ? Chunk{lane, lanes, lanes, 0, rank} : Chunk{};
      };
      int half = 0;
      if (mine.begin < mine.end) pack_strips(columns, panel_of(mine.begin), panel_words[0]);
      for (Index panel = mine.begin; panel < mine.end; ++panel, half = 1 - half) {
        TilePacker next(columns, panel_of(panel + 1), panel_of(panel + 2), panel_words[1 - half], strips * steps);
        Overlapped<TilePacker, GradientWriter> overlapped{next, writer};
        for (Index strip = 0; strip < strips; ++strip) {
          const Block block = writer.begin(row0 + strip * block_lanes, panel * block_lanes);
          multiply_tiles<Unit, false>(product_strip(strip), packed_strip(panel_words[half]), steps, block, overlapped);
          writer.turn();
        }
        next.finish();
      }
    } else {
      const Range mine = split_range(ceil_div(target.grad.rows, block_lanes), me, members);
      for (Index row = mine.begin * block_lanes; row < smaller(target.grad.rows, mine.end * block_lanes);
           row += block_lanes) {
        const Strip left = long_strips.at(row);
        for (Index strip = 0; strip < strips; ++strip) {
          const Block block = writer.begin(row, row0 + strip * block_lanes);
          multiply_tiles<Unit, false>(left, product_strip(strip), steps, block, writer);
          writer.turn();
        }
      }
    }
    writer.finish();
    team.wait();
  }
}

}  // namespace
