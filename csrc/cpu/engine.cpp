#include "cpu/engine.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

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

// Memory that a calling thread keeps between calls: fresh pages would cost a small weight more time than its products.
// It is as large as the largest call so far has needed and goes with its thread.
class Workspace {
 public:
  ~Workspace() { release(); }

  void* at_least(std::size_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = ::operator new(bytes, alignment);
      size_ = bytes;
    }
    return memory_;
  }

 private:
  static constexpr std::align_val_t alignment{64};

  void release() {
    if (memory_) ::operator delete(memory_, alignment);
    memory_ = nullptr;
    size_ = 0;
  }

  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

struct Rooms {
  std::uint32_t* units;
  double* sums;
};

Rooms rooms(std::int64_t units, std::int64_t sums) {
  thread_local Workspace workspace;
  const std::size_t head = sizeof(double) * static_cast<std::size_t>((sums + 7) / 8 * 8);
  auto* memory = static_cast<unsigned char*>(
      workspace.at_least(head + sizeof(std::uint32_t) * static_cast<std::size_t>(units)));
  return {reinterpret_cast<std::uint32_t*>(memory + head), reinterpret_cast<double*>(memory)};
}

// A side so long that no other needs more room.
constexpr std::int64_t longest = std::int64_t{1} << 40;

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& each : kernels()) names.emplace_back(each.name);
  return names;
}

void project_drift(const std::vector<Projection>& shards, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  std::int64_t rank = 0, units = 0;
  for (const Projection& shard : shards) {
    if (shard.left.cols <= 0) continue;
    rank = std::max(rank, shard.left.cols);
    const std::int64_t long_size = std::max(shard.weight.rows, shard.weight.cols);
    units = std::max(units, chosen.project_units(shard.left.cols, long_size, std::max(threads, 1)));
  }
  const Rooms room = rooms(units, std::max(rank, full_strips));
  run_team(threads, [&](Team& team) {
    for (const Projection& shard : shards) chosen.project(shard, room.units, room.sums, team);
  });
}

void pull_back(const std::vector<Pullback>& shards, bool accumulate, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  std::int64_t units = 0;
  for (const Pullback& shard : shards)
    if (shard.left.cols > 0) units = std::max(units, chosen.pull_units(shard.left.cols, std::max(threads, 1)));
  const Rooms room = rooms(units, 0);
  run_team(threads, [&](Team& team) {
    for (const Pullback& shard : shards) chosen.pull(shard, accumulate, room.units, team);
  });
}

std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  const std::int64_t units = std::max(chosen.project_units(rank, longest, threads), chosen.pull_units(rank, threads));
  return sizeof(std::uint32_t) * static_cast<std::size_t>(units) +
         sizeof(double) * static_cast<std::size_t>(std::max(rank, full_strips));
}

}  // namespace rpsft
