// The C API: the arguments that it refuses, its messages, and that it computes what the engine does.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/engine.hpp"
#include "rotation_penalty.h"

// Defined in header.c: uses the API from C; returns NULL, or a message about what went wrong.
extern "C" const char* used_from_c(void);

namespace {

struct Case {
  std::vector<float> w, w0, u, v, g, c, block;
  rpsft_matrix weight, base, left, right, grad;
  float square = -1;

  Case(int64_t m, int64_t n, int64_t k)
      : w(size(m, n)), w0(size(m, n)), u(size(m, k)), v(size(n, k)), g(size(m, n)), c(size(k, k)), block(size(k, k)) {
    float next = 1;
    for (auto* each : {&w, &w0, &u, &v, &g, &block})
      for (float& x : *each)
        x = (next = next * 1.7f - static_cast<float>(static_cast<int>(next * 1.7f)) + 0.01f) - 0.5f;
    weight = {w.data(), RPSFT_FLOAT32, m, n, n, 1};
    base = {w0.data(), RPSFT_FLOAT32, m, n, n, 1};
    left = {u.data(), RPSFT_FLOAT32, m, k, k, 1};
    right = {v.data(), RPSFT_FLOAT32, n, k, k, 1};
    grad = {g.data(), RPSFT_FLOAT32, m, n, n, 1};
  }

  static size_t size(int64_t rows, int64_t cols) { return static_cast<size_t>(rows * cols); }

  rpsft_projection projection() {
    return {&weight, &base, &left, &right, nullptr, c.data(), &square, 0, 0};
  }
  rpsft_pullback pullback() { return {&grad, &left, &right, nullptr, nullptr, c.data(), 2, 0, 0}; }
};

void expect_refusal(int status, const char* words) {
  CHECK(status != 0, "expected: %s", words);
  CHECK(std::strstr(rpsft_last_error(), words), "got: %s; expected: %s", rpsft_last_error(), words);
}

void computes_by_the_definition() {
  const int64_t m = 13, n = 7, k = 3;
  Case x(m, n, k);
  const std::vector<float> before = x.g;
  const rpsft_projection p = x.projection();
  const rpsft_pullback b = x.pullback();
  CHECK(rpsft_project_drift(&p, 1, nullptr, 2) == 0, "%s", rpsft_last_error());
  CHECK(rpsft_pull_back(&b, 1, 1, nullptr, 1) == 0, "%s", rpsft_last_error());
  double total = 0;
  std::vector<double> drift(static_cast<size_t>(k * k));
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < m; ++r)
        for (int64_t s = 0; s < n; ++s)
          sum += double(x.u[size_t(r * k + i)]) * (double(x.w[size_t(r * n + s)]) - double(x.w0[size_t(r * n + s)])) *
                 double(x.v[size_t(s * k + j)]);
      drift[size_t(i * k + j)] = sum;
      total += sum * sum;
      CHECK(std::abs(x.c[size_t(i * k + j)] - sum) < 1e-5, "C[%d, %d]", int(i), int(j));
    }
  CHECK(std::abs(x.square - total) < 1e-5 * (1 + total), "%g", double(x.square));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t s = 0; s < n; ++s) {
      double sum = before[size_t(r * n + s)];
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          sum += 2 * double(x.u[size_t(r * k + i)]) * drift[size_t(i * k + j)] * double(x.v[size_t(s * k + j)]);
      CHECK(std::abs(x.g[size_t(r * n + s)] - sum) < 1e-5, "G[%d, %d]", int(r), int(s));
    }
}

void refuses_by_name() {
  Case x(6, 5, 2);
  const std::vector<float> untouched = x.g;
  rpsft_projection p = x.projection();
  x.right.rows = 4;
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 1), "shards[0].right: got shape (4, 2), expected (5, 2)");
  x.right.rows = 5;
  x.left.dtype = RPSFT_FLOAT16;
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 1), "expected both RPSFT_BFLOAT16 or both RPSFT_FLOAT32");
  x.left.dtype = RPSFT_FLOAT32;
  const rpsft_projection two[2] = {p, {&x.weight, &x.left, &x.left, &x.right, nullptr, x.c.data(), &x.square, 0, 0}};
  expect_refusal(rpsft_project_drift(two, 2, nullptr, 1), "shards[1].base: got shape (6, 2), expected (6, 5)");
  p.right = nullptr;
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 1), "shards[0].right: got NULL, expected both left and right");
  p = x.projection();
  p.drift = nullptr;
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 1), "shards[0].drift: got NULL, expected room for C (2, 2)");
  p = x.projection();
  p.head = 6;
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 1), "expected parts of one row of 5");
  p = x.projection();
  expect_refusal(rpsft_project_drift(&p, 1, "sse9", 1), "sse9");
  expect_refusal(rpsft_project_drift(&p, 1, nullptr, 0), "threads: got 0, expected at least 1");
  expect_refusal(rpsft_project_drift(nullptr, 1, nullptr, 1), "shards: got NULL, expected 1 of them");
  rpsft_pullback b = x.pullback();
  b.left = b.right = nullptr;
  expect_refusal(rpsft_pull_back(&b, 1, 1, nullptr, 1), "shards[0].weight: got NULL, expected a matrix");
  CHECK(x.g == untouched && x.square == -1, "a refused call has written");
  CHECK(rpsft_project_drift(nullptr, 0, nullptr, 1) == 0, "%s", rpsft_last_error());
}

void tells_what_it_runs() {
  size_t count = 0;
  while (rpsft_instruction_set(count)) ++count;
  CHECK(count == rpsft::instruction_sets().size() && count > 0, "%d", int(count));
  CHECK(std::string(rpsft_instruction_set(count - 1)) == "portable", "%s", rpsft_instruction_set(count - 1));
  const size_t bytes = rpsft_workspace_bytes(128, nullptr, 2);
  CHECK(bytes == rpsft::workspace_bytes(128, rpsft_instruction_set(0), 2), "%zu", bytes);
  CHECK(rpsft_workspace_bytes(128, "sse9", 2) == 0, "%s", rpsft_last_error());
}

void serves_the_full_form() {
  Case x(6, 5, 2);
  rpsft_projection p{&x.weight, &x.base, nullptr, nullptr, nullptr, nullptr, &x.square, 0, 0};
  CHECK(rpsft_project_drift(&p, 1, "portable", 1) == 0, "%s", rpsft_last_error());
  double total = 0;
  for (size_t i = 0; i < x.w.size(); ++i) total += double(x.w[i] - x.w0[i]) * double(x.w[i] - x.w0[i]);
  CHECK(std::abs(x.square - total) < 1e-5 * total, "%g", double(x.square));
  rpsft_pullback b{&x.grad, nullptr, nullptr, &x.weight, &x.base, nullptr, 3, 0, 0};
  CHECK(rpsft_pull_back(&b, 1, 0, "portable", 1) == 0, "%s", rpsft_last_error());
  for (size_t i = 0; i < x.w.size(); ++i) CHECK(std::abs(x.g[i] - 3 * (x.w[i] - x.w0[i])) < 1e-6, "G[%zu]", i);
}

// C = U^T W V serves as a block B: in block form W then has no drift left, to the last bit.
void serves_the_bare_form() {
  const int64_t m = 9, n = 6, k = 2;
  Case x(m, n, k);
  rpsft_projection bare{&x.weight, nullptr, &x.left, &x.right, nullptr, x.block.data(), &x.square, 0, 0};
  CHECK(rpsft_project_drift(&bare, 1, nullptr, 1) == 0, "%s", rpsft_last_error());
  double total = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < m; ++r)
        for (int64_t s = 0; s < n; ++s)
          sum += double(x.u[size_t(r * k + i)]) * double(x.w[size_t(r * n + s)]) * double(x.v[size_t(s * k + j)]);
      total += sum * sum;
      CHECK(std::abs(x.block[size_t(i * k + j)] - sum) < 1e-5, "C[%d, %d]", int(i), int(j));
    }
  CHECK(total > 0 && std::abs(x.square - total) < 1e-5 * (1 + total), "%g", double(x.square));
  rpsft_projection block{&x.weight, nullptr, &x.left, &x.right, x.block.data(), x.c.data(), &x.square, 0, 0};
  CHECK(rpsft_project_drift(&block, 1, nullptr, 2) == 0, "%s", rpsft_last_error());
  CHECK(x.square == 0, "%g", double(x.square));
}

}  // namespace

int main() {
  CHECK(rpsft_api_version() == RPSFT_API_VERSION, "%d", rpsft_api_version());
  const char* wrong = used_from_c();
  CHECK(wrong == nullptr, "%s", wrong);
  serves_the_bare_form();
  computes_by_the_definition();
  refuses_by_name();
  tells_what_it_runs();
  serves_the_full_form();
  return failures() != 0;
}
