// The microkernel of matrix units: 32 rows by 32 columns of sums in four tile registers, multiplied from tiles of
// bfloat16 pairs in memory.
//
// A Unit is the tile registers: TileUnit (tile_unit.hpp) those of the processor, and in the tests a model of them.
// Every tile has 16 rows of 64 bytes, so that a thread configures its registers once per call of the engine. Edges are
// padded with zeros.
#pragma once

#include "cpu/range.hpp"

namespace {

constexpr Index tile_lanes = 16, tile_depth = 32, tile_words = 256;
// A block of sums is two tiles by two.
constexpr Index block_lanes = 2 * tile_lanes;
// A strip is one operand of a block: two tiles, 16 lanes each, for every step of 32 along the sum.
constexpr Index step_words = 2 * tile_words;

// Where the tiles of a strip are: bytes from one row of a tile to the next, from the tiles of one step to those of the
// next, and from the first tile of a step to the second.
struct Strip {
  const void* at;
  Index row, step, second;
};

// A strip as pack_strip lays it out: tiles one after the other.
inline Strip packed_strip(const std::uint32_t* words) { return {words, 64, 4 * step_words, 4 * tile_words}; }

// A block of float32 sums in memory. `stride` is in elements.
struct Block {
  float* at;
  Index stride;
};

struct NoTileOverlap {
  void step() {}
};

// Writes left x right to `target`, or adds it to the sums there. `left` has rows as lanes: words[lane][pair]; `right`
// columns: words[pair][lane]. Calls `overlap` once per step: the matrix unit works on while other instructions run.
// Never inlined: the loop must keep its addresses in registers, and the sums never leave theirs.
template <class Unit, bool add, class Overlap>
__attribute__((noinline)) void multiply_tiles(const Strip& left, const Strip& right, Index steps, const Block& target,
                                              Overlap& overlap) {
  const char *a = static_cast<const char*>(left.at), *b = static_cast<const char*>(right.at);
  const Index a_row = left.row, a_step = left.step, a_second = left.second;
  const Index b_row = right.row, b_step = right.step, b_second = right.second;
  float* const upper = target.at;
  float* const lower = target.at + tile_lanes * target.stride;
  const Index stride = 4 * target.stride;
  // The compiler does not know that tile instructions read and write memory.
  Unit::fence();
  if constexpr (add) {
    Unit::template load<0>(upper, stride);
    Unit::template load<1>(upper + tile_lanes, stride);
    Unit::template load<2>(lower, stride);
    Unit::template load<3>(lower + tile_lanes, stride);
  } else {
    Unit::template zero<0>();
    Unit::template zero<1>();
    Unit::template zero<2>();
    Unit::template zero<3>();
  }
  for (Index step = 0; step < steps; ++step) {
    Unit::template load<4>(a, a_row);
    Unit::template load<6>(b, b_row);
    Unit::template multiply_add<0, 4, 6>();
    Unit::template load<7>(b + b_second, b_row);
    Unit::template multiply_add<1, 4, 7>();
    Unit::template load<5>(a + a_second, a_row);
    Unit::template multiply_add<2, 5, 6>();
    Unit::template multiply_add<3, 5, 7>();
    a += a_step;
    b += b_step;
    // What it writes is read by later blocks only, behind their fence.
    overlap.step();
  }
  Unit::template store<0>(upper, stride);
  Unit::template store<1>(upper + tile_lanes, stride);
  Unit::template store<2>(lower, stride);
  Unit::template store<3>(lower + tile_lanes, stride);
  Unit::fence();
}

template <class Unit, bool add>
void multiply_tiles(const Strip& left, const Strip& right, Index steps, const Block& target) {
  NoTileOverlap nothing;
  multiply_tiles<Unit, add>(left, right, steps, target, nothing);
}

}  // namespace
