// The CPU engine's interface: the two operations of the rotation penalty (arXiv 2605.10973) over raw pointers.
//
//   project_drift   C = U^T (W - W0) V - B   and   ||C||_F^2
//   pull_back       G = scale * U C V^T      or    G += scale * U C V^T
//
// The engine depends on neither torch nor Python. Strides are in elements. The caller checks shapes: the engine reads
// and writes what it is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace rpsft {

enum class Dtype : std::uint8_t { bfloat16, float16, float32 };

// A matrix in memory. A default-constructed matrix is absent. An empty one is present, even with a null pointer.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t rows = -1, cols = 0;
  std::int64_t row_stride = 0, col_stride = 1;

  bool present() const { return rows >= 0; }
};

// The elements of a weight that are in memory: all except the first `head` of its first row and the last `tail` of its
// last row. A contiguous shard of a row-major weight is passed as the rows that it touches, and head and tail say what
// the outer two rows lack. The data pointers of weight, base and gradient point to where element (0, 0) is or would be.
// The C API and the bindings take it. The Python package passes such shards as up to three whole matrices instead.
struct Cut {
  std::int64_t head = 0, tail = 0;
};

// One weight's arguments of project_drift. left (rows, k) and right (cols, k) are both bfloat16 or both float32.
// Without them the form is full: C is W - W0.
struct Projection {
  Matrix weight, base, left, right;
  const float* block = nullptr;  // B (k, k), contiguous
  float* drift = nullptr;        // C (k, k), contiguous; written
  float* square = nullptr;       // ||C||_F^2, one number; written
  Cut cut;
};

// One weight's arguments of pull_back.
struct Pullback {
  Matrix grad, left, right;
  Matrix weight, base;           // in the full form only
  const float* drift = nullptr;  // C (k, k), contiguous
  float scale = 0;
  Cut cut;
};

// The instruction sets that this binary contains and this processor supports, best first.
std::vector<std::string> instruction_sets();

// An instruction set that is not in instruction_sets(), and why.
struct MissingInstructionSet {
  std::string name, reason;
};
std::vector<MissingInstructionSet> missing_instruction_sets();

// Both run on up to `threads` threads. Results have the same bits for every number of threads, but depend on the
// instruction set. They throw std::invalid_argument for an instruction set that is not in instruction_sets().
void project_drift(const std::vector<Projection>& items, const std::string& instruction_set, int threads);
void pull_back(const std::vector<Pullback>& items, bool accumulate, const std::string& instruction_set, int threads);

// The most bytes of workspace that a calling thread allocates, and keeps, for weights of this rank.
std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads);

}  // namespace rpsft
