#include "cpu/engine.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace rpsft {
namespace {

// The tables of the instruction sets that this binary contains and this processor supports, best first.
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
  static const std::vector<Kernels> usable = usable_kernels();
  return usable;
}

const Kernels& kernels_of(const std::string& instruction_set) {
  for (const Kernels& candidate : kernels())
    if (instruction_set == candidate.name) return candidate;
  throw std::invalid_argument("instruction_set: got '" + instruction_set + "', which this processor or build lacks");
}

// Memory that a calling thread keeps between calls, because for a small weight the page faults of new memory take
// longer than the products. It grows to the largest call's size and is released when the thread ends.
class ThreadMemory {
 public:
  ~ThreadMemory() { release(); }

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

struct Workspace {
  std::uint32_t* words;
  double* sums;
};

// The sums come first, padded to whole cache lines.
Workspace workspace_of(std::int64_t words, std::int64_t sums) {
  thread_local ThreadMemory memory;
  const std::size_t sums_bytes = sizeof(double) * static_cast<std::size_t>((sums + 7) / 8 * 8);
  auto* begin = static_cast<unsigned char*>(
      memory.at_least(sums_bytes + sizeof(std::uint32_t) * static_cast<std::size_t>(words)));
  return {reinterpret_cast<std::uint32_t*>(begin + sums_bytes), reinterpret_cast<double*>(begin)};
}

// A longer side whose workspace is the largest that any weight needs.
constexpr std::int64_t longest_side = std::int64_t{1} << 40;

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& each : kernels()) names.emplace_back(each.name);
  return names;
}

void project_drift(const std::vector<Projection>& items, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  std::int64_t rank = 0, words = 0;
  for (const Projection& item : items) {
    if (item.left.cols <= 0) continue;
    rank = std::max(rank, item.left.cols);
    const std::int64_t long_size = std::max(item.weight.rows, item.weight.cols);
    words = std::max(words, chosen.project_words(item.left.cols, long_size, std::max(threads, 1)));
  }
  const Workspace workspace = workspace_of(words, std::max(rank, full_strips));
  run_team(threads, [&](Team& team) {
    for (const Projection& item : items) chosen.project(item, workspace.words, workspace.sums, team);
  });
}

void pull_back(const std::vector<Pullback>& items, bool accumulate, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  std::int64_t words = 0;
  for (const Pullback& item : items)
    if (item.left.cols > 0) words = std::max(words, chosen.pull_back_words(item.left.cols, std::max(threads, 1)));
  const Workspace workspace = workspace_of(words, 0);
  run_team(threads, [&](Team& team) {
    for (const Pullback& item : items) chosen.pull_back(item, accumulate, workspace.words, team);
  });
}

std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads) {
  const Kernels& chosen = kernels_of(instruction_set);
  const std::int64_t words =
      std::max(chosen.project_words(rank, longest_side, threads), chosen.pull_back_words(rank, threads));
  return sizeof(std::uint32_t) * static_cast<std::size_t>(words) +
         sizeof(double) * static_cast<std::size_t>(std::max(rank, full_strips));
}

}  // namespace rpsft
