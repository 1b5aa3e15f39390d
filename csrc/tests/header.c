/* The interface as a program in C sees it: compiled as C99, with pedantic warnings as errors. */
#include "rotation_penalty.h"

const char* used_from_c(void);

const char* used_from_c(void) {
  float w[6] = {1, 2, 3, 4, 5, 6}, w0[6] = {0, 2, 3, 4, 5, 6}, u[2] = {1, 0}, v[3] = {1, 0, 0};
  float drift = 0, square = 0, g[6] = {0, 0, 0, 0, 0, 0};
  rpsft_matrix weight = {0}, base, left, right, grad;
  rpsft_projection projection = {0};
  rpsft_pullback pullback = {0};

  weight.data = w;
  weight.dtype = RPSFT_FLOAT32;
  weight.rows = 2;
  weight.cols = 3;
  weight.row_stride = 3;
  weight.col_stride = 1;
  base = grad = weight;
  base.data = w0;
  grad.data = g;
  left = right = weight;
  left.data = u;
  right.data = v;
  right.rows = 3;
  left.cols = right.cols = left.row_stride = right.row_stride = 1;

  projection.weight = &weight;
  projection.base = &base;
  projection.left = &left;
  projection.right = &right;
  projection.drift = &drift;
  projection.square = &square;
  pullback.grad = &grad;
  pullback.left = &left;
  pullback.right = &right;
  pullback.drift = &drift;
  pullback.scale = 2;

  if (rpsft_api_version() != RPSFT_API_VERSION) return "another version of the library";
  if (rpsft_instruction_set(0) == NULL || rpsft_instruction_set(99) != NULL) return "instruction sets";
  if (rpsft_project_drift(&projection, 1, NULL, 1) != 0) return rpsft_last_error();
  if (drift != 1 || square != 1) return "C is not the one element by which W differs from W0";
  if (rpsft_pull_back(&pullback, 1, 0, "portable", 1) != 0) return rpsft_last_error();
  if (g[0] != 2 || g[1] != 0 || g[5] != 0) return "G is not 2 U C V^T";
  return NULL;
}
