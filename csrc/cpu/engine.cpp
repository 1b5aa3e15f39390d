#include "cpu/engine.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/amx/permission.hpp"
#include "cpu/run.hpp"
#include "cpu/threads.hpp"

namespace rpsft {
namespace {

// The tables of the instruction sets that this binary contains and this processor supports, best first, and the others.
struct Found {
  std::vector<Kernels> usable;
  std::vector<MissingInstructionSet> missing;

  // `refusal` says why it cannot run here; empty if it can.
  void add(const char* name, Kernels (*table)(), const std::string& refusal) {
    if (table == nullptr) {
      missing.push_back({name, "this build lacks it: another kind of processor, or a compiler without its instructions"});
    } else if (!refusal.empty()) {
      missing.push_back({name, refusal});
    } else {
      usable.push_back(table());
    }
  }
};

using Table = Kernels (*)();
#if defined(RPSFT_HAS_AMX_BF16) && defined(RPSFT_HAS_AVX512_BF16)
const Table amx_bf16_table = amx_bf16_kernels;
constexpr bool has_amx_bf16 = true;
#else
const Table amx_bf16_table = nullptr;
constexpr bool has_amx_bf16 = false;
#endif
#if defined(RPSFT_HAS_AVX512_BF16)
const Table avx512_bf16_table = avx512_bf16_kernels;
#else
const Table avx512_bf16_table = nullptr;
#endif
#if defined(RPSFT_HAS_AVX512)
const Table avx512_table = avx512_kernels;
#else
const Table avx512_table = nullptr;
#endif
#if defined(RPSFT_HAS_AVX2)
const Table avx2_table = avx2_kernels;
#else
const Table avx2_table = nullptr;
#endif

Found find_kernels() {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Not every clang knows the name "f16c" (14 refuses it).
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const auto unless = [](bool supported) { return std::string(supported ? "" : "this processor lacks it"); };
  Found found;
  // The system is asked for tiles only where they would be used.
  std::string no_tiles = "this processor has no AVX512-BF16, which AMX needs beside it";
  if (avx512_bf16) no_tiles = has_amx_bf16 ? amx_refusal() : "";
  found.add("amx_bf16", amx_bf16_table, no_tiles);
  found.add("avx512_bf16", avx512_bf16_table, unless(avx512_bf16));
  found.add("avx512", avx512_table, unless(avx512));
  found.add("avx2", avx2_table, unless(avx2));
  found.add("portable", portable_kernels, "");
  return found;
}

// Found by the first call of the engine: before its threads, which share what the system grants the process.
const Found& found_kernels() {
  static const Found found = find_kernels();
  return found;
}

const Kernels& kernels_of(const std::string& instruction_set) {
  for (const Kernels& candidate : found_kernels().usable)
    if (instruction_set == candidate.name) return candidate;
  std::string why = "which this processor or build lacks";
  for (const MissingInstructionSet& each : found_kernels().missing)
    if (instruction_set == each.name) why = "which cannot run here: " + each.reason;
  throw std::invalid_argument("instruction_set: got '" + instruction_set + "', " + why);
}

// A member's stay in the team of a call.
class Stay {
 public:
  explicit Stay(const Kernels& kernels) : leave_(kernels.leave) {
    if (kernels.enter) kernels.enter();
  }
  Stay(const Stay&) = delete;
  Stay& operator=(const Stay&) = delete;
  ~Stay() {
    if (leave_) leave_();
  }

 private:
  void (*leave_)();
};

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
  for (const Kernels& each : found_kernels().usable) names.emplace_back(each.name);
  return names;
}

std::vector<MissingInstructionSet> missing_instruction_sets() { return found_kernels().missing; }

void project_drift(const std::vector<Projection>& items, const Kernels& kernels, int threads) {
  std::int64_t rank = 0, words = 0;
  for (const Projection& item : items) {
    if (item.left.cols <= 0) continue;
    rank = std::max(rank, item.left.cols);
    const std::int64_t long_size = std::max(item.weight.rows, item.weight.cols);
    words = std::max(words, kernels.project_words(item.left.cols, long_size, std::max(threads, 1)));
  }
  const Workspace workspace = workspace_of(words, std::max(rank, full_strips));
  run_team(threads, [&](Team& team) {
    const Stay stay(kernels);
    for (const Projection& item : items) kernels.project(item, workspace.words, workspace.sums, team);
  });
}

void pull_back(const std::vector<Pullback>& items, bool accumulate, const Kernels& kernels, int threads) {
  std::int64_t words = 0;
  for (const Pullback& item : items)
    if (item.left.cols > 0) words = std::max(words, kernels.pull_back_words(item.left.cols, std::max(threads, 1)));
  const Workspace workspace = workspace_of(words, 0);
  run_team(threads, [&](Team& team) {
    const Stay stay(kernels);
    for (const Pullback& item : items) kernels.pull_back(item, accumulate, workspace.words, team);
  });
}

std::size_t workspace_bytes(std::int64_t rank, const Kernels& kernels, int threads) {
  const std::int64_t words =
      std::max(kernels.project_words(rank, longest_side, threads), kernels.pull_back_words(rank, threads));
  return sizeof(std::uint32_t) * static_cast<std::size_t>(words) +
         sizeof(double) * static_cast<std::size_t>(std::max(rank, full_strips));
}

void project_drift(const std::vector<Projection>& items, const std::string& instruction_set, int threads) {
  project_drift(items, kernels_of(instruction_set), threads);
}

void pull_back(const std::vector<Pullback>& items, bool accumulate, const std::string& instruction_set, int threads) {
  pull_back(items, accumulate, kernels_of(instruction_set), threads);
}

std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads) {
  return workspace_bytes(rank, kernels_of(instruction_set), threads);
}

}  // namespace rpsft
