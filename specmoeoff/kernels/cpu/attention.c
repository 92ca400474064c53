/* Verification attention: the new tokens of every request against its paged keys and values, each read once for all of them.
 *
 * Query heads that share a KV head are folded into rows. A work item is some rows of some KV heads of one request over one
 * range of positions. Ranges lie at fixed positions and each begins anew; what they found is merged in their order. So a row's
 * bits depend neither on how the work is split nor on what it is split with, and one long request keeps all threads busy.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "tiles.h"

enum {
    RANGE_TOKENS = 4096, /* a multiple of PAGE_TOKENS */
    ITEM_ROWS = 48,      /* rows of all its heads: scores, probabilities and outputs stay in the L2 cache */
    ITEMS_A_THREAD = 8,  /* enough to even out threads of unequal speed */
    MAX_DIM = 576,
    RECORD = 2 * LANES, /* what stands before the output in a partial result: reference, sums */
    VECTORS = PAGE_TOKENS / LANES
};

static const struct {
    size_t bytes;     /* of a number */
    size_t per_step;  /* numbers of a column that are multiplied at once */
    int wide;         /* queries and probabilities are fp32 */
    int scaled;
} NUMBERS[] = {[KV_BF16] = {2, 2, 0, 0}, [KV_FP16] = {2, 1, 1, 0}, [KV_FP32] = {4, 1, 1, 0}, [KV_INT8] = {1, 1, 1, 1}};

static size_t key_bytes(const kv_shape_t *s) { return (size_t)s->key_dim * PAGE_TOKENS * NUMBERS[s->format].bytes; }
static size_t value_bytes(const kv_shape_t *s) { return (size_t)s->value_dim * PAGE_TOKENS * NUMBERS[s->format].bytes; }
static size_t head_bytes(const kv_shape_t *s)
{
    return key_bytes(s) + value_bytes(s) + (NUMBERS[s->format].scaled ? 2 * PAGE_TOKENS * sizeof(float) : 0);
}
size_t kv_page_bytes(const kv_shape_t *s) { return (size_t)s->n_kv_heads * head_bytes(s); }

static int ranges(int end) { return (end + RANGE_TOKENS - 1) / RANGE_TOKENS; }
static size_t record_floats(const kv_shape_t *s) { return RECORD + (size_t)s->value_dim; }

size_t partial_bytes(const kv_shape_t *s, int n_rows, int end)
{
    return end > RANGE_TOKENS ? (size_t)ranges(end) * (size_t)n_rows * (size_t)s->n_heads * record_floats(s) * sizeof(float) : 0;
}

static int end_of(const batch_t *b, int request)
{
    return b->first_position[request] + b->row_start[request + 1] - b->row_start[request];
}

/* ---- append ------------------------------------------------------------------------------------------------------------- */

/* Number `at` of a column of a strip as wide as `columns`. */
static size_t place(const kv_shape_t *s, int column, int columns, int at)
{
    const size_t per = NUMBERS[s->format].per_step, step = (size_t)at / per;
    return (step * (size_t)columns + (size_t)column) * per + (size_t)at % per;
}

static void put(const kv_shape_t *s, unsigned char *to, size_t at, const void *numbers, int i)
{
    const size_t bytes = NUMBERS[s->format].bytes;
    memcpy(to + at * bytes, (const unsigned char *)numbers + (size_t)i * bytes, bytes);
}

/* n floats in the pages' format; the scale of int8. */
static float convert(const isa_t *isa, const kv_shape_t *s, const float *x, int n, void *out)
{
    float scale = 1.f, most = 0.f;
    switch (s->format) {
    case KV_BF16: isa->to_bf16(x, 1.f, n, out); break;
    case KV_FP16: isa->to_fp16(x, n, out); break;
    case KV_FP32: memcpy(out, x, sizeof(float) * (size_t)n); break;
    default:
        for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
        scale = most > 0.f ? most / 127.f : 1.f;
        for (int i = 0; i < n; i++) ((int8_t *)out)[i] = (int8_t)lrintf(x[i] / scale);
    }
    return scale;
}

void append_kv(const isa_t *isa, const attention_t *a, int request, int row, const float *keys, const float *values)
{
    const kv_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int position = b->first_position[request] + row - b->row_start[request], slot = position % PAGE_TOKENS;
    const int is_last = row + 1 == b->row_start[request + 1];
    const int page = b->page_table[(size_t)request * (size_t)b->max_pages + (size_t)(position / PAGE_TOKENS)];
    float numbers[MAX_DIM];
    for (int head = 0; head < s->n_kv_heads; head++) {
        unsigned char *key = a->pages + (size_t)page * kv_page_bytes(s) + (size_t)head * head_bytes(s), *value = key + key_bytes(s);
        float *scales = (float *)(value + value_bytes(s));
        const float key_scale = convert(isa, s, keys + (size_t)head * (size_t)s->key_dim, s->key_dim, numbers);
        unsigned char *strip = key + (size_t)(slot / COLUMNS) * (key_bytes(s) / (PAGE_TOKENS / COLUMNS));
        for (int i = 0; i < s->key_dim; i++) put(s, strip, place(s, slot % COLUMNS, COLUMNS, i), numbers, i);
        const float value_scale = convert(isa, s, values + (size_t)head * (size_t)s->value_dim, s->value_dim, numbers);
        for (int i = 0; i < s->value_dim; i++) {
            const int first = i / COLUMNS * COLUMNS, columns = s->value_dim - first < COLUMNS ? s->value_dim - first : COLUMNS;
            unsigned char *into = value + (size_t)first * PAGE_TOKENS * NUMBERS[s->format].bytes;
            put(s, into, place(s, i - first, columns, slot), numbers, i);
            /* A pair's other half may hold anything; probability 0 times NaN would still be NaN. */
            if (is_last && slot % 2 == 0 && NUMBERS[s->format].per_step == 2)
                memset(into + place(s, i - first, columns, slot + 1) * NUMBERS[s->format].bytes, 0, NUMBERS[s->format].bytes);
        }
        if (NUMBERS[s->format].scaled) {
            scales[slot] = key_scale;
            scales[PAGE_TOKENS + slot] = value_scale;
        }
    }
}

/* ---- one item ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    int request, first_head, n_heads, first_row, n_rows, range; /* rows of each head: (token, query head of the group) */
} item_t;

/* Number of (token, query head) of a folded row. */
static size_t output_of(const attention_t *a, int request, int head, int row)
{
    const int group = a->shape->n_heads / a->shape->n_kv_heads;
    return (size_t)(a->batch->row_start[request] + row / group) * (size_t)a->shape->n_heads + (size_t)(head * group + row % group);
}

static void write_result(const isa_t *isa, const attention_t *a, size_t at, float reference, const float *sums, const float *output, void *result)
{
    const int n = a->shape->value_dim;
    float sum = isa->sum_of(sums), scale = 1.f;
    if (a->sinks) {
        const float sink = a->sinks[at % (size_t)a->shape->n_heads], highest = fmaxf(sink, reference);
        scale = expf(reference - highest);
        sum = sum * scale + expf(sink - highest);
        reference = highest;
    }
    if (a->log_sums) a->log_sums[at] = reference + logf(sum);
    if (a->wide_result) isa->f32->put(output, scale / sum, n, (uint16_t *)((float *)result + at * (size_t)n));
    else isa->to_bf16(output, scale / sum, n, (uint16_t *)result + at * (size_t)n);
}

/* A row sees positions lowest .. limit - 1, but of its request's new tokens those of the tree where there is one. */
typedef struct {
    int lowest, limit, all; /* all: below it there are no exceptions */
    const uint64_t *tree;
} sight_t;

static sight_t sight_of(const attention_t *a, int request, int token)
{
    const batch_t *b = a->batch;
    const int context = b->first_position[request], end = context + token + 1, window = a->shape->window;
    const int lowest = window && end > window ? end - window : 0;
    if (a->tree) return (sight_t){lowest, end_of(b, request), context, a->tree + b->row_start[request] + token};
    return (sight_t){lowest, end, end, NULL};
}

static uint64_t bits_below(int n) { return n <= 0 ? 0 : n < 64 ? ((uint64_t)1 << n) - 1 : ~(uint64_t)0; }

/* Bits of the tokens seen of the page whose first is at position `first`. */
static void fill_mask(sight_t sight, int first, uint16_t *mask)
{
    for (int i = 0; i < PAGE_TOKENS; i += 64) {
        const int at = first + i, shift = sight.all - at; /* of the tree's tokens */
        uint64_t seen = bits_below(shift);
        if (sight.tree && shift > -64 && shift < 64)
            seen |= (shift < 0 ? *sight.tree >> -shift : *sight.tree << shift) & bits_below(sight.limit - at);
        seen &= ~bits_below(sight.lowest - at);
        for (int j = 0; j < 64 / LANES; j++) mask[i / LANES + j] = (uint16_t)(seen >> j * LANES);
    }
}

/* Online softmax over the pages of a range, head by head: a page is read from one end to the other. */
static void attend(const isa_t *isa, const attention_t *a, item_t item, const void *query, void *result, float *partials)
{
    const kv_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int group = s->n_heads / s->n_kv_heads, n = item.n_rows, n_all = n * item.n_heads, wide = NUMBERS[s->format].wide;
    const size_t bytes = NUMBERS[s->format].bytes, per_step = NUMBERS[s->format].per_step;
    const size_t number = wide ? sizeof(float) : sizeof(uint16_t);
    float scores[MOST_TILE_ROWS * PAGE_TOKENS] __attribute__((aligned(64)));
    float outputs[ITEM_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float sums[ITEM_ROWS * LANES] __attribute__((aligned(64)));
    float probabilities[ITEM_ROWS * PAGE_TOKENS] __attribute__((aligned(64)));
    const void *queries[ITEM_ROWS], *weights[ITEM_ROWS];
    float reference[ITEM_ROWS];
    sight_t sights[ITEM_ROWS];
    const size_t dim = (size_t)s->value_dim;

    for (int i = 0; i < n_all; i++) {
        const size_t at = output_of(a, item.request, item.first_head + i / n, item.first_row + i % n);
        queries[i] = (const unsigned char *)query + at * (size_t)s->key_dim * number;
        weights[i] = (const unsigned char *)probabilities + (size_t)(i % n) * PAGE_TOKENS * number;
        reference[i] = LOWEST;
    }
    for (int r = 0; r < n; r++) sights[r] = sight_of(a, item.request, (item.first_row + r) / group);
    memset(outputs, 0, sizeof(float) * (size_t)n_all * dim);
    memset(sums, 0, sizeof(float) * (size_t)n_all * LANES);

    int begin = item.range * RANGE_TOKENS, end = begin + RANGE_TOKENS;
    if (sights[n - 1].limit < end) end = sights[n - 1].limit;
    if (sights[0].lowest > begin) begin = sights[0].lowest / PAGE_TOKENS * PAGE_TOKENS;
    const int n_tiles = (n + isa->tile_rows[s->format] - 1) / isa->tile_rows[s->format], key_steps = (int)((size_t)s->key_dim / per_step);
    const int32_t *table = b->page_table + (size_t)item.request * (size_t)b->max_pages;
    const size_t strip = key_bytes(s) / (PAGE_TOKENS / COLUMNS), key_fetch = fetch_step(strip, n_tiles, key_steps);
    const size_t value_fetch = fetch_step(COLUMNS * PAGE_TOKENS * bytes, n_tiles, PAGE_TOKENS / (int)per_step);
    for (int first = begin; first < end; first += PAGE_TOKENS) {
        const int used = end - first < PAGE_TOKENS ? end - first : PAGE_TOKENS;
        const unsigned char *page = a->pages + (size_t)table[first / PAGE_TOKENS] * kv_page_bytes(s);
        const unsigned char *after = first + PAGE_TOKENS < end ? a->pages + (size_t)table[first / PAGE_TOKENS + 1] * kv_page_bytes(s) : page;
        for (int h = 0; h < item.n_heads; h++) {
            const unsigned char *keys = page + (size_t)(item.first_head + h) * head_bytes(s), *values = keys + key_bytes(s);
            const unsigned char *next = h + 1 < item.n_heads ? keys + head_bytes(s) : after + (size_t)item.first_head * head_bytes(s);
            const float *scales = NUMBERS[s->format].scaled ? (const float *)(values + value_bytes(s)) : 0;
            const int base = h * n, value_steps = (used + (int)per_step - 1) / (int)per_step;
            /* Scores of one tile at a time: they stay in the L1 cache. */
            for (int r = 0, t = 0; t < n_tiles; t++) {
                const int rows = n / n_tiles + (t < n % n_tiles);
                for (int i = 0; i * COLUMNS < used; i++) {
                    const int columns = used - i * COLUMNS < COLUMNS ? used - i * COLUMNS : COLUMNS;
                    const part_t part = part_of(keys + (size_t)i * strip, COLUMNS * per_step * bytes, key_steps, t, keys + (size_t)(i + 1) * strip, key_fetch);
                    isa->tile[s->format](rows, queries + base + r, part, (columns + LANES - 1) / LANES, 0, scores + i * COLUMNS, PAGE_TOKENS);
                }
                for (int q = 0; q < rows; q++, r++) {
                    uint16_t mask[VECTORS];
                    const int full = first >= sights[r].lowest && first + PAGE_TOKENS <= sights[r].all;
                    if (!full) fill_mask(sights[r], first, mask);
                    isa->softmax(scores + q * PAGE_TOKENS, full ? 0 : mask, scales, &reference[base + r], sums + (base + r) * LANES,
                                 outputs + (size_t)(base + r) * dim, s->value_dim, wide, (void *)weights[r]);
                }
            }
            for (int column = 0; column < s->value_dim; column += COLUMNS) {
                const int columns = s->value_dim - column < COLUMNS ? s->value_dim - column : COLUMNS;
                const unsigned char *value = values + (size_t)column * PAGE_TOKENS * bytes;
                const unsigned char *then = column + COLUMNS < s->value_dim ? value + COLUMNS * PAGE_TOKENS * bytes : next;
                for (int r = 0, t = 0; t < n_tiles; t++) {
                    const int rows = n / n_tiles + (t < n % n_tiles);
                    const part_t part = part_of(value, (size_t)columns * per_step * bytes, value_steps, t, then, value_fetch);
                    isa->tile[s->format](rows, weights + r, part, columns / LANES, 1, outputs + (size_t)(base + r) * dim + column, dim);
                    r += rows;
                }
            }
        }
    }
    for (int i = 0; i < n_all; i++) {
        const size_t at = output_of(a, item.request, item.first_head + i / n, item.first_row + i % n);
        const float *output = outputs + (size_t)i * dim;
        if (end_of(b, item.request) <= RANGE_TOKENS) {
            write_result(isa, a, at, reference[i], sums + i * LANES, output, result);
            continue;
        }
        float *record = partials + ((size_t)item.range * (size_t)b->n_rows * (size_t)s->n_heads + at) * record_floats(s);
        record[0] = reference[i];
        memcpy(record + LANES, sums + i * LANES, sizeof(float) * LANES);
        memcpy(record + RECORD, output, sizeof(float) * dim);
    }
}

/* What the ranges of one row and head found, in their order. */
static void merge_ranges(const isa_t *isa, const attention_t *a, int request, size_t at, float *partials, void *result)
{
    const kv_shape_t *s = a->shape;
    const size_t stride = (size_t)a->batch->n_rows * (size_t)s->n_heads * record_floats(s);
    float *into = partials + at * record_floats(s);
    for (int i = 1; i < ranges(end_of(a->batch, request)); i++) {
        const float *from = into + (size_t)i * stride;
        if (from[0] != LOWEST) /* else the row sees nothing of this range */
            isa->merge(into, into + LANES, into + RECORD, from[0], from + LANES, from + RECORD, s->value_dim);
    }
    write_result(isa, a, at, into[0], into + LANES, into + RECORD, result);
}

void attend_all(const isa_t *isa, const attention_t *a, const void *query, void *result, float *partials)
{
    const kv_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int group = s->n_heads / s->n_kv_heads;
    int most_rows = 0, longest = 0;
    for (int r = 0; r < b->n_requests; r++) {
        const int rows = (b->row_start[r + 1] - b->row_start[r]) * group;
        most_rows = rows > most_rows ? rows : most_rows;
        longest = end_of(b, r) > longest ? end_of(b, r) : longest;
    }
    /* As many heads an item as there are rows for, while there are items for all threads. */
    const int chunks = (most_rows + ITEM_ROWS - 1) / ITEM_ROWS, n_ranges = ranges(longest);
    int heads = most_rows < ITEM_ROWS ? ITEM_ROWS / most_rows : 1;
    heads = heads < s->n_kv_heads ? heads : s->n_kv_heads;
    while (heads > 1 && (int64_t)b->n_requests * n_ranges * ((s->n_kv_heads + heads - 1) / heads) < ITEMS_A_THREAD * omp_get_num_threads())
        heads--;
    const int head_groups = (s->n_kv_heads + heads - 1) / heads;
    const int64_t n_items = (int64_t)b->n_requests * n_ranges * head_groups * chunks;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n_items; i++) {
        item_t item = {.first_row = (int)(i % chunks) * ITEM_ROWS};
        const int64_t rest = i / chunks;
        item.first_head = (int)(rest % head_groups) * heads;
        item.range = (int)(rest / head_groups % n_ranges);
        item.request = (int)(rest / head_groups / n_ranges);
        const int rows_left = (b->row_start[item.request + 1] - b->row_start[item.request]) * group - item.first_row;
        item.n_rows = rows_left < ITEM_ROWS ? rows_left : ITEM_ROWS;
        item.n_heads = s->n_kv_heads - item.first_head < heads ? s->n_kv_heads - item.first_head : heads;
        if (rows_left > 0 && item.range * RANGE_TOKENS < end_of(b, item.request)) attend(isa, a, item, query, result, partials);
    }
    if (longest <= RANGE_TOKENS) return;
#pragma omp for schedule(dynamic, 1)
    for (int r = 0; r < b->n_requests; r++)
        if (end_of(b, r) > RANGE_TOKENS)
            for (size_t at = (size_t)b->row_start[r] * (size_t)s->n_heads; at < (size_t)b->row_start[r + 1] * (size_t)s->n_heads; at++)
                merge_ranges(isa, a, r, at, partials, result);
}
