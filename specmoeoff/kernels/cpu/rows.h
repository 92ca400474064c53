/* Passes over rows for all threads of a parallel region; each ends with a barrier. */
#ifndef SPECMOEOFF_ROWS_H
#define SPECMOEOFF_ROWS_H

#include "kernels.h"

enum { GROUP_ROWS = 48 };

const isa_t *isa_of(int index);

/* Where a product goes: row r at out + r * stride, added to what is there or not. bias (n_out), scale (m) or NULL. */
typedef struct {
    float *out;
    size_t stride;
    int add;
    const float *bias, *scale;
} target_t;

/* scale * (x (m, n_in) . w^T + bias) */
void linear_rows(const isa_t *isa, const uint16_t *x, int m, int n_in, const uint16_t *w, int n_out, target_t target);
void rmsnorm_rows(const isa_t *isa, const float *x, size_t x_stride, int m, int n, const float *weight, float eps, uint16_t *out);
/* experts[e] serves slots[start[e] .. start[e + 1]), or, where slots is NULL, those numbers themselves; slot = row * n_active +
 * rank; out[slot] (hidden). */
void expert_rows(const isa_t *isa, int hidden, int intermediate, int n_active, const uint16_t *normed, int n_experts,
                 const uint16_t *const *experts, const int32_t *slots, const int32_t *start, float *out, unsigned char *scratch);
/* x[row] += sum over ranks, in order, of weight * expert_out[row][rank] */
void combine_rows(const isa_t *isa, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight);

#endif
