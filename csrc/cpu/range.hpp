// Index arithmetic that all kernels share: sizes rounded to blocks, and ranges split between threads.
#pragma once

#include <cstdint>

namespace {

using Index = std::int64_t;

// Not std::min and std::max: those have external linkage, see kernels.hpp.
inline Index smaller(Index a, Index b) { return a < b ? a : b; }
inline Index larger(Index a, Index b) { return a > b ? a : b; }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// The indices begin, begin + 1, ..., end - 1.
struct Range {
  Index begin, end;
};

// Range number `part` of [0, size) split into `parts` nearly equal ranges.
inline Range split_range(Index size, Index part, Index parts) {
  return {size * part / parts, size * (part + 1) / parts};
}

// Words added to each row of a workspace matrix, so that its rows do not all map to the same set of a cache.
constexpr Index stride_padding = 16;

}  // namespace
