/* Verification attention over paged keys and values: see attention.c. */
#ifndef SPECMOEOFF_ATTENTION_H
#define SPECMOEOFF_ATTENTION_H

#include "kernels.h"

/* A page: [kv head][keys, values], and for int8 the float scales [128] of the keys, then of the values. Both are strips of 64
 * columns, as packed weights are, so that a page is read from one end to the other:
 *   keys:   [128 / 64][steps of key_dim][64 tokens]           values: [value_dim / 64][steps of 128 tokens][64 or the rest]
 * where a step is a pair of bf16 or a single number of another format. */
typedef struct {
    int32_t n_heads, n_kv_heads, key_dim, value_dim, format, window; /* window: tokens that a row sees; 0: all */
} kv_shape_t;

typedef struct {
    const kv_shape_t *shape;
    const batch_t *batch;
    unsigned char *pages;
    const float *sinks;   /* (n_heads): a logit beside every row's scores; or NULL */
    const uint64_t *tree; /* (n_rows): which new tokens of its request a row sees, itself included; NULL: those before it */
    float *log_sums;      /* (n_rows, n_heads): log of the sum of e^score; or NULL */
    int32_t wide_result;  /* the result is fp32 */
} attention_t;

size_t kv_page_bytes(const kv_shape_t *s);
/* Of a number of a query. */
static inline size_t query_bytes(const kv_shape_t *s) { return s->format == KV_BF16 ? sizeof(uint16_t) : sizeof(float); }

/* Of scratch for n_rows rows where the longest request ends at position `end`. */
size_t partial_bytes(const kv_shape_t *s, int n_rows, int end);

/* For all threads of the region; ends with a barrier. Stores the new rows' keys (n_kv_heads, key_dim), row r's at keys + r * key_stride,
 * and values (n_kv_heads, value_dim). */
void append_all(const isa_t *isa, const attention_t *a, const float *keys, size_t key_stride, const float *values, size_t value_stride);

/* For all threads of the region; ends with a barrier. query: (n_rows, n_heads * key_dim), scaled, bf16 over bf16 pages and fp32
 * over others; result: (n_rows, n_heads * value_dim) bf16 or fp32. */
void attend_all(const isa_t *isa, const attention_t *a, const void *query, void *result, float *partials);

#endif
