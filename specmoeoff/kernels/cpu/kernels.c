/* Packing, threading and the passes of a decoder layer, for whichever instruction set was chosen. No intrinsics here.
 *
 * Every call is one parallel region; phases inside it are separated by the barriers of `omp for`. A work item is a strip of
 * 64 output columns times all rows (or a group of them): weights come from memory once, rows stay in the L2 cache.
 */
#define _GNU_SOURCE
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "kernels.h"
#include "threads.h"
#include "tiles.h"

enum { GROUP_ROWS = 48 };

static const isa_t *const ISAS[] = {
#if defined(__x86_64__)
    &isa_avx512bf16,
    &isa_avx2,
#endif
    &isa_scalar,
};

/* ---- packing ------------------------------------------------------------------------------------------------------------ */

int smo_isa_count(void) { return (int)(sizeof ISAS / sizeof *ISAS); }
const char *smo_isa_name(int i) { return ISAS[i]->name; }
int smo_isa_supported(int i) { return ISAS[i]->supported(); }

size_t smo_packed_linear_bytes(int n_out, int n_in) { return (size_t)strips(n_out) * strip_elements(n_in) * 2; }

/* weight (n_out, n_in) row-major -> strips [n_out / 64][n_in / 2][64][2], missing columns zero. */
void smo_pack_linear(const uint16_t *weight, int n_out, int n_in, uint16_t *out)
{
    memset(out, 0, smo_packed_linear_bytes(n_out, n_in));
    for (int o = 0; o < n_out; o++) {
        const uint16_t *row = weight + (size_t)o * n_in;
        uint16_t *column = out + (size_t)(o / COLUMNS) * strip_elements(n_in) + (size_t)(o % COLUMNS) * 2;
        for (int i = 0; i < n_in; i += 2) {
            column[(size_t)i * COLUMNS] = row[i];
            column[(size_t)i * COLUMNS + 1] = row[i + 1];
        }
    }
}

/* Expert: for every 64 intermediate columns the gate strip and the up strip, then the strips of down. */
static size_t down_offset(int hidden, int intermediate) { return 2 * (size_t)strips(intermediate) * strip_elements(hidden); }
static int padded(int n) { return strips(n) * COLUMNS; }

size_t smo_packed_expert_bytes(int hidden, int intermediate)
{
    return 2 * (down_offset(hidden, intermediate) + (size_t)strips(hidden) * strip_elements(padded(intermediate)));
}

void smo_pack_expert(const uint16_t *gate, const uint16_t *up, const uint16_t *down, int hidden, int intermediate, uint16_t *out)
{
    const size_t strip = strip_elements(hidden);
    memset(out, 0, smo_packed_expert_bytes(hidden, intermediate));
    for (int s = 0; s < strips(intermediate); s++) {
        const int first = s * COLUMNS, n = intermediate - first < COLUMNS ? intermediate - first : COLUMNS;
        smo_pack_linear(gate + (size_t)first * hidden, n, hidden, out + (size_t)(2 * s) * strip);
        smo_pack_linear(up + (size_t)first * hidden, n, hidden, out + (size_t)(2 * s + 1) * strip);
    }
    uint16_t *packed = out + down_offset(hidden, intermediate);
    const int wide = padded(intermediate);
    for (int o = 0; o < hidden; o++)
        for (int i = 0; i < intermediate; i++)
            packed[(size_t)(o / COLUMNS) * strip_elements(wide) + (size_t)(i / 2) * 2 * COLUMNS + (size_t)(o % COLUMNS) * 2 +
                   (size_t)(i % 2)] = down[(size_t)o * intermediate + i];
}

/* out (M, n_out) = x . w^T for all threads of the region; ends with a barrier. `add_to` adds to what out holds. */
static void linear_rows(const isa_t *isa, const uint16_t *x, int m, int n_in, const uint16_t *w, int n_out, float *out, int add_to)
{
    const int n_strips = strips(n_out), groups = (m + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma omp for schedule(dynamic, 1)
    for (int item = 0; item < n_strips * groups; item++) {
        const int s = item / groups, first = item % groups * GROUP_ROWS, n = m - first < GROUP_ROWS ? m - first : GROUP_ROWS;
        const int columns = n_out - s * COLUMNS < COLUMNS ? n_out - s * COLUMNS : COLUMNS;
        const uint16_t *rows[GROUP_ROWS], *strip = w + (size_t)s * strip_elements(n_in);
        float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
        for (int r = 0; r < n; r++) rows[r] = x + (size_t)(first + r) * n_in;
        strip_rows(isa, rows, n, strip, n_in, columns, result, COLUMNS, strip + (size_t)omp_get_num_threads() * strip_elements(n_in));
        for (int r = 0; r < n; r++) {
            float *target = out + (size_t)(first + r) * n_out + s * COLUMNS;
            if (!add_to) memcpy(target, result + r * COLUMNS, sizeof(float) * (size_t)columns);
            else for (int i = 0; i < columns; i++) target[i] += result[r * COLUMNS + i];
        }
    }
}

void smo_linear(int isa, int threads, const uint16_t *x, int m, int n_in, const uint16_t *w, int n_out, float *out)
{
    EACH_THREAD(threads, linear_rows(ISAS[isa], x, m, n_in, w, n_out, out, 0));
}

/* Without a weight, x as it is. */
static void rmsnorm_rows(const isa_t *isa, const float *x, int m, int n, const float *weight, float eps, uint16_t *out)
{
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++)
        if (weight) isa->rmsnorm(x + (size_t)r * n, weight, eps, n, out + (size_t)r * n);
        else isa->to_bf16(x + (size_t)r * n, 1.f, n, out + (size_t)r * n);
}

void smo_rmsnorm(int isa, int threads, const float *x, int m, int n, const float *weight, float eps, uint16_t *out)
{
    EACH_THREAD(threads, rmsnorm_rows(ISAS[isa], x, m, n, weight, eps, out));
}

/* ---- attention ---------------------------------------------------------------------------------------------------------- */

/* Rotate and store one row's keys and values; scale and round its queries. qkv: (heads + 2 kv heads) * dim floats. */
static void append_row(const isa_t *isa, const attention_t *a, const layer_t *layer, int request, int row, float *qkv, uint16_t *query)
{
    const layer_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int dim = s->head_dim, half = dim / 2, index = row - b->row_start[request];
    const int position = b->first_position[request] + index, slot = position % PAGE_TOKENS;
    const int is_last = row + 1 == b->row_start[request + 1];
    const float *cosines = layer->cosines + (size_t)position * half, *sines = layer->sines + (size_t)position * half;
    for (int head = 0; head < s->n_heads + s->n_kv_heads; head++) {
        float *x = qkv + (size_t)head * dim;
        for (int i = 0; i < half; i++) {
            const float low = x[i], high = x[i + half];
            x[i] = low * cosines[i] - high * sines[i];
            x[i + half] = high * cosines[i] + low * sines[i];
        }
    }
    isa->to_bf16(qkv, 1.f / sqrtf((float)dim), s->n_heads * dim, query);

    uint16_t rounded[1024];
    const size_t page = (size_t)b->page_table[(size_t)request * b->max_pages + position / PAGE_TOKENS] * page_elements(s);
    for (int head = 0; head < s->n_kv_heads; head++) {
        const size_t base = page + (size_t)head * dim * PAGE_TOKENS;
        isa->to_bf16(qkv + (size_t)(s->n_heads + head) * dim, 1.f, dim, rounded);
        uint16_t *keys = a->k_pages + base + (size_t)slot * 2;
        for (int i = 0; i < dim; i++) keys[(size_t)(i / 2) * 2 * PAGE_TOKENS + (size_t)(i % 2)] = rounded[i];
        isa->to_bf16(qkv + (size_t)(s->n_heads + s->n_kv_heads + head) * dim, 1.f, dim, rounded);
        uint16_t *values = a->v_pages + base + (size_t)(slot / 2) * 2 * (size_t)dim + (size_t)(slot % 2);
        for (int i = 0; i < dim; i++) values[2 * i] = rounded[i];
        /* The pair's other half may hold anything; probability 0 times NaN would still be NaN. */
        if (is_last && slot % 2 == 0)
            for (int i = 0; i < dim; i++) values[2 * i + 1] = 0;
    }
}

/* query, result: (n_rows, n_heads * head_dim) bf16, query scaled and rotated. */
void smo_verify_attention(int isa, int threads, const layer_shape_t *shape, const batch_t *batch, uint16_t *k_pages,
                          uint16_t *v_pages, const uint16_t *query, uint16_t *result, unsigned char *scratch)
{
    const attention_t a = {shape, batch, k_pages, v_pages};
    EACH_THREAD(threads, attend_all(ISAS[isa], &a, query, result, (float *)scratch));
}

/* The n_active largest logits, lowest index first among equals; weights are their softmax. */
static void route(const float *logits, int n_experts, int n_active, int32_t *index, float *weight)
{
    for (int rank = 0; rank < n_active; rank++) {
        int best = -1;
        for (int e = 0; e < n_experts; e++) {
            int taken = 0;
            for (int i = 0; i < rank; i++) taken |= index[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        index[rank] = best;
    }
    float sum = 0.f;
    for (int rank = 0; rank < n_active; rank++) sum += weight[rank] = expf(logits[index[rank]] - logits[index[0]]);
    for (int rank = 0; rank < n_active; rank++) weight[rank] /= sum;
}

static size_t qkv_width(const layer_shape_t *s) { return (size_t)(s->n_heads + 2 * s->n_kv_heads) * s->head_dim; }

/* Of a batch of m rows whose longest request ends at position `end`: for attention alone, and for the whole block. */
size_t smo_partial_bytes(const layer_shape_t *s, int m, int end) { return partial_bytes(s, m, end); }

size_t smo_attention_scratch_bytes(const layer_shape_t *s, int m, int end)
{
    const size_t rows = (size_t)m, width = (size_t)s->n_heads * s->head_dim;
    return align64(rows * qkv_width(s) * 4) + 2 * align64(rows * width * 2) + align64(rows * (size_t)s->n_experts * 4) +
           partial_bytes(s, m, end);
}

/* The attention block of one layer, for all threads of the region; ends with a barrier. */
static void attention_rows(const isa_t *isa, const layer_t *layer, const attention_t *a, float *x, uint16_t *normed,
                           int32_t *expert_index, float *expert_weight, unsigned char *scratch)
{
    const layer_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int m = b->n_rows, width = s->n_heads * s->head_dim, qkv_columns = (int)qkv_width(s);
    float *qkv = (float *)scratch;
    uint16_t *query = (uint16_t *)(scratch + align64((size_t)m * qkv_columns * 4));
    uint16_t *result = query + align64((size_t)m * width * 2) / 2;
    float *logits = (float *)(result + align64((size_t)m * width * 2) / 2);

    rmsnorm_rows(isa, x, m, s->hidden, layer->input_norm, s->rms_eps, normed);
    linear_rows(isa, normed, m, s->hidden, layer->qkv, qkv_columns, qkv, 0);
#pragma omp for schedule(dynamic, 1)
    for (int request = 0; request < b->n_requests; request++)
        for (int r = b->row_start[request]; r < b->row_start[request + 1]; r++)
            append_row(isa, a, layer, request, r, qkv + (size_t)r * qkv_columns, query + (size_t)r * width);
    attend_all(isa, a, query, result, logits + align64((size_t)m * (size_t)s->n_experts * 4) / 4);
    linear_rows(isa, result, m, width, layer->o, s->hidden, x, 1);
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++) {
        const uint16_t *row = normed + (size_t)r * s->hidden;
        isa->rmsnorm(x + (size_t)r * s->hidden, layer->post_norm, s->rms_eps, s->hidden, normed + (size_t)r * s->hidden);
        int32_t *index = expert_index + (size_t)r * s->n_active;
        float *weight = expert_weight + (size_t)r * s->n_active;
        if (!layer->router) {
            *index = 0;
            *weight = 1.f;
            continue;
        }
        float *row_logits = logits + (size_t)r * s->n_experts, strip[COLUMNS];
        for (int first = 0; first < s->n_experts; first += COLUMNS) {
            const int n = s->n_experts - first < COLUMNS ? s->n_experts - first : COLUMNS;
            strip_rows(isa, &row, 1, layer->router + (size_t)(first / COLUMNS) * strip_elements(s->hidden), s->hidden, n, strip,
                       COLUMNS, layer->router);
            memcpy(row_logits + first, strip, sizeof(float) * (size_t)n);
        }
        route(row_logits, s->n_experts, s->n_active, index, weight);
    }
}

void smo_attention_block(int isa, int threads, const layer_shape_t *shape, const layer_t *layer, const batch_t *batch, float *x,
                         uint16_t *k_pages, uint16_t *v_pages, uint16_t *normed, int32_t *expert_index, float *expert_weight,
                         unsigned char *scratch)
{
    const attention_t a = {shape, batch, k_pages, v_pages};
    EACH_THREAD(threads, attention_rows(ISAS[isa], layer, &a, x, normed, expert_index, expert_weight, scratch));
}

/* ---- experts ------------------------------------------------------------------------------------------------------------ */

size_t smo_experts_scratch_bytes(int intermediate, int n_slots) { return (size_t)n_slots * (size_t)padded(intermediate) * 2; }

/* Some experts for all threads of the region; ends with a barrier. experts[e] serves slots[start[e] .. start[e + 1]), or,
 * where slots is NULL, those numbers themselves; slot = row * n_active + rank; out[slot] (hidden). */
static void expert_rows(const isa_t *isa, int hidden, int intermediate, int n_active, const uint16_t *normed, int n_experts,
                        const uint16_t *const *experts, const int32_t *slots, const int32_t *start, float *out,
                        unsigned char *scratch)
{
    const int up_strips = strips(intermediate), down_strips = strips(hidden), wide = padded(intermediate);
    const size_t strip = strip_elements(hidden), down_strip = strip_elements(wide);
    uint16_t *activations = (uint16_t *)scratch;

    for (int e = 0; e < n_experts; e++) {
        const int m = start[e + 1] - start[e], groups = (m + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < up_strips * groups; item++) {
            const int s = item / groups, first = start[e] + item % groups * GROUP_ROWS, left = start[e + 1] - first;
            const int n = left < GROUP_ROWS ? left : GROUP_ROWS;
            const uint16_t *rows[GROUP_ROWS], *weights = experts[e] + 2 * (size_t)s * strip;
            float gate[GROUP_ROWS * COLUMNS] __attribute__((aligned(64))), up[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
            for (int r = 0; r < n; r++) rows[r] = normed + (size_t)((slots ? slots[first + r] : first + r) / n_active) * hidden;
            strip_rows(isa, rows, n, weights, hidden, COLUMNS, gate, COLUMNS, weights + strip);
            strip_rows(isa, rows, n, weights + strip, hidden, COLUMNS, up, COLUMNS, weights + 2 * (size_t)omp_get_num_threads() * strip);
            for (int r = 0; r < n; r++)
                isa->silu_mul(gate + r * COLUMNS, up + r * COLUMNS, COLUMNS, activations + (size_t)(first + r) * wide + s * COLUMNS);
        }
    }
#pragma omp barrier
    for (int e = 0; e < n_experts; e++) {
        const int m = start[e + 1] - start[e], groups = (m + GROUP_ROWS - 1) / GROUP_ROWS;
        const uint16_t *down = experts[e] + down_offset(hidden, intermediate);
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < down_strips * groups; item++) {
            const int s = item / groups, first = start[e] + item % groups * GROUP_ROWS, left = start[e + 1] - first;
            const int n = left < GROUP_ROWS ? left : GROUP_ROWS, columns = hidden - s * COLUMNS < COLUMNS ? hidden - s * COLUMNS : COLUMNS;
            const uint16_t *rows[GROUP_ROWS];
            float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
            for (int r = 0; r < n; r++) rows[r] = activations + (size_t)(first + r) * wide;
            strip_rows(isa, rows, n, down + (size_t)s * down_strip, wide, columns, result, COLUMNS,
                       down + (size_t)(s + omp_get_num_threads()) * down_strip);
            for (int r = 0; r < n; r++)
                memcpy(out + (size_t)(slots ? slots[first + r] : first + r) * hidden + s * COLUMNS, result + r * COLUMNS,
                       sizeof(float) * (size_t)columns);
        }
    }
#pragma omp barrier
}

void smo_experts(int isa, int threads, int hidden, int intermediate, int n_active, const uint16_t *normed, int n_experts,
                 const uint16_t *const *experts, const int32_t *slots, const int32_t *start, float *out, unsigned char *scratch)
{
    EACH_THREAD(threads,
                expert_rows(ISAS[isa], hidden, intermediate, n_active, normed, n_experts, experts, slots, start, out, scratch));
}

/* x[row] += sum over ranks, in order, of weight * expert_out[row][rank]; ends with a barrier. */
static void combine_rows(const isa_t *isa, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight)
{
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++)
        for (int rank = 0; rank < n_active; rank++) {
            const size_t slot = (size_t)r * n_active + rank;
            isa->add_scaled(x + (size_t)r * hidden, weight[slot], expert_out + slot * hidden, hidden);
        }
}

void smo_combine(int isa, int threads, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight)
{
    EACH_THREAD(m > 16 ? threads : 1, combine_rows(ISAS[isa], x, m, hidden, n_active, expert_out, weight));
}

/* ---- a whole dense model ------------------------------------------------------------------------------------------------ */

/* All layers of a model of one expert a layer, in one parallel region: threads meet at barriers and never sleep between
 * layers, which a draft of one token a request would otherwise spend a quarter of its time on. k_pages and v_pages:
 * layer after layer, `layer_elements` apart. */
void smo_dense_pass(int isa_index, int threads, const layer_shape_t *s, int n_layers, const layer_t *layers,
                    const uint16_t *const *experts, const batch_t *b, float *x, uint16_t *k_pages, uint16_t *v_pages,
                    size_t layer_elements, uint16_t *normed, int32_t *expert_index, float *expert_weight, float *expert_out,
                    unsigned char *scratch)
{
    const isa_t *isa = ISAS[isa_index];
    const int32_t start[2] = {0, b->n_rows};
    EACH_THREAD(threads, for (int i = 0; i < n_layers; i++) {
        const attention_t a = {s, b, k_pages + (size_t)i * layer_elements, v_pages + (size_t)i * layer_elements};
        attention_rows(isa, layers + i, &a, x, normed, expert_index, expert_weight, scratch);
        expert_rows(isa, s->hidden, s->intermediate, 1, normed, 1, experts + i, NULL, start, expert_out, scratch);
        combine_rows(isa, x, b->n_rows, s->hidden, 1, expert_out, expert_weight);
    });
}

/* ---- head --------------------------------------------------------------------------------------------------------------- */

size_t smo_head_scratch_bytes(int hidden, int m, int threads)
{
    return align64((size_t)m * hidden * 2) + (size_t)threads * align64((size_t)m * 8);
}

/* For all threads of the region: each keeps the best of its strips in `bests`, then they are compared. */
static void head_rows(const isa_t *isa, const float *x, int m, int hidden, const float *norm, float eps, const uint16_t *head,
                      int vocab, int32_t *out, float *logits, uint16_t *normed, unsigned char *bests)
{
    const size_t per_thread = align64((size_t)m * 8);
            float *best = (float *)(bests + (size_t)omp_get_thread_num() * per_thread);
            int32_t *best_index = (int32_t *)(best + m);
            for (int r = 0; r < m; r++) {
                best[r] = -INFINITY;
                best_index[r] = INT32_MAX;
            }
            rmsnorm_rows(isa, x, m, hidden, norm, eps, normed);
#pragma omp for schedule(dynamic, 4)
            for (int s = 0; s < strips(vocab); s++) {
                const int columns = vocab - s * COLUMNS < COLUMNS ? vocab - s * COLUMNS : COLUMNS;
                for (int first = 0; first < m; first += GROUP_ROWS) {
                    const int n = m - first < GROUP_ROWS ? m - first : GROUP_ROWS;
                    const uint16_t *rows[GROUP_ROWS];
                    float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
                    for (int r = 0; r < n; r++) rows[r] = normed + (size_t)(first + r) * hidden;
                    const uint16_t *strip = head + (size_t)s * strip_elements(hidden);
                    strip_rows(isa, rows, n, strip, hidden, columns, result, COLUMNS, strip + strip_elements(hidden));
                    for (int r = 0; r < n; r++) {
                        const float *row = result + r * COLUMNS;
                        float highest = best[first + r];
                        int32_t index = best_index[first + r];
                        for (int i = 0; i < columns; i++)
                            if (row[i] > highest || (row[i] == highest && s * COLUMNS + i < index)) {
                                highest = row[i];
                                index = s * COLUMNS + i;
                            }
                        best[first + r] = highest;
                        best_index[first + r] = index;
                        if (logits) memcpy(logits + (size_t)(first + r) * vocab + s * COLUMNS, row, sizeof(float) * (size_t)columns);
                    }
                }
            }
#pragma omp for schedule(static)
            for (int r = 0; r < m; r++) {
                float highest = -INFINITY;
                int32_t index = INT32_MAX;
                for (int t = 0; t < omp_get_num_threads(); t++) {
                    const float *value = (const float *)(bests + (size_t)t * per_thread);
                    const int32_t candidate = ((const int32_t *)(value + m))[r];
                    if (value[r] > highest || (value[r] == highest && candidate < index)) {
                        highest = value[r];
                        index = candidate;
                    }
                }
                out[r] = index == INT32_MAX ? 0 : index;
            }
}

void smo_head_argmax(int isa, int threads, const float *x, int m, int hidden, const float *norm, float eps, const uint16_t *head,
                     int vocab, int32_t *out, float *logits, unsigned char *scratch)
{
    EACH_THREAD(threads, head_rows(ISAS[isa], x, m, hidden, norm, eps, head, vocab, out, logits, (uint16_t *)scratch,
                                   scratch + align64((size_t)m * hidden * 2)));
}
