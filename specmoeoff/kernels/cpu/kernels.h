/* CPU kernels: shapes, and what an instruction set must provide. bf16 is uint16_t everywhere.
 *
 * Everything that multiplies goes through one primitive, `tile`: rows against a strip of at most 64 columns. A step of the
 * summed dimension is a pair of bf16 in both (VNNI layout), or one fp32 of the rows and one fp16, fp32 or int8 of the strip.
 * Each output element is one chain of accumulations in the order of the
 * summed dimension, however many rows a tile has: that is what makes a row's bits independent of its neighbours.
 */
#ifndef SPECMOEOFF_KERNELS_H
#define SPECMOEOFF_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { COLUMNS = 64, LANES = 16, PAGE_TOKENS = 128, TILE_ROWS = 6 };
enum { FORMATS_N = 4 }; /* of numbers: see attention.h */
#define LOWEST (-1e30f)
/* A row's reference follows its highest score only when that exceeds it by more: what is above 1 is as exact as what is below. */
#define SLACK 8.f

/* Part of a strip; and what comes next, to be fetched meanwhile: a row of 64 columns at fetch + step * fetch_step. */
typedef struct {
    const unsigned char *w;
    size_t w_stride; /* bytes from step to step */
    int steps;
    const char *fetch;
    size_t fetch_step;
} part_t;

typedef struct {
    const char *name;
    int (*supported)(void);
    /* out[r][0 .. 16 * vectors) (+)= sum over steps of x[r] . w, for a strip of each format. rows in 1 .. TILE_ROWS. */
    void (*tile[FORMATS_N])(int rows, const void *const *x, part_t part, int vectors, int accumulate, float *out, size_t out_stride);
    /* out = bf16(x * rsqrt(mean(x^2) + eps) * weight); n a multiple of 16 */
    void (*rmsnorm)(const float *x, const float *weight, float eps, int n, uint16_t *out);
    /* out = bf16(scale * x); n a multiple of 16 */
    void (*to_bf16)(const float *x, float scale, int n, uint16_t *out);
    void (*to_fp16)(const float *x, int n, uint16_t *out);
    void (*scale)(const float *x, float scale, int n, float *out);
    /* out = bf16(silu(gate) * up); n a multiple of 16 */
    void (*silu_mul)(const float *gate, const float *up, int n, uint16_t *out);
    /* x += y; n a multiple of 16 */
    void (*add)(float *x, const float *y, int n);
    /* x += a * y, product rounded before the sum; n a multiple of 16 */
    void (*add_scaled)(float *x, float a, const float *y, int n);
    /* One online-softmax step over the scores of a page: probabilities, e^(score - reference), become bf16 or (`wide`) fp32, and
     * exactly 0 where `mask` (16 bits a vector; NULL: all) has none; reference, sums (one a lane) and output (n floats) stay
     * consistent. `scales`: what a score and then a probability is to be multiplied with; or NULL. */
    void (*softmax)(const float *scores, const uint16_t *mask, const float *scales, float *reference, float *sums, float *output, int n,
                    int wide, void *probabilities);
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
    const float *input_norm;    /* (hidden) */
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
