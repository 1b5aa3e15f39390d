#include "engine.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/kernels.hpp"
#include "team.hpp"

namespace rpsft {
namespace {

// What this binary carries and this processor runs, best first.
std::vector<Kernels> usable_kernels() {
  std::vector<Kernels> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq");
#if defined(RPSFT_HAS_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) usable.push_back(avx512_bf16_kernels());
#endif
#if defined(RPSFT_HAS_AVX512)
  if (avx512) usable.push_back(avx512_kernels());
#endif
#if defined(RPSFT_HAS_AVX2)
  if (avx2) usable.push_back(avx2_kernels());
#endif
#endif
  usable.push_back(portable_kernels());
  return usable;
}

const std::vector<Kernels>& kernels() {
  static const std::vector<Kernels> found = usable_kernels();
  return found;
}

const Kernels& kernels_of(const std::string& instruction_set) {
  for (const Kernels& candidate : kernels())
    if (instruction_set == candidate.name) return candidate;
  throw std::invalid_argument("instruction_set: got '" + instruction_set + "', which this processor or build lacks");
}

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Not value-initialised: pages that a small problem does not reach are never touched.
template <class T>
std::unique_ptr<T[], Release> allocate(std::int64_t count) {
  return std::unique_ptr<T[], Release>(
      static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(std::max<std::int64_t>(count, 1)),
                                     std::align_val_t{64})));
}

template <class Shard>
std::int64_t largest_rank(const std::vector<Shard>& shards) {
  std::int64_t rank = 0;
  for (const Shard& shard : shards) rank = std::max(rank, shard.left.cols);
  return rank;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& each : kernels()) names.emplace_back(each.name);
  return names;
}

void project_drift(const std::vector<Projection>& shards, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  const std::int64_t rank = largest_rank(shards);
  const auto workspace = allocate<std::uint32_t>(rank > 0 ? chosen.project_units(rank, std::max(threads, 1)) : 0);
  const auto sums = allocate<double>(std::max(rank, full_strips));
  run_team(threads, [&](Team& team) {
    for (const Projection& shard : shards) chosen.project(shard, workspace.get(), sums.get(), team);
  });
}

void pull_back(const std::vector<Pullback>& shards, bool accumulate, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  const std::int64_t rank = largest_rank(shards);
  const auto workspace = allocate<std::uint32_t>(rank > 0 ? chosen.pull_units(rank, std::max(threads, 1)) : 0);
  run_team(threads, [&](Team& team) {
    for (const Pullback& shard : shards) chosen.pull(shard, accumulate, workspace.get(), team);
  });
}

std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  const std::int64_t units = std::max(chosen.project_units(rank, threads), chosen.pull_units(rank, threads));
  return sizeof(std::uint32_t) * static_cast<std::size_t>(units) +
         sizeof(double) * static_cast<std::size_t>(std::max(rank, full_strips));
}

}  // namespace rpsft
