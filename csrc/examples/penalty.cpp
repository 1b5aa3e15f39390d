// The rotation penalty of one weight in a training loop without Python: W drifts from W0, and descending along the
// penalty's gradient brings the drift within the anchored subspaces back to nothing.
//
// U and V here are the first unit vectors, so that the result is easy to see: the k x k corner of W - W0 vanishes, and
// all else stays. A real anchor holds the leading singular vectors of W0.
#include <cmath>
#include <cstdio>
#include <vector>

#include "rotation_penalty.h"

namespace {

constexpr int64_t rows = 96, cols = 64, rank = 8;
constexpr float coeff = 0.5f, rate = 0.2f;

rpsft_matrix matrix_of(std::vector<float>& data, int64_t r, int64_t c) {
  return {data.data(), RPSFT_FLOAT32, r, c, c, 1};
}

std::vector<float> unit_vectors(int64_t length) {
  std::vector<float> basis(static_cast<size_t>(length * rank));
  for (int64_t i = 0; i < rank; ++i) basis[static_cast<size_t>(i * rank + i)] = 1;
  return basis;
}

}  // namespace

int main() {
  std::vector<float> pretrained(rows * cols), weight(rows * cols), gradient(rows * cols), drift(rank * rank);
  for (size_t i = 0; i < weight.size(); ++i) {
    pretrained[i] = std::sin(static_cast<float>(i));
    weight[i] = pretrained[i] + 0.01f * std::cos(3 * static_cast<float>(i));
  }
  std::vector<float> u = unit_vectors(rows), v = unit_vectors(cols);
  const rpsft_matrix w = matrix_of(weight, rows, cols), w0 = matrix_of(pretrained, rows, cols);
  const rpsft_matrix left = matrix_of(u, rows, rank), right = matrix_of(v, cols, rank);
  const rpsft_matrix grad = matrix_of(gradient, rows, cols);

  float penalty = 0, first = 0;
  const rpsft_projection projection{&w, &w0, &left, &right, nullptr, drift.data(), &penalty, 0, 0};
  const rpsft_pullback pullback{&grad, &left, &right, nullptr, nullptr, drift.data(), 2 * coeff, 0, 0};
  std::printf("instruction set: %s\n", rpsft_instruction_set(0));
  for (int step = 0; step < 40; ++step) {
    if (rpsft_project_drift(&projection, 1, nullptr, 2) || rpsft_pull_back(&pullback, 1, 0, nullptr, 2)) {
      std::fprintf(stderr, "%s\n", rpsft_last_error());
      return 1;
    }
    if (step == 0) first = penalty;
    if (step % 10 == 0) std::printf("step %2d: R = %.3e\n", step, static_cast<double>(penalty));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] -= rate * gradient[i];
  }
  const double outside = std::fabs(static_cast<double>(weight[rank] - pretrained[rank]));
  std::printf("R fell from %.3e to %.3e; a drift outside the subspaces is still %.3e\n", static_cast<double>(first),
              static_cast<double>(penalty), outside);
  return first > 0 && penalty < 1e-3f * first && outside > 0 ? 0 : 1;
}
