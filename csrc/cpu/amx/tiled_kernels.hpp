// The table of an instruction set with matrix units. Another set computes what has no products of bfloat16 pairs:
// float32 bases, the full form, and T = W V of weights that are not bfloat16.
#pragma once

#include "cpu/amx/project.hpp"
#include "cpu/amx/pull_back.hpp"
#include "cpu/kernels.hpp"

namespace {

template <class Unit, class Word, rpsft::Kernels (*others)()>
struct TiledKernels {
  static Index project_words(Index rank, Index long_size, int threads) {
    return larger(TileLayout::of(rank, long_size).per_thread * threads,
                  others().project_words(rank, long_size, threads));
  }

  static Index pull_back_words(Index rank, int threads) {
    const TiledPullLayout layout = TiledPullLayout::of(rank);
    return larger(layout.product + layout.per_thread * threads, others().pull_back_words(rank, threads));
  }

  static void project(const Projection& p, std::uint32_t* workspace, double* sums, rpsft::Team& team) {
    const bool pairs = p.left.present() && p.left.cols > 0 && p.left.dtype == rpsft::Dtype::bfloat16;
    if (pairs && p.base.data) return project_tiled<Unit, Word, false>(p, workspace, sums, team);
    // Without a base T = W V is not small, and rounding it to bfloat16 would lose the drift in it. Keep it in float32.
    if (pairs && p.weight.dtype == rpsft::Dtype::bfloat16)
      return project_tiled<Unit, Word, true>(p, workspace, sums, team);
    others().project(p, workspace, sums, team);
  }

  static void pull_back(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
    if (p.left.present() && p.left.cols > 0 && p.left.dtype == rpsft::Dtype::bfloat16)
      return pull_back_tiled<Unit, Word>(p, accumulate, workspace, team);
    others().pull_back(p, accumulate, workspace, team);
  }

  static rpsft::Kernels table(const char* name) {
    return {name, project_words, pull_back_words, project, pull_back, Unit::configure, Unit::release};
  }
};

}  // namespace
