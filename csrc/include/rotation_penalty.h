/* The CPU engine of the rotation penalty (arXiv 2605.10973) for programs without Python, in C.
 *
 *   rpsft_project_drift   C = U^T (W - W0) V - B   and   ||C||_F^2
 *   rpsft_pull_back       G = scale * U C V^T      or    G += scale * U C V^T
 *
 * The penalty is R = sum of ||C||_F^2 over weights and dR/dW = 2 U C V^T: project, then pull back with scale = 2 coeff.
 *
 * Every function returns 0, or another number where it refused: rpsft_last_error() then says what was wrong, what came
 * and what was expected. Nothing has been written in that case. Functions may be called from several threads.
 */
#ifndef RPSFT_ROTATION_PENALTY_H
#define RPSFT_ROTATION_PENALTY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RPSFT_API_VERSION 1

typedef enum { RPSFT_BFLOAT16 = 0, RPSFT_FLOAT16 = 1, RPSFT_FLOAT32 = 2 } rpsft_dtype;

/* A matrix in memory; strides in elements. */
typedef struct {
  void* data;
  rpsft_dtype dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
} rpsft_matrix;

/* One weight W (m, n), or the part of it at hand.
 *
 * base form: left U (m, k), right V (n, k), both bfloat16 or both float32, and base W0 (m, n).
 * block form: left, right and block B (k, k), float32, contiguous.
 * bare form: left and right alone, C = U^T W V: a block is made of W0 by it.
 * full form: base alone. C is then W - W0 itself: drift is not written and may be NULL.
 *
 * head and tail: how many elements are missing at the beginning of the first row and at the end of the last, where the
 * part at hand is a contiguous range of a row-major weight; 0 otherwise. They are never read or written.
 */
typedef struct {
  const rpsft_matrix* weight;
  const rpsft_matrix* base;  /* NULL where the form has none */
  const rpsft_matrix* left;  /* NULL in the full form */
  const rpsft_matrix* right; /* NULL in the full form */
  const float* block;        /* NULL where the form has none */
  float* drift;              /* C (k, k), contiguous; written */
  float* square;             /* ||C||_F^2; one number, written */
  int64_t head, tail;
} rpsft_projection;

/* One gradient G (m, n) in any of the dtypes. Of the full form weight and base, else left, right and drift. */
typedef struct {
  const rpsft_matrix* grad;
  const rpsft_matrix* left;
  const rpsft_matrix* right;
  const rpsft_matrix* weight;
  const rpsft_matrix* base;
  const float* drift; /* C (k, k), contiguous */
  float scale;
  int64_t head, tail;
} rpsft_pullback;

/* RPSFT_API_VERSION of the library that is linked, to be compared with that of this header. */
int rpsft_api_version(void);

/* instruction_set: one of rpsft_instruction_set(), or NULL for the best. threads: at least 1. Results have the same
 * bits for every number of threads; they depend on the instruction set. */
int rpsft_project_drift(const rpsft_projection* shards, size_t count, const char* instruction_set, int threads);
int rpsft_pull_back(const rpsft_pullback* shards, size_t count, int accumulate, const char* instruction_set,
                    int threads);

/* Bytes at most that a calling thread takes beside the arguments, and keeps; 0 for an unknown instruction set. */
size_t rpsft_workspace_bytes(int64_t rank, const char* instruction_set, int threads);

/* The instruction sets that this library carries and this processor has, best first; NULL past the last. */
const char* rpsft_instruction_set(size_t index);

/* Of the last call in this thread that refused; "" where none has. Valid until the thread's next call. */
const char* rpsft_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
