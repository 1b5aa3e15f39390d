// Both operations on random problems against double precision: shapes that divide nothing, strided and transposed
// matrices, all dtypes and forms, flat shards cut in mid-row.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cpu/number.hpp"
#include "cpu/run.hpp"
#include "guarded_memory.hpp"

namespace {

using rpsft::Dtype;
using rpsft::Matrix;

std::mt19937_64 generator(20260510);

inline std::int64_t pick(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

inline double normal() { return std::normal_distribution<double>()(generator); }

inline double round_to(double value, Dtype dtype) {
  const float single = static_cast<float>(value);
  return dtype == Dtype::bfloat16 ? rounded_to<Bfloat16>(single)
         : dtype == Dtype::float16 ? rounded_to<Float16>(single)
                                   : single;
}

inline double rounding_unit(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? 0x1p-8 : dtype == Dtype::float16 ? 0x1p-11 : 0x1p-24;
}

// Sanitizers watch memory themselves, and closer.
#if defined(RPSFT_SANITIZE)
using Memory = std::vector<unsigned char>;
#else
using Memory = std::vector<unsigned char, Guarded<unsigned char>>;
#endif

// A matrix with memory of its own, exactly as large as it needs: every step outside is seen.
struct Held {
  std::vector<double> values;
  Memory memory;
  Matrix matrix;
  std::int64_t head = 0, tail = 0;

  double& at(std::int64_t row, std::int64_t col) { return values[row * matrix.cols + col]; }
  bool has(std::int64_t row, std::int64_t col) const {
    const std::int64_t flat = row * matrix.cols + col;
    return head <= flat && flat < matrix.rows * matrix.cols - tail;
  }
};

inline std::size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline unsigned char* place(const Held& held, std::int64_t row, std::int64_t col) {
  return static_cast<unsigned char*>(held.matrix.data) +
         (row * held.matrix.row_stride + col * held.matrix.col_stride) *
             static_cast<std::int64_t>(size_of(held.matrix.dtype));
}

inline void write(Held& held, std::int64_t row, std::int64_t col, double value) {
  unsigned char* target = place(held, row, col);
  if (held.matrix.dtype == Dtype::float32) {
    const float single = static_cast<float>(value);
    std::memcpy(target, &single, 4);
  } else if (held.matrix.dtype == Dtype::bfloat16) {
    Bfloat16 half;
    narrow(static_cast<float>(value), half);
    std::memcpy(target, &half, 2);
  } else {
    Float16 half;
    narrow(static_cast<float>(value), half);
    std::memcpy(target, &half, 2);
  }
}

inline double read(const Held& held, std::int64_t row, std::int64_t col) {
  const unsigned char* source = place(held, row, col);
  if (held.matrix.dtype == Dtype::float32) {
    float single;
    std::memcpy(&single, source, 4);
    return single;
  }
  std::uint16_t bits;
  std::memcpy(&bits, source, 2);
  return held.matrix.dtype == Dtype::bfloat16 ? widen(Bfloat16{bits}) : widen(Float16{bits});
}

// layout 0: rows contiguous; 1: columns contiguous; 2: padded rows; 3: every other column.
inline void lay_out(Held& held, Dtype dtype, int layout) {
  Matrix& m = held.matrix;
  m.dtype = dtype;
  const std::int64_t wide = layout == 2 ? m.cols + pick(1, 5) : 2 * m.cols;
  m.row_stride = layout == 0 ? m.cols : layout == 1 ? 1 : wide;
  m.col_stride = layout == 0 ? 1 : layout == 1 ? m.rows : layout == 2 ? 1 : 2;
  const std::int64_t last = m.rows && m.cols ? (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride + 1 : 0;
  const std::int64_t count = last - (layout == 0 ? held.head + held.tail : 0);
  held.memory.assign(static_cast<std::size_t>(count) * size_of(dtype), 0x7f);
  m.data = held.memory.data() - held.head * static_cast<std::int64_t>(size_of(dtype));
  for (std::int64_t r = 0; r < m.rows; ++r)
    for (std::int64_t c = 0; c < m.cols; ++c) {
      held.at(r, c) = round_to(held.at(r, c), dtype);
      if (held.has(r, c)) write(held, r, c, held.at(r, c));
    }
}

inline Held random(std::int64_t rows, std::int64_t cols, double scale) {
  Held held;
  held.matrix.rows = rows;
  held.matrix.cols = cols;
  held.values.resize(static_cast<std::size_t>(rows * cols));
  for (double& value : held.values) value = scale * normal();
  return held;
}

struct Case {
  std::int64_t rows, cols, rank;
  Dtype weight, base, basis, grad;
  int layout, form;  // 0 base, 1 block, 2 bare, 3 full
  std::int64_t head = 0, tail = 0;
  bool accumulate = true, unmoved = false;

  std::string text() const {
    return std::to_string(rows) + "x" + std::to_string(cols) + " rank " + std::to_string(rank) + " dtypes " +
           std::to_string(int(weight)) + std::to_string(int(base)) + std::to_string(int(basis)) +
           std::to_string(int(grad)) + " layout " + std::to_string(layout) + " form " + std::to_string(form) + " cut " +
           std::to_string(head) + "," + std::to_string(tail) + (accumulate ? " added" : " written");
  }
};

inline Dtype dtype() { return static_cast<Dtype>(pick(0, 2)); }

inline Dtype basis_dtype() { return pick(0, 1) ? Dtype::bfloat16 : Dtype::float32; }

inline Case random_case() {
  Case c{pick(1, 70), pick(1, 70), 1, dtype(), dtype(), basis_dtype(), dtype(), static_cast<int>(pick(0, 3)),
         static_cast<int>(pick(0, 3))};
  if (pick(0, 3) == 0) c.cols += pick(100, 500);
  if (pick(0, 3) == 0) c.rows += pick(100, 500);
  c.rank = pick(1, std::min<std::int64_t>(std::min(c.rows, c.cols), 140));
  c.accumulate = pick(0, 1);
  c.unmoved = pick(0, 4) == 0;
  if (c.layout == 0 && pick(0, 1)) {
    c.head = pick(0, c.cols - 1);
    c.tail = std::max<std::int64_t>(0, std::min(pick(0, c.cols - 1), c.rows * c.cols - c.head - pick(0, 1)));
  }
  return c;
}

// Cases of a large rank, where blocks and chunks have other sizes. They differ again for the first two, whose longer
// basis exceeds the cache.
inline Case large_case(int i, int form) {
  const std::int64_t shorter = pick(130, 150), longer = i < 2 ? pick(8000, 8020) : pick(400, 500);
  const std::int64_t rank = i < 2 ? 330 : pick(305, 340);
  const auto [rows, cols] = i % 2 ? std::pair(shorter, longer) : std::pair(longer, shorter);
  return {rows, cols, rank, dtype(), dtype(), basis_dtype(), dtype(), i % 4, form};
}

// An engine under test.
struct Subject {
  std::string name;
  bool pairs;  // multiplies pairs of bfloat16
  std::function<void(const std::vector<rpsft::Projection>&, int)> project;
  std::function<void(const std::vector<rpsft::Pullback>&, bool, int)> pull_back;
};

// An instruction set of this machine.
inline Subject subject(const std::string& name) {
  return {name, name == "avx512_bf16" || name == "amx_bf16",
          [=](const auto& items, int threads) { rpsft::project_drift(items, name, threads); },
          [=](const auto& items, bool add, int threads) { rpsft::pull_back(items, add, name, threads); }};
}

// A table of functions.
inline Subject subject(const rpsft::Kernels& kernels, bool pairs) {
  return {kernels.name, pairs,
          [=](const auto& items, int threads) { rpsft::project_drift(items, kernels, threads); },
          [=](const auto& items, bool add, int threads) { rpsft::pull_back(items, add, kernels, threads); }};
}

// Relative error allowed for a product of operands rounded to bfloat16.
constexpr double rounded_products = 0.01, exact_products = 4e-6;

inline void check(const Case& c, const Subject& subject) {
  const std::string at = subject.name + " " + c.text();
  const bool full = c.form == 3, has_base = c.form == 0 || full;
  Held weight = random(c.rows, c.cols, 0.2), base = weight;
  weight.head = base.head = c.head;
  weight.tail = base.tail = c.tail;
  lay_out(base, c.base, c.layout);
  for (std::size_t i = 0; i < weight.values.size(); ++i)
    weight.values[i] = round_to(base.values[i], c.weight) + (c.unmoved ? 0 : 0.05 * normal());
  lay_out(weight, c.weight, c.layout);
  Held left = random(c.rows, c.rank, 1 / std::sqrt(double(c.rows)));
  Held right = random(c.cols, c.rank, 1 / std::sqrt(double(c.cols)));
  lay_out(left, c.basis, static_cast<int>(pick(0, 3)));
  lay_out(right, c.basis, static_cast<int>(pick(0, 3)));

  const auto moved = [&](std::int64_t r, std::int64_t j) {
    if (!weight.has(r, j)) return 0.0;
    return weight.at(r, j) - (has_base ? round_to(base.at(r, j), c.weight) : 0);
  };
  const std::int64_t k = full ? 0 : c.rank;
  std::vector<double> first(c.rows * k), exact(k * k);
  double square = 0, size = 0, weight_size = 0;
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t j = 0; j < c.cols; ++j) {
      const double d = moved(r, j);
      weight_size += d * d;
      for (std::int64_t a = 0; a < k; ++a) first[r * k + a] += d * right.at(j, a);
    }
  std::vector<float> block(k * k);
  for (float& value : block) value = c.form == 1 ? static_cast<float>(0.3 * normal()) : 0;
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t a = 0; a < k; ++a)
      for (std::int64_t b = 0; b < k; ++b) exact[a * k + b] += left.at(r, a) * first[r * k + b];
  for (std::int64_t i = 0; i < k * k; ++i) {
    size += exact[i] * exact[i];
    exact[i] -= block[i];
    square += exact[i] * exact[i];
  }
  if (full) square = weight_size;

  std::vector<float> drift(k * k, NAN), again(k * k, NAN);
  float got = NAN, got_again = NAN;
  rpsft::Projection projection;
  projection.weight = weight.matrix;
  if (has_base) projection.base = base.matrix;
  if (!full) {
    projection.left = left.matrix;
    projection.right = right.matrix;
    if (c.form == 1) projection.block = block.data();
  }
  projection.drift = drift.data();
  projection.square = &got;
  projection.cut = {c.head, c.tail};
  subject.project({projection}, 1);
  projection.drift = again.data();
  projection.square = &got_again;
  subject.project({projection, projection}, static_cast<int>(pick(2, 5)));
  const bool same = k == 0 || std::memcmp(drift.data(), again.data(), drift.size() * 4) == 0;
  CHECK(same && to_bits(got) == to_bits(got_again),
        "%s: bits depend on the number of threads", at.c_str());

  // With a base, numbers as large as the drift are rounded; without one, nothing is.
  const bool rounds = c.form == 0 && c.basis == Dtype::bfloat16 && subject.pairs;
  const double allowed = (rounds ? rounded_products : exact_products) * std::sqrt(size + weight_size);
  double error = 0;
  for (std::int64_t i = 0; i < k * k; ++i) error += (drift[i] - exact[i]) * (drift[i] - exact[i]);
  CHECK(std::sqrt(error) <= allowed, "%s: drift off by %g of %g", at.c_str(), std::sqrt(error), std::sqrt(size));
  CHECK(std::fabs(got - square) <= 2 * allowed * std::sqrt(square) + allowed * allowed + 1e-6 * square,
        "%s: square %g, expected %g", at.c_str(), got, square);
  if (has_base && c.unmoved) {
    CHECK(got == 0, "%s: not zero at the anchor: %g", at.c_str(), got);
    for (float value : drift) CHECK(value == 0, "%s: drift not zero at the anchor", at.c_str());
  }

  if (c.form == 1 || c.form == 2) return;
  Held grad = random(c.rows, c.cols, 1.0);
  grad.head = c.head;
  grad.tail = c.tail;
  lay_out(grad, c.grad, c.layout);
  const Memory before = grad.memory;
  for (float& value : drift) value = static_cast<float>(normal());
  const float scale = static_cast<float>(normal());
  rpsft::Pullback pullback;
  pullback.grad = grad.matrix;
  if (full) {
    pullback.weight = weight.matrix;
    pullback.base = base.matrix;
  } else {
    pullback.left = left.matrix;
    pullback.right = right.matrix;
  }
  pullback.drift = drift.data();
  pullback.scale = scale;
  pullback.cut = {c.head, c.tail};
  subject.pull_back({pullback}, c.accumulate, 1);
  const Memory alone = grad.memory;
  std::copy(before.begin(), before.end(), grad.memory.begin());
  subject.pull_back({pullback}, c.accumulate, static_cast<int>(pick(2, 5)));
  CHECK(alone == grad.memory, "%s: gradient's bits depend on the number of threads", at.c_str());

  const bool in_pairs = c.basis == Dtype::bfloat16 && subject.pairs && !full;
  const double products = in_pairs ? rounded_products : exact_products;
  std::vector<double> pulled(c.rows * k);
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t a = 0; a < k; ++a)
      for (std::int64_t b = 0; b < k; ++b) pulled[r * k + b] += scale * left.at(r, a) * drift[a * k + b];
  double wrong = 0, total = 0, rounding = 0;
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t j = 0; j < c.cols; ++j) {
      if (!grad.has(r, j)) continue;
      double pull = full ? scale * moved(r, j) : 0;
      for (std::int64_t b = 0; b < k; ++b) pull += pulled[r * k + b] * right.at(j, b);
      const double wanted = pull + (c.accumulate ? grad.at(r, j) : 0), difference = read(grad, r, j) - wanted;
      wrong += difference * difference;
      total += pull * pull;
      rounding += std::pow(rounding_unit(c.grad) * wanted, 2);
      rounding += std::pow(rounding_unit(Dtype::float32) * grad.at(r, j), 2);
    }
  CHECK(std::sqrt(wrong) <= products * std::sqrt(total) + std::sqrt(rounding) + 1e-6, "%s: gradient off by %g of %g",
        at.c_str(), std::sqrt(wrong), std::sqrt(total));
  // The memory between a strided gradient's elements belongs to others.
  std::vector<bool> owned(grad.memory.size());
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t j = 0; j < c.cols; ++j)
      if (grad.has(r, j))
        for (std::size_t byte = 0; byte < size_of(c.grad); ++byte)
          owned[static_cast<std::size_t>(place(grad, r, j) - grad.memory.data()) + byte] = true;
  for (std::size_t i = 0; i < owned.size(); ++i)
    CHECK(owned[i] || grad.memory[i] == before[i], "%s: wrote beside the gradient", at.c_str());
}

inline void check_empty(const Subject& subject) {
  const std::string& isa = subject.name;
  for (auto [rows, cols, rank] : {std::array<std::int64_t, 3>{0, 5, 2}, {5, 0, 2}, {4, 5, 0}}) {
    Held weight = random(rows, cols, 1), left = random(rows, rank, 1), right = random(cols, rank, 1);
    lay_out(weight, Dtype::float32, 0);
    lay_out(left, Dtype::float32, 0);
    lay_out(right, Dtype::float32, 0);
    std::vector<float> drift(rank * rank + 1, NAN);
    float square = NAN;
    rpsft::Projection projection;
    projection.weight = weight.matrix;
    projection.left = left.matrix;
    projection.right = right.matrix;
    projection.drift = drift.data();
    projection.square = &square;
    subject.project({projection}, 2);
    CHECK(square == 0, "%s: nothing has no drift", isa.c_str());
    for (std::int64_t i = 0; i < rank * rank; ++i) CHECK(drift[i] == 0, "%s: element %d", isa.c_str(), int(i));
  }
  subject.project({}, 2);
  subject.pull_back({}, true, 2);
}

}  // namespace
