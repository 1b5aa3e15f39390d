// The entries of an instruction set without products of bfloat16 pairs: every product is one of float32 numbers.
#pragma once

#include "cpu/full.hpp"

namespace {

template <class Lanes>
Index project_units(Index rank, Index long_size, int threads) {
  return ProjectLayout::of<Lanes>(rank, long_size).per_thread * threads;
}

template <class Unit>
Index pull_units(Index rank, int threads) {
  const PullLayout layout = PullLayout::of<Unit>(rank);
  return layout.product + layout.per_thread * threads;
}

template <class Lanes>
void project_single(const Projection& p, std::uint32_t* workspace, double* sums, rpsft::Team& team) {
  if (!p.left.present()) return project_full<Lanes>(p, sums, team);
  project_one<Single<Lanes>, Single<Lanes>>(p, workspace, sums, team);
}

template <class Lanes>
void pull_single(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (!p.left.present()) return pull_full<Lanes>(p, accumulate, team);
  pull_into<Single<Lanes>>(p, accumulate, workspace, team);
}

template <class Lanes>
rpsft::Kernels single_kernels(const char* name) {
  return {name, project_units<Lanes>, pull_units<Single<Lanes>>, project_single<Lanes>, pull_single<Lanes>};
}

}  // namespace
