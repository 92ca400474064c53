/* Passes over rows for all threads of a parallel region; each ends with a barrier. */
#ifndef SPECMOEOFF_ROWS_H
#define SPECMOEOFF_ROWS_H

#include "kernels.h"

enum { GROUP_ROWS = 48 };

const isa_t *isa_of(int index);

/* weight (n_out, n_in halves) row-major -> strips [n_out / 64][n_in / 2][64][2], missing columns zero. */
void smo_pack_linear(const uint16_t *weight, int n_out, int n_in, uint16_t *out);

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

#endif
