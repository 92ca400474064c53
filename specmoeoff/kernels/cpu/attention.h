/* Verification attention over paged keys and values: see attention.c. */
#ifndef SPECMOEOFF_ATTENTION_H
#define SPECMOEOFF_ATTENTION_H

#include "kernels.h"

typedef struct {
    const layer_shape_t *shape;
    const batch_t *batch;
    uint16_t *k_pages, *v_pages; /* k: [page][kv head][dim / 2][64][2], v: [page][kv head][32][dim][2] */
} attention_t;

static inline size_t page_elements(const layer_shape_t *s) { return (size_t)s->n_kv_heads * s->head_dim * PAGE_TOKENS; }

/* Of scratch for n_rows rows where the longest request ends at position `end`. */
size_t partial_bytes(const layer_shape_t *s, int n_rows, int end);

/* For all threads of the region; ends with a barrier. query, result: (n_rows, n_heads * head_dim) bf16, query scaled. */
void attend_all(const isa_t *isa, const attention_t *a, const uint16_t *query, uint16_t *result, float *partials);

#endif
