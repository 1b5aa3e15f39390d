// Cases for kernels with matrix units, whatever their tile registers are.
#pragma once

#include "engine_cases.hpp"

namespace {

// Blocks and chunks have other sizes where the longer basis is large, and again at large ranks.
inline void check_sizes(const Subject& engine) {
  for (int i = 2; i < 6; ++i)
    for (int form = 0; form < 2; ++form) check(large_case(i, form), engine);
  const Dtype half = Dtype::bfloat16, single = Dtype::float32;
  check({290, 1990, 270, half, half, half, half, 0, 0}, engine);
  check({1990, 290, 270, single, half, half, single, 0, 0}, engine);
  check({450, 470, 440, half, half, half, half, 0, 0}, engine);
}

// Whole strips, in place and contiguous: the way of real layers.
inline void check_whole(const Subject& engine) {
  for (Dtype weight : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
    for (Dtype base : {Dtype::bfloat16, Dtype::float32})
      for (auto [rows, cols] : {std::pair<std::int64_t, std::int64_t>{128, 448}, {448, 128}})
        for (bool add : {true, false})
          check({rows, cols, 64, weight, base, Dtype::bfloat16, weight, 0, 0, 0, 0, add}, engine);
  // One less and one more than whole.
  for (std::int64_t rank : {31, 32, 33, 63, 65})
    for (auto [rows, cols] : {std::pair<std::int64_t, std::int64_t>{97, 127}, {129, 95}})
      check({rows, cols, rank, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, 0, 0}, engine);
}

// Cases in which kernels for matrix units have the same bits whatever their vectors and tile registers are: vectors
// only pack, and round as each other do.
inline std::vector<Case> cases_of_bits() {
  const Dtype half = Dtype::bfloat16, single = Dtype::float32;
  std::vector<Case> cases{{96, 160, 64, half, half, half, half, 0, 0}, {170, 90, 45, half, half, half, half, 0, 0}};
  cases.push_back({130, 700, 70, single, half, half, single, 2, 0});
  cases.push_back({350, 64, 33, Dtype::float16, single, half, half, 1, 0});
  return cases;
}

// C, R and the gradient, on two threads, of a problem that is the same at every call.
inline std::vector<unsigned char> bits_of(const Subject& engine, const Case& c) {
  const std::mt19937_64 kept = generator;
  generator.seed(7);
  Held weight = random(c.rows, c.cols, 0.1), base = random(c.rows, c.cols, 0.1);
  Held left = random(c.rows, c.rank, 0.1), right = random(c.cols, c.rank, 0.1), grad = random(c.rows, c.cols, 0.1);
  lay_out(weight, c.weight, c.layout);
  lay_out(base, c.base, c.layout);
  lay_out(left, c.basis, 0);
  lay_out(right, c.basis, 0);
  lay_out(grad, c.grad, c.layout);
  generator = kept;
  std::vector<float> drift(c.rank * c.rank + 1);
  rpsft::Projection projection;
  projection.weight = weight.matrix;
  projection.base = base.matrix;
  projection.left = left.matrix;
  projection.right = right.matrix;
  projection.drift = drift.data();
  projection.square = &drift.back();
  engine.project({projection}, 2);
  rpsft::Pullback pullback;
  pullback.grad = grad.matrix;
  pullback.left = left.matrix;
  pullback.right = right.matrix;
  pullback.drift = drift.data();
  pullback.scale = 0.7f;
  engine.pull_back({pullback}, true, 2);
  std::vector<unsigned char> bits(4 * drift.size());
  std::memcpy(bits.data(), drift.data(), bits.size());
  bits.insert(bits.end(), grad.memory.begin(), grad.memory.end());
  return bits;
}

}  // namespace
