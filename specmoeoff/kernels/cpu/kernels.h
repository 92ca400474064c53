/* CPU kernels: shapes, and what an instruction set must provide. bf16 is uint16_t everywhere.
 *
 * Everything that multiplies goes through one primitive, `tile`: rows of bf16 pairs against a strip of at most 64 columns
 * whose rows are bf16 pairs too (VNNI layout). Each output element is one chain of accumulations in the order of the
 * summed dimension, however many rows a tile has: that is what makes a row's bits independent of its neighbours.
 */
#ifndef SPECMOEOFF_KERNELS_H
#define SPECMOEOFF_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { COLUMNS = 64, LANES = 16, PAGE_TOKENS = 64, TILE_ROWS = 6, BLOCK_PAGES = 2, MAX_PIECES = BLOCK_PAGES };
enum { BLOCK_TOKENS = BLOCK_PAGES * PAGE_TOKENS };
#define LOWEST (-1e30f)
/* A row's reference follows its highest score only when that exceeds it by more: what is above 1 is as exact as what is below. */
#define SLACK 8.f

typedef struct {
    const char *name;
    int (*supported)(void);
    /* out[r][0 .. 16 * vectors) (+)= sum over pairs of x[r] . w; the strip lies in pieces of piece_pairs rows, row p of one at
     * w[piece] + p * w_stride. rows in 1 .. TILE_ROWS. Meanwhile fetches what comes next: 64 * vectors bytes at
     * next[piece] + p * next_step (bytes) for every pair. */
    void (*tile)(int rows, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride, int pairs, int piece_pairs,
                 int vectors, int accumulate, float *out, size_t out_stride, const char *const *next, size_t next_step);
    /* out = bf16(x * rsqrt(mean(x^2) + eps) * weight); n a multiple of 16 */
    void (*rmsnorm)(const float *x, const float *weight, float eps, int n, uint16_t *out);
    /* out = bf16(scale * x); n a multiple of 16 */
    void (*to_bf16)(const float *x, float scale, int n, uint16_t *out);
    /* out = bf16(silu(gate) * up); n a multiple of 16 */
    void (*silu_mul)(const float *gate, const float *up, int n, uint16_t *out);
    /* x += y; n a multiple of 16 */
    void (*add)(float *x, const float *y, int n);
    /* x += a * y, product rounded before the sum; n a multiple of 16 */
    void (*add_scaled)(float *x, float a, const float *y, int n);
    /* One online-softmax step over BLOCK_TOKENS scores of which the first `visible` count: probabilities, e^(score - reference),
     * become bf16 and exactly 0 beyond; reference, sums (one a lane) and output (n floats) stay consistent. */
    void (*softmax)(const float *scores, int visible, float *reference, float *sums, float *output, int n, uint16_t *probabilities);
    float (*sum_of)(const float *lanes);
    /* Adds what another range found; references, sums and outputs as softmax leaves them. */
    void (*merge)(float *reference, float *sums, float *output, float other, const float *other_sums, const float *other_output,
                  int n);
} isa_t;

extern const isa_t isa_scalar;
#if defined(__x86_64__)
extern const isa_t isa_avx2, isa_avx512bf16;
#endif

typedef struct {
    int32_t hidden, n_heads, n_kv_heads, head_dim, intermediate, n_experts, n_active;
    float rms_eps;
} layer_shape_t;

typedef struct {
    const float *input_norm;    /* (hidden); NULL: none */
    const uint16_t *qkv;        /* packed, n_out = (n_heads + 2 n_kv_heads) * head_dim */
    const uint16_t *o;          /* packed, n_out = hidden */
    const float *post_norm;     /* (hidden) */
    const uint16_t *router;     /* packed, n_out = n_experts; NULL for a dense model */
    const float *cosines, *sines; /* (n_positions, head_dim / 2) */
} layer_t;

typedef struct {
    int32_t n_requests, n_rows, max_pages;
    const int32_t *row_start;      /* (n_requests + 1) */
    const int32_t *first_position; /* (n_requests) */
    const int32_t *page_table;     /* (n_requests, max_pages) */
} batch_t;

#endif
