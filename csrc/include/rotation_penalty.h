/* The CPU engine of the rotation penalty (arXiv 2605.10973) for programs without Python, in C.
 *
 *   rpsft_project_drift   C = U^T (W - W0) V - B   and   ||C||_F^2
 *   rpsft_pull_back       G = scale * U C V^T      or    G += scale * U C V^T
 *
 * The penalty is R = sum of ||C||_F^2 over weights and dR/dW = 2 U C V^T: project, then pull back with scale = 2 coeff.
 *
 * Functions that compute return 0, or another number where they refuse their arguments: rpsft_last_error() then names
 * the argument, what came and what was expected, and nothing has been written. Functions may be called from several
 * threads.
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

/* One weight W (m, n), or the shard of it in this memory.
 *
 * base form: left U (m, k), right V (n, k), both bfloat16 or both float32, and base W0 (m, n).
 * block form: left, right and block B (k, k), float32, contiguous.
 * bare form: left and right alone, C = U^T W V. With W0 as the weight, C is a block B.
 * full form: base alone. C is then W - W0 itself: drift is not written and may be NULL.
 *
 * head and tail: the numbers of elements that are missing at the beginning of the first row and at the end of the last,
 * where the shard is a contiguous range of a row-major weight; 0 otherwise. These are never read or written.
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

/* One gradient G (m, n) in any of the dtypes. It needs weight and base in the full form, else left, right and drift. */
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

/* RPSFT_API_VERSION of the linked library, which callers compare with that of this header. */
int rpsft_api_version(void);

/* instruction_set: one of rpsft_instruction_set(), or NULL for the best. threads: at least 1. Results have the same
 * bits for every number of threads; they depend on the instruction set. */
int rpsft_project_drift(const rpsft_projection* shards, size_t count, const char* instruction_set, int threads);
int rpsft_pull_back(const rpsft_pullback* shards, size_t count, int accumulate, const char* instruction_set,
                    int threads);

/* The most bytes that a calling thread allocates and keeps; 0 for an unknown instruction set. */
size_t rpsft_workspace_bytes(int64_t rank, const char* instruction_set, int threads);

/* The instruction sets that this library contains and this processor supports, best first; NULL past the last. */
const char* rpsft_instruction_set(size_t index);

/* The message of this thread's last refused call; "" if there is none. It is valid until the thread's next call. */
const char* rpsft_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
