// AVX-512 with products of bfloat16 pairs (vdpbf16ps), twice the throughput of float32 products.
#include "cpu/float32_kernels.hpp"
#include "cpu/isa/avx512_pairs.hpp"

namespace {

using Float32 = Float32Word<Bf16Lanes>;

void project_bfloat16(const Projection& p, std::uint32_t* workspace, double* sums, rpsft::Team& team) {
  if (!p.left.present()) return project_full<Bf16Lanes>(p, sums, team);
  const bool pairs = p.left.dtype == rpsft::Dtype::bfloat16;
  if (pairs && p.base.data) return project_one<Bfloat16Pair, Bfloat16Pair>(p, workspace, sums, team);
  // Without a base T = W V is not small, and rounding it to bfloat16 would lose the drift in it. Keep it in float32.
  if (pairs && p.weight.dtype == rpsft::Dtype::bfloat16)
    return project_one<Bfloat16Pair, Float32>(p, workspace, sums, team);
  project_one<Float32, Float32>(p, workspace, sums, team);
}

void pull_back_bfloat16(const Pullback& p, bool accumulate, std::uint32_t* workspace, rpsft::Team& team) {
  if (!p.left.present()) return pull_back_full<Bf16Lanes>(p, accumulate, team);
  if (p.left.dtype == rpsft::Dtype::bfloat16) return pull_back_into<Bfloat16Pair>(p, accumulate, workspace, team);
  pull_back_into<Float32>(p, accumulate, workspace, team);
}

// The bases may be bfloat16 or float32. Neither always needs the larger workspace: pairs use larger blocks up to rank
// 256, float32 words only up to rank 128.
Index pull_back_words_of_either(Index rank, int threads) {
  return larger(pull_back_words<Bfloat16Pair>(rank, threads), pull_back_words<Float32>(rank, threads));
}

}  // namespace

namespace rpsft {

Kernels avx512_bf16_kernels() {
  return {"avx512_bf16", project_words<Bf16Lanes>, pull_back_words_of_either, project_bfloat16, pull_back_bfloat16};
}

}  // namespace rpsft
