/* Feed-forward experts, and the formats their weights are packed in. */
#ifndef SPECMOEOFF_EXPERTS_H
#define SPECMOEOFF_EXPERTS_H

#include "kernels.h"

/* Some experts of one shape. weights[e] serves slots[start[e] .. start[e + 1]), or, where slots is NULL, those numbers
 * themselves; slot = row * n_active + rank. biases[e]: of gate, up and down (2 * intermediate + hidden), biases NULL: none. */
typedef struct {
    int hidden, intermediate, n_active, format, n_experts;
    const unsigned char *const *weights;
    const float *const *biases;
    const swiglu_t *swiglu;
    const int32_t *slots, *start;
} experts_t;

size_t smo_experts_scratch_bytes(int hidden, int intermediate, int format, int halves, int n_slots);
/* out[slot] (hidden), by all threads of the region; ends with a barrier. */
void expert_rows(const isa_t *isa, const experts_t *x, const uint16_t *normed, float *out, unsigned char *scratch);
/* What rows chose of a layer's experts, those in memory first: the i-th has slots start[i] .. start[i + 1]. */
typedef struct {
    int n_used, n_present;
    int32_t experts[MAX_EXPERTS], start[MAX_EXPERTS + 1];
    const unsigned char *weights[MAX_EXPERTS];
    const float *biases[MAX_EXPERTS];
} routes_t;
/* Sorts the slots of index (n_slots) by expert of the table, where weights[e] is NULL unless expert e is in memory. 0: there is no
 * such expert. */
int sort_slots(const experts_t *table, const int32_t *index, int n_slots, int32_t *slots, routes_t *routes);
/* The experts in memory for their slots, by all threads of the region; and, where none is missing, what combine_rows does. */
void feed_forward_rows(const isa_t *isa, const experts_t *table, const routes_t *routes, const int32_t *slots, int m, const uint16_t *normed,
                       float *x, float *out, const float *weight, unsigned char *scratch);
/* x[row] += sum over ranks, in order, of weight * expert_out[row][rank]; ends with a barrier. */
void combine_rows(const isa_t *isa, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight);

#endif
