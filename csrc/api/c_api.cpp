// The C API: checks arguments, converts them for the engine, and turns exceptions into status codes.
#include <algorithm>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/engine.hpp"
#include "rotation_penalty.h"

// Exported even where the build hides everything else.
#if defined(__GNUC__)
#define RPSFT_EXPORT __attribute__((visibility("default")))
#else
#define RPSFT_EXPORT
#endif

namespace {

using rpsft::Matrix;

// Message of this thread's last error.
std::string& last_error() {
  thread_local std::string words;
  return words;
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream words;
  (words << ... << parts);
  throw std::invalid_argument(words.str());
}

std::string shape(std::int64_t rows, std::int64_t cols) {
  std::ostringstream words;
  words << '(' << rows << ", " << cols << ')';
  return words.str();
}

// Names one argument of one item in a message. The header calls the items shards.
struct Place {
  std::size_t index;
  const char* name;

  friend std::ostream& operator<<(std::ostream& out, const Place& place) {
    return out << "shards[" << place.index << "]." << place.name;
  }
};

Matrix matrix(const rpsft_matrix* given, const Place& place) {
  if (!given) return {};
  if (given->dtype != RPSFT_BFLOAT16 && given->dtype != RPSFT_FLOAT16 && given->dtype != RPSFT_FLOAT32)
    refuse(place, ".dtype: got ", static_cast<int>(given->dtype), ", expected one of rpsft_dtype");
  if (given->rows < 0 || given->cols < 0)
    refuse(place, ": got shape ", shape(given->rows, given->cols), ", expected sizes of 0 or more");
  if (!given->data && given->rows > 0 && given->cols > 0) refuse(place, ".data: got NULL, expected an address");
  Matrix result;
  result.data = given->data;
  result.dtype = static_cast<rpsft::Dtype>(given->dtype);
  result.rows = given->rows;
  result.cols = given->cols;
  result.row_stride = given->row_stride;
  result.col_stride = given->col_stride;
  return result;
}

Matrix required(const rpsft_matrix* given, const Place& place, const char* why) {
  if (!given) refuse(place, ": got NULL, expected a matrix: ", why);
  return matrix(given, place);
}

void expect_shape(const Matrix& got, std::int64_t rows, std::int64_t cols, const Place& place) {
  if (got.present() && (got.rows != rows || got.cols != cols))
    refuse(place, ": got shape ", shape(got.rows, got.cols), ", expected ", shape(rows, cols));
}

// U (m, k) and V (n, k) of one dtype, or neither. Returns k, 0 without them.
std::int64_t check_bases(const Matrix& left, const Matrix& right, std::int64_t rows, std::int64_t cols, std::size_t i) {
  if (!left.present() && !right.present()) return 0;
  if (left.present() != right.present())
    refuse(Place{i, left.present() ? "right" : "left"}, ": got NULL, expected both left and right, or neither");
  expect_shape(left, rows, left.cols, {i, "left"});
  expect_shape(right, cols, left.cols, {i, "right"});
  const bool known = left.dtype == rpsft::Dtype::bfloat16 || left.dtype == rpsft::Dtype::float32;
  if (left.dtype != right.dtype || !known)
    refuse(Place{i, "right"}, ".dtype: got left and right of ", static_cast<int>(left.dtype), " and ",
           static_cast<int>(right.dtype), ", expected both RPSFT_BFLOAT16 or both RPSFT_FLOAT32");
  return left.cols;
}

rpsft::Cut cut(std::int64_t head, std::int64_t tail, const Matrix& whole, std::size_t i) {
  const bool outside = head < 0 || tail < 0 || head > whole.cols || tail > whole.cols ||
                       (head + tail > 0 && head + tail > whole.rows * whole.cols);
  if (outside)
    refuse(Place{i, "head"}, ", tail: got ", head, " and ", tail, ", expected parts of one row of ", whole.cols);
  return {head, tail};
}

std::string chosen(const char* instruction_set, int threads) {
  if (threads < 1) refuse("threads: got ", threads, ", expected at least 1");
  return instruction_set ? instruction_set : rpsft::instruction_sets().front();
}

rpsft::Projection projection(const rpsft_projection& given, std::size_t i) {
  rpsft::Projection result;
  result.weight = required(given.weight, {i, "weight"}, "W");
  const std::int64_t rows = result.weight.rows, cols = result.weight.cols;
  result.base = matrix(given.base, {i, "base"});
  result.left = matrix(given.left, {i, "left"});
  result.right = matrix(given.right, {i, "right"});
  expect_shape(result.base, rows, cols, {i, "base"});
  const std::int64_t rank = check_bases(result.left, result.right, rows, cols, i);
  if (!result.left.present() && !result.base.present())
    refuse(Place{i, "base"}, ": got NULL without left and right, expected W0: the full form is W - W0");
  if (rank > 0 && !given.drift) refuse(Place{i, "drift"}, ": got NULL, expected room for C ", shape(rank, rank));
  if (!given.square) refuse(Place{i, "square"}, ": got NULL, expected room for one number");
  result.block = given.block;
  result.drift = given.drift;
  result.square = given.square;
  result.cut = cut(given.head, given.tail, result.weight, i);
  return result;
}

rpsft::Pullback pullback(const rpsft_pullback& given, std::size_t i) {
  rpsft::Pullback result;
  result.grad = required(given.grad, {i, "grad"}, "G");
  const std::int64_t rows = result.grad.rows, cols = result.grad.cols;
  result.left = matrix(given.left, {i, "left"});
  result.right = matrix(given.right, {i, "right"});
  const std::int64_t rank = check_bases(result.left, result.right, rows, cols, i);
  if (result.left.present()) {
    if (rank > 0 && !given.drift) refuse(Place{i, "drift"}, ": got NULL, expected C ", shape(rank, rank));
  } else {
    result.weight = required(given.weight, {i, "weight"}, "W, without left and right");
    result.base = required(given.base, {i, "base"}, "W0, without left and right");
    expect_shape(result.weight, rows, cols, {i, "weight"});
    expect_shape(result.base, rows, cols, {i, "base"});
  }
  result.drift = given.drift;
  result.scale = given.scale;
  result.cut = cut(given.head, given.tail, result.grad, i);
  return result;
}

void remember(const char* words) noexcept {
  try {
    last_error() = words;
  } catch (...) {
    last_error().clear();
  }
}

// Exceptions must not cross into C.
template <class Call>
int guarded(const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("an error of an unknown kind");
  }
  return 1;
}

template <class Given, class Convert>
auto converted(const Given* given, std::size_t count, const Convert& convert) {
  if (!given && count > 0) refuse("shards: got NULL, expected ", count, " of them");
  std::vector<decltype(convert(*given, 0))> result;
  result.reserve(count);
  for (std::size_t i = 0; i < count; ++i) result.push_back(convert(given[i], i));
  return result;
}

}  // namespace

extern "C" {

RPSFT_EXPORT int rpsft_api_version(void) { return RPSFT_API_VERSION; }

RPSFT_EXPORT int rpsft_project_drift(const rpsft_projection* shards, size_t count, const char* instruction_set,
                                     int threads) {
  return guarded([&] {
    const auto list = converted(shards, count, projection);
    rpsft::project_drift(list, chosen(instruction_set, threads), threads);
  });
}

RPSFT_EXPORT int rpsft_pull_back(const rpsft_pullback* shards, size_t count, int accumulate,
                                 const char* instruction_set, int threads) {
  return guarded([&] {
    const auto list = converted(shards, count, pullback);
    rpsft::pull_back(list, accumulate != 0, chosen(instruction_set, threads), threads);
  });
}

RPSFT_EXPORT size_t rpsft_workspace_bytes(int64_t rank, const char* instruction_set, int threads) {
  size_t bytes = 0;
  guarded([&] {
    if (rank < 0) refuse("rank: got ", rank, ", expected 0 or more");
    bytes = rpsft::workspace_bytes(rank, chosen(instruction_set, threads), threads);
  });
  return bytes;
}

RPSFT_EXPORT const char* rpsft_instruction_set(size_t index) {
  const char* name = nullptr;
  guarded([&] {
    static const std::vector<std::string> names = rpsft::instruction_sets();
    if (index < names.size()) name = names[index].c_str();
  });
  return name;
}

RPSFT_EXPORT const char* rpsft_last_error(void) { return last_error().c_str(); }

}  // extern "C"
