// One instruction set's entries. A file per instruction set fills one of these, compiled with its own flags.
#pragma once

#include <cstdint>

#include "cpu/engine.hpp"
#include "cpu/threads.hpp"

namespace rpsft {

struct Kernels {
  const char* name;
  // 32-bit units of workspace for a rank, the weight's longer side, and a number of threads.
  std::int64_t (*project_units)(std::int64_t rank, std::int64_t long_size, int threads);
  std::int64_t (*pull_units)(std::int64_t rank, int threads);
  // Called by every member of a team, with the same arguments. `sums` has room for max(rank, full_strips) numbers.
  void (*project)(const Projection&, std::uint32_t* workspace, double* sums, Team&);
  void (*pull)(const Pullback&, bool accumulate, std::uint32_t* workspace, Team&);
};

// A full anchor's squares are summed in at most so many strips of rows, and these in order.
constexpr std::int64_t full_strips = 256;

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();

}  // namespace rpsft
