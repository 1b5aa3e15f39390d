// The table of an instruction set that multiplies float32 numbers only, without products of bfloat16 pairs.
#pragma once

#include "cpu/full.hpp"
#include "cpu/project.hpp"

namespace {

template <class Lanes>
Index project_words(Index rank, Index long_size, int threads) {
  return ProjectLayout::of<Lanes>(rank, long_size).per_thread * threads;
}

template <class Word>
Index pull_back_words(Index rank, int threads) {
  const PullBackLayout layout = PullBackLayout::of<Word>(rank);
  return layout.product + layout.per_thread * threads;
}

template <class Lanes>
void project_float32(const Projection& p, std::uint32_t* workspace, double* sums, rpsft::Team& team) {
  if (!p.left.present()) return project_full<Lanes>(p, sums, team);
  project_one<Float32Word<Lanes>, Float32Word<Lanes>>(p, workspace, sums, team);
}

template <class Lanes>
void pull_back_float32(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (!p.left.present()) return pull_back_full<Lanes>(p, accumulate, team);
  pull_back_into<Float32Word<Lanes>>(p, accumulate, workspace, team);
}

template <class Lanes>
rpsft::Kernels float32_kernels(const char* name) {
  return {name, project_words<Lanes>, pull_back_words<Float32Word<Lanes>>, project_float32<Lanes>,
          pull_back_float32<Lanes>};
}

}  // namespace
