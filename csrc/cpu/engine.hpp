// The CPU engine's interface: the two operations of the rotation penalty (arXiv 2605.10973) over raw pointers.
//
//   project_drift   C = U^T (W - W0) V - B   and   ||C||_F^2
//   pull_back       G = scale * U C V^T      or    G += scale * U C V^T
//
// It knows no torch and no Python. Strides are in elements. Nothing is checked here beyond what keeps memory
// safe by construction: the caller checks shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace rpsft {

enum class Dtype : std::uint8_t { bfloat16, float16, float32 };

// A matrix in memory. One that has not been given a shape is absent; an empty one is present, whatever its data.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t rows = -1, cols = 0;
  std::int64_t row_stride = 0, col_stride = 1;

  bool present() const { return rows >= 0; }
};

// Which elements of a weight are at hand: all but the first `head` of its first row and the last `tail` of its
// last. A flat shard of a row-major weight is the rows that it touches, with what it lacks of the outer two. The
// data pointers of weight, base and gradient point to where element (0, 0) is or would be.
struct Cut {
  std::int64_t head = 0, tail = 0;
};

// left (rows, k) and right (cols, k) are both bfloat16 or both float32. Without them the form is full: C is W - W0.
struct Projection {
  Matrix weight, base, left, right;
  const float* block = nullptr;  // B (k, k), contiguous
  float* drift = nullptr;        // C (k, k), contiguous; written
  float* square = nullptr;       // one number; written
  Cut cut;
};

struct Pullback {
  Matrix grad, left, right;
  Matrix weight, base;           // of the full form alone
  const float* drift = nullptr;  // C (k, k), contiguous
  float scale = 0;
  Cut cut;
};

// The instruction sets that this binary carries and this processor has, best first.
std::vector<std::string> instruction_sets();

// Runs on `threads` threads. Results have the same bits for every number of threads; they depend on the
// instruction set. Throws std::invalid_argument for an instruction set that is not in instruction_sets().
void project_drift(const std::vector<Projection>& shards, const std::string& instruction_set, int threads);
void pull_back(const std::vector<Pullback>& shards, bool accumulate, const std::string& instruction_set, int threads);

// Bytes at most that a thread which calls project_drift or pull_back takes beside their arguments, and keeps.
std::size_t workspace_bytes(std::int64_t rank, const std::string& instruction_set, int threads);

}  // namespace rpsft
