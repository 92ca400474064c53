/* The passes of a decoder layer and the head, for whichever instruction set and precision was chosen.
 *
 * Every call is one parallel region; phases inside it are separated by the barriers of `omp for`. A work item is a strip of
 * 64 output columns times all rows (or a group of them): weights come from memory once, rows stay in the L2 cache.
 */
#define _GNU_SOURCE
#include <math.h>
#include <omp.h>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "experts.h"
#include "rows.h"
#include "threads.h"
#include "tiles.h"

#define LATENT_EPS 1e-6f

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- attention ---------------------------------------------------------------------------------------------------------- */

static int qkv_columns(const layer_shape_t *s)
{
    return (s->n_heads + s->n_kv_heads) * s->head_dim + s->n_kv_heads * s->v_head_dim;
}
static kv_shape_t kv_shape(const layer_shape_t *s)
{
    return (kv_shape_t){s->n_heads, s->n_kv_heads, s->head_dim, s->v_head_dim, s->kv_format, s->window};
}
static int latent_columns(const layer_shape_t *s) { return s->q_latent + s->kv_latent + s->rotary_dim; }

/* Where a block's intermediate results lie in scratch; `activation`: bytes of one. */
typedef struct {
    size_t qkv, query, result, logits, latents, q_latent, kv_latent, gate_up, inner, share, partials;
} places_t;

static places_t places_of(const layer_shape_t *s, size_t m, size_t activation)
{
    places_t p;
    size_t at = 0;
    const kv_shape_t kv = kv_shape(s);
#define PLACE(name, bytes) p.name = at, at += align64(m * (size_t)(bytes))
    PLACE(qkv, qkv_columns(s) * 4);
    PLACE(query, (size_t)(s->n_heads * s->head_dim) * query_bytes(&kv));
    PLACE(result, (size_t)(s->n_heads * s->v_head_dim) * activation);
    PLACE(logits, s->n_experts * 4);
    PLACE(latents, s->kv_latent ? latent_columns(s) * 4 : 0);
    PLACE(q_latent, (size_t)s->q_latent * activation);
    PLACE(kv_latent, (size_t)s->kv_latent * activation);
    PLACE(gate_up, s->shared_intermediate * 8);
    PLACE(inner, (size_t)s->shared_intermediate * activation);
    PLACE(share, s->shared_intermediate ? 4 : 0);
    p.partials = at;
    return p;
}

/* Of a batch of m rows whose longest request ends at position `end`. */
size_t smo_attention_scratch_bytes(const layer_shape_t *s, int m, int end, int halves)
{
    const kv_shape_t kv = kv_shape(s);
    return places_of(s, (size_t)m, 2 * (size_t)halves).partials + partial_bytes(&kv, m, end);
}

static void normalise_heads(const isa_t *isa, const layer_shape_t *s, float *x, int n_heads, const float *norm)
{
    const int n = s->norm_heads ? 1 : n_heads, dim = s->head_dim * n; /* of one norm */
    for (int head = 0; head < n_heads; head += n)
        isa->f32->rmsnorm(x + head * s->head_dim, norm, s->rms_eps, dim, (uint16_t *)(x + head * s->head_dim));
}

/* Finish one row's queries, keys and values; scale and round its queries. qkv: as qkv_columns. */
static void finish_row(const isa_t *isa, const layer_shape_t *s, const layer_t *layer, const batch_t *b, int request, int row, float *qkv,
                       const float *rotary_key, unsigned char *query)
{
    const int dim = s->head_dim, half = s->rotary_dim / 2, keys = s->n_heads * dim;
    const int position = b->first_position[request] + row - b->row_start[request];
    const float *cosines = layer->cosines + (size_t)position * half, *sines = layer->sines + (size_t)position * half;
    if (rotary_key)
        for (int head = 0; head < s->n_heads; head++)
            memcpy(qkv + keys + head * dim, rotary_key, sizeof(float) * (size_t)s->rotary_dim);
    if (layer->q_norm) {
        normalise_heads(isa, s, qkv, s->n_heads, layer->q_norm);
        normalise_heads(isa, s, qkv + keys, s->n_kv_heads, layer->k_norm);
    }
    if (s->clip_qkv > 0.f)
        for (int i = 0; i < qkv_columns(s); i++) qkv[i] = fmaxf(-s->clip_qkv, fminf(s->clip_qkv, qkv[i]));
    for (int head = 0; head < s->n_heads + s->n_kv_heads; head++) {
        float *x = qkv + (size_t)head * dim;
        for (int i = 0; i < half; i++) {
            const float low = x[i], high = x[i + half];
            x[i] = low * cosines[i] - high * sines[i];
            x[i + half] = high * cosines[i] + low * sines[i];
        }
    }
    if (s->kv_format == KV_BF16) isa->to_bf16(qkv, s->attention_scale, keys, (uint16_t *)query);
    else isa->f32->put(qkv, s->attention_scale, keys, (uint16_t *)query);
}

size_t smo_kv_page_bytes(const kv_shape_t *s) { return kv_page_bytes(s); }
size_t smo_partial_bytes(const kv_shape_t *s, int m, int end) { return partial_bytes(s, m, end); }

void smo_append_kv(int isa, int threads, const attention_t *a, const float *keys, const float *values)
{
    const kv_shape_t *s = a->shape;
    EACH_THREAD(threads, append_all(isa_of(isa), a, keys, (size_t)(s->n_kv_heads * s->key_dim), values, (size_t)(s->n_kv_heads * s->value_dim)));
}

void smo_verify_attention(int isa, int threads, const attention_t *a, const void *query, void *result, unsigned char *scratch)
{
    EACH_THREAD(threads, attend_all(isa_of(isa), a, query, result, (float *)scratch));
}

/* ---- router ------------------------------------------------------------------------------------------------------------- */

/* Number of the highest value not yet taken, the lowest among equals; it is taken then. */
static int take_highest(const float *values, int first, int n, uint8_t *taken)
{
    int best = -1;
    for (int i = first; i < first + n; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = 1;
    return best;
}

/* The n_active experts of the highest scores and their weights. Scores are the sigmoids of the logits or the logits themselves,
 * which a softmax leaves in order; for the choice choice_bias is added. With groups only experts of the n_active_groups best are
 * chosen, a group being as good as the sum of its group_best best (DeepSeek-V3, section 2.1.2; V2: 1). Weights are the sigmoids,
 * or the softmax over all experts; renormalised they sum to one. */
static void route(const layer_shape_t *s, const layer_t *layer, float *scores, int32_t *index, float *weight)
{
    const int n = s->n_experts, size = s->n_groups ? n / s->n_groups : n;
    float highest = scores[0], total = 0.f, choice[MAX_EXPERTS], groups[MAX_EXPERTS];
    uint8_t taken[MAX_EXPERTS] = {0}, chosen[MAX_EXPERTS] = {0};
    for (int e = 0; e < n; e++) {
        if (layer->router_bias) scores[e] += layer->router_bias[e];
        if (s->sigmoid_router) scores[e] = 1.f / (1.f + expf(-scores[e]));
        highest = fmaxf(highest, scores[e]);
        choice[e] = layer->choice_bias ? scores[e] + layer->choice_bias[e] : scores[e];
    }
    if (s->n_groups) {
        for (int g = 0; g < s->n_groups; g++) {
            groups[g] = 0.f;
            for (int i = 0; i < s->group_best; i++) groups[g] += choice[take_highest(choice, g * size, size, taken)];
        }
        memset(taken, 1, sizeof taken);
        for (int i = 0; i < s->n_active_groups; i++)
            memset(taken + take_highest(groups, 0, s->n_groups, chosen) * size, 0, (size_t)size);
    }
    for (int rank = 0; rank < s->n_active; rank++) index[rank] = take_highest(choice, 0, n, taken);
    for (int rank = 0; rank < s->n_active; rank++)
        total += weight[rank] = s->sigmoid_router ? scores[index[rank]] : expf(scores[index[rank]] - highest);
    if (!s->sigmoid_router && !s->renormalise) {
        total = 0.f;
        for (int e = 0; e < n; e++) total += expf(scores[e] - highest);
    }
    const float whole = s->sigmoid_router && !s->renormalise ? 1.f : total;
    for (int rank = 0; rank < s->n_active; rank++) weight[rank] = weight[rank] / whole * s->routed_scale;
}

/* One row (hidden) against a packed matrix of n_out rows. */
static void row_product(const isa_t *isa, const uint16_t *row, int hidden, const uint16_t *w, int n_out, float *out)
{
    const int n_in = hidden * isa->halves;
    float strip[COLUMNS] __attribute__((aligned(64)));
    for (int first = 0; first < n_out; first += COLUMNS) {
        const int n = n_out - first < COLUMNS ? n_out - first : COLUMNS;
        strip_rows(isa, &row, 1, w + (size_t)first * n_in, n_in, n, strip, COLUMNS, w);
        memcpy(out + first, strip, sizeof(float) * (size_t)n);
    }
}

/* ---- the block ---------------------------------------------------------------------------------------------------------- */

/* Queries, keys and values of all rows from their latents (DeepSeek-V2, section 2.1). */
static void expand_latents(const isa_t *isa, const layer_t *layer, const layer_shape_t *s, int m, const uint16_t *normed,
                           const float *latents, uint16_t *q_latent, uint16_t *kv_latent, float *qkv)
{
    const size_t stride = (size_t)qkv_columns(s), width = (size_t)latent_columns(s);
    const int queries = s->n_heads * s->head_dim;
    if (s->q_latent) rmsnorm_rows(isa, latents, width, m, s->q_latent, layer->q_latent_norm, LATENT_EPS, q_latent);
    rmsnorm_rows(isa, latents + s->q_latent, width, m, s->kv_latent, layer->kv_latent_norm, LATENT_EPS, kv_latent);
    linear_rows(isa, s->q_latent ? q_latent : normed, m, s->q_latent ? s->q_latent : s->hidden, layer->q_up, queries,
                (target_t){.out = qkv, .stride = stride});
    linear_rows(isa, kv_latent, m, s->kv_latent, layer->kv_up, (int)stride - queries, (target_t){.out = qkv + queries, .stride = stride});
}

/* The attention block of one layer and what every row takes of its feed-forward, for all threads of the region; ends with a
 * barrier. */
static void attention_rows(const isa_t *isa, const layer_shape_t *s, const layer_t *layer, const batch_t *b, unsigned char *pages,
                           float *x, uint16_t *normed, int32_t *expert_index, float *expert_weight, unsigned char *scratch)
{
    const kv_shape_t kv = kv_shape(s);
    const attention_t a = {.shape = &kv, .batch = b, .pages = pages, .sinks = layer->sinks, .wide_result = isa->halves == 2};
    const int m = b->n_rows, columns = qkv_columns(s), shared = s->shared_intermediate;
    const size_t query_row = (size_t)(s->n_heads * s->head_dim) * query_bytes(&kv);
    const places_t at = places_of(s, (size_t)m, 2 * (size_t)isa->halves);
    float *qkv = (float *)(scratch + at.qkv), *latents = (float *)(scratch + at.latents), *logits = (float *)(scratch + at.logits);
    float *gate_up = (float *)(scratch + at.gate_up), *share = (float *)(scratch + at.share);
    unsigned char *query = scratch + at.query;
    uint16_t *result = (uint16_t *)(scratch + at.result), *inner = (uint16_t *)(scratch + at.inner);

    rmsnorm_rows(isa, x, (size_t)s->hidden, m, s->hidden, layer->input_norm, s->rms_eps, normed);
    if (s->kv_latent) {
        const int width = latent_columns(s);
        linear_rows(isa, normed, m, s->hidden, layer->qkv, width, (target_t){.out = latents, .stride = (size_t)width});
        expand_latents(isa, layer, s, m, normed, latents, (uint16_t *)(scratch + at.q_latent), (uint16_t *)(scratch + at.kv_latent), qkv);
    } else {
        linear_rows(isa, normed, m, s->hidden, layer->qkv, columns, (target_t){qkv, (size_t)columns, 0, layer->qkv_bias, NULL});
    }
#pragma omp for schedule(dynamic, 1)
    for (int request = 0; request < b->n_requests; request++)
        for (int r = b->row_start[request]; r < b->row_start[request + 1]; r++)
            finish_row(isa, s, layer, b, request, r, qkv + (size_t)r * columns,
                       s->kv_latent ? latents + (size_t)(r + 1) * latent_columns(s) - s->rotary_dim : NULL, query + (size_t)r * query_row);
    const float *keys = qkv + s->n_heads * s->head_dim;
    append_all(isa, &a, keys, (size_t)columns, keys + s->n_kv_heads * s->head_dim, (size_t)columns);
    attend_all(isa, &a, query, result, (float *)(scratch + at.partials));
    linear_rows(isa, result, m, s->n_heads * s->v_head_dim, layer->o, s->hidden, (target_t){x, (size_t)s->hidden, 1, layer->o_bias, NULL});
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++) {
        uint16_t *row = normed + (size_t)r * s->hidden * isa->halves;
        isa->rmsnorm(x + (size_t)r * s->hidden, layer->post_norm, s->rms_eps, s->hidden, row);
        int32_t *index = expert_index + (size_t)r * s->n_active;
        float *weight = expert_weight + (size_t)r * s->n_active;
        if (layer->shared_weight) {
            row_product(isa, row, s->hidden, layer->shared_weight, 1, share + r);
            share[r] = 1.f / (1.f + expf(-share[r]));
        }
        if (layer->router) {
            float *row_logits = logits + (size_t)r * s->n_experts;
            row_product(isa, row, s->hidden, layer->router, s->n_experts, row_logits);
            route(s, layer, row_logits, index, weight);
        } else {
            *index = 0;
            *weight = 1.f;
        }
    }
    if (!shared) return;
    linear_rows(isa, normed, m, s->hidden, layer->shared_gate_up, 2 * shared, (target_t){.out = gate_up, .stride = 2 * (size_t)shared});
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++) {
        const float *gate = gate_up + 2 * (size_t)r * shared;
        isa->swiglu(gate, gate + shared, &SILU, shared, inner + (size_t)r * shared * isa->halves);
    }
    linear_rows(isa, inner, m, shared, layer->shared_down, s->hidden,
                (target_t){x, (size_t)s->hidden, 1, NULL, layer->shared_weight ? share : NULL});
}

void smo_attention_block(int isa, int threads, const layer_shape_t *shape, const layer_t *layer, const batch_t *batch, float *x,
                         unsigned char *pages, uint16_t *normed, int32_t *expert_index, float *expert_weight, unsigned char *scratch)
{
    EACH_THREAD(threads, attention_rows(isa_of(isa), shape, layer, batch, pages, x, normed, expert_index, expert_weight, scratch));
}

/* ---- layers in a row ---------------------------------------------------------------------------------------------------- */

/* Layers whose experts are all in memory, in one parallel region: threads meet at barriers and never sleep between them, which a
 * window of few rows would otherwise spend a fifth of its time on. batches: one after the other, of consecutive rows; experts[i]
 * NULL: its rows take none. pages: layer after layer, layer_bytes apart. Out: counts (n_layers, n_experts) of the rows that chose
 * an expert; clock (1 + n_layers * (n_batches + 1)): seconds at the start, after each batch's attention and after the experts. */
void smo_layers(int isa_index, int threads, int n_layers, const layer_shape_t *const *shapes, const layer_t *const *layers,
                const experts_t *const *experts, int n_batches, const batch_t *const *batches, float *x, unsigned char *pages,
                size_t layer_bytes, uint16_t *normed, int32_t *expert_index, float *expert_weight, float *expert_out, int32_t *slots,
                int32_t *counts, double *clock, unsigned char *scratch)
{
    const isa_t *isa = isa_of(isa_index);
    const int hidden = shapes[0]->hidden, n_active = shapes[0]->n_active, n_experts = shapes[0]->n_experts;
    routes_t routes;
    memset(counts, 0, sizeof *counts * (size_t)n_layers * (size_t)n_experts);
    *clock++ = seconds_now();
    EACH_THREAD(threads, for (int i = 0; i < n_layers; i++) {
        double *marks = clock + i * (n_batches + 1);
        int m = 0;
        for (int b = 0; b < n_batches; m += batches[b++]->n_rows) {
            const size_t slot = (size_t)m * (size_t)n_active;
            attention_rows(isa, shapes[i], layers[i], batches[b], pages + (size_t)i * layer_bytes, x + (size_t)m * hidden,
                           normed + (size_t)m * (size_t)(hidden * isa->halves), expert_index + slot, expert_weight + slot, scratch);
            _Pragma("omp master") marks[b] = seconds_now();
        }
        if (experts[i]) {
            _Pragma("omp single")
            {
                sort_slots(experts[i], expert_index, m * n_active, slots, &routes);
                for (int e = 0; e < routes.n_used; e++) counts[i * n_experts + routes.experts[e]] = routes.start[e + 1] - routes.start[e];
            }
            feed_forward_rows(isa, experts[i], &routes, slots, m, normed, x, expert_out, expert_weight, scratch);
        }
        _Pragma("omp master") marks[n_batches] = seconds_now();
    });
}

/* ---- head --------------------------------------------------------------------------------------------------------------- */

size_t smo_head_scratch_bytes(int hidden, int m, int threads, int halves)
{
    return align64((size_t)m * hidden * halves * 2) + (size_t)threads * align64((size_t)m * 8);
}

/* For all threads of the region: each keeps the best of its strips in `bests`, then they are compared. */
static void head_rows(const isa_t *isa, const float *x, int m, int hidden, const float *norm, float eps, const uint16_t *head,
                      int vocab, int32_t *out, float *logits, uint16_t *normed, unsigned char *bests)
{
    const size_t per_thread = align64((size_t)m * 8);
    const int n_in = hidden * isa->halves;
            float *best = (float *)(bests + (size_t)omp_get_thread_num() * per_thread);
            int32_t *best_index = (int32_t *)(best + m);
            for (int r = 0; r < m; r++) {
                best[r] = -INFINITY;
                best_index[r] = INT32_MAX;
            }
            rmsnorm_rows(isa, x, (size_t)hidden, m, hidden, norm, eps, normed);
#pragma omp for schedule(dynamic, 4)
            for (int s = 0; s < strips(vocab); s++) {
                const int columns = vocab - s * COLUMNS < COLUMNS ? vocab - s * COLUMNS : COLUMNS;
                for (int first = 0; first < m; first += GROUP_ROWS) {
                    const int n = m - first < GROUP_ROWS ? m - first : GROUP_ROWS;
                    const uint16_t *rows[GROUP_ROWS];
                    float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
                    for (int r = 0; r < n; r++) rows[r] = normed + (size_t)(first + r) * n_in;
                    const uint16_t *strip = head + (size_t)s * strip_elements(n_in);
                    strip_rows(isa, rows, n, strip, n_in, columns, result, COLUMNS, strip + strip_elements(n_in));
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
    EACH_THREAD(threads, head_rows(isa_of(isa), x, m, hidden, norm, eps, head, vocab, out, logits, (uint16_t *)scratch,
                                   scratch + align64((size_t)m * hidden * isa_of(isa)->halves * 2)));
}
