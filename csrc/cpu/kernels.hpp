// The table of one instruction set's functions. Each file in cpu/isa fills one table and is compiled with flags of its
// own.
//
// Everything that those files include from cpu/ is in anonymous namespaces on purpose. A template or inline function
// with external linkage would exist once in the program, compiled with the flags of whichever file the linker picks,
// and could then run AVX-512 code on a processor without it. Internal linkage gives every instruction set its own copy;
// keep it when adding to these headers.
#pragma once

#include <cstdint>

#include "cpu/engine.hpp"
#include "cpu/threads.hpp"

namespace rpsft {

struct Kernels {
  const char* name;
  // Size of the workspace in 32-bit words for a rank, the weight's longer side and a number of threads.
  std::int64_t (*project_words)(std::int64_t rank, std::int64_t long_size, int threads);
  std::int64_t (*pull_back_words)(std::int64_t rank, int threads);
  // Every member of a team calls these with the same arguments. `sums` holds max(rank, full_strips) numbers.
  void (*project)(const Projection&, std::uint32_t* workspace, double* sums, Team&);
  void (*pull_back)(const Pullback&, bool accumulate, std::uint32_t* workspace, Team&);
  // Where they are not null, every member of a team calls these once, before and after all of a call's work.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

// The full form sums squares in at most this many strips of rows, then adds up the strips in order.
constexpr std::int64_t full_strips = 256;

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();
Kernels amx_bf16_kernels();

}  // namespace rpsft
