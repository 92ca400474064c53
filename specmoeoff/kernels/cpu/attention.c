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
    ITEM_ROWS = 64,      /* rows of all its heads: scores, probabilities and outputs stay in the L2 cache */
    ITEMS_A_THREAD = 8,  /* enough to even out threads of unequal speed */
    MAX_DIM = 576,
    RECORD = 2 * LANES /* what stands before the output in a partial result: reference, sums */
};

/* By format of keys and values. */
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
static size_t record_floats(const kv_shape_t *s) { return RECORD + (size_t)s->value_dim; }
static int end_of(const batch_t *b, int request)
{
    return b->first_position[request] + b->row_start[request + 1] - b->row_start[request];
}
static int ranges(int end) { return (end + RANGE_TOKENS - 1) / RANGE_TOKENS; }

size_t partial_bytes(const kv_shape_t *s, int n_rows, int end)
{
    return end > RANGE_TOKENS ? (size_t)ranges(end) * (size_t)n_rows * (size_t)s->n_heads * record_floats(s) * sizeof(float) : 0;
}

/* ---- append ------------------------------------------------------------------------------------------------------------- */

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

/* A key is a column of its strip: a unit (what is multiplied at once) in every step. */
#define EACH_STEP(UNIT) for (int i = 0; i < steps; i++) ((UNIT *)to)[(size_t)i * COLUMNS] = ((const UNIT *)numbers)[i]
static void put_key(const kv_shape_t *s, unsigned char *keys, int slot, const void *numbers)
{
    const size_t unit = NUMBERS[s->format].bytes * NUMBERS[s->format].per_step;
    const int steps = s->key_dim / (int)NUMBERS[s->format].per_step;
    void *to = keys + (size_t)(slot / COLUMNS) * (key_bytes(s) / (PAGE_TOKENS / COLUMNS)) + (size_t)(slot % COLUMNS) * unit;
    if (unit == sizeof(uint32_t)) EACH_STEP(uint32_t);
    else if (unit == sizeof(uint16_t)) EACH_STEP(uint16_t);
    else EACH_STEP(uint8_t);
}

/* A value is a step of its strips; of bf16 half of one, and `even` is the token before it, NULL where that lies there already. */
static void put_value(const kv_shape_t *s, unsigned char *values, int slot, const void *numbers, const uint16_t *even)
{
    const size_t bytes = NUMBERS[s->format].bytes;
    for (int first = 0; first < s->value_dim; first += COLUMNS) {
        const int columns = s->value_dim - first < COLUMNS ? s->value_dim - first : COLUMNS;
        unsigned char *strip = values + (size_t)first * PAGE_TOKENS * bytes;
        if (NUMBERS[s->format].per_step == 1) {
            const size_t row = (size_t)columns * bytes;
            memcpy(strip + (size_t)slot * row, (const unsigned char *)numbers + (size_t)first * bytes, row);
            continue;
        }
        const uint16_t *odd = (const uint16_t *)numbers + first;
        uint16_t *to = (uint16_t *)strip + (size_t)(slot / 2) * 2 * (size_t)columns;
        if (even) for (int i = 0; i < columns; i++) ((uint32_t *)to)[i] = even[first + i] | (uint32_t)odd[i] << 16;
        else for (int i = 0; i < columns; i++) to[2 * i + 1] = odd[i];
    }
}

/* All new tokens of a request, for one head. */
static void append(const isa_t *isa, const attention_t *a, int request, int head, const float *keys, size_t key_stride, const float *values,
                   size_t value_stride)
{
    const kv_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int end = b->row_start[request + 1], paired = NUMBERS[s->format].per_step == 2;
    const size_t unit = NUMBERS[s->format].bytes * NUMBERS[s->format].per_step;
    float numbers[MAX_DIM];
    uint16_t pair[2][MAX_DIM];
    for (int row = b->row_start[request]; row < end; row++) {
        const int position = b->first_position[request] + row - b->row_start[request], slot = position % PAGE_TOKENS;
        const int page = b->page_table[(size_t)request * (size_t)b->max_pages + (size_t)(position / PAGE_TOKENS)];
        unsigned char *key = a->pages + (size_t)page * kv_page_bytes(s) + (size_t)head * head_bytes(s), *value = key + key_bytes(s);
        float *scales = (float *)(value + value_bytes(s));
        if (row == b->row_start[request] && head + 1 < s->n_kv_heads) /* a line of every step, in no cache: while this head is written */
            for (size_t i = 0; i < key_bytes(s) / 2; i += COLUMNS * unit)
                __builtin_prefetch(key + head_bytes(s) + (size_t)(slot / COLUMNS) * key_bytes(s) / 2 + i + (size_t)(slot % COLUMNS) * unit, 1);
        const float *key_row = keys + (size_t)row * key_stride, *value_row = values + (size_t)row * value_stride;
        const float key_scale = convert(isa, s, key_row + (size_t)head * (size_t)s->key_dim, s->key_dim, numbers);
        put_key(s, key, slot, numbers);
        void *into = paired ? (void *)pair[slot % 2] : numbers;
        const float value_scale = convert(isa, s, value_row + (size_t)head * (size_t)s->value_dim, s->value_dim, into);
        if (!paired || slot % 2) {
            put_value(s, value, slot, into, paired && row > b->row_start[request] ? pair[0] : NULL);
        } else if (row + 1 == end) {
            /* A pair's other half may hold anything; probability 0 times NaN would still be NaN. */
            memset(pair[1], 0, sizeof pair[1]);
            put_value(s, value, slot, pair[1], pair[0]);
        }
        if (NUMBERS[s->format].scaled) {
            scales[slot] = key_scale;
            scales[PAGE_TOKENS + slot] = value_scale;
        }
    }
}

void append_all(const isa_t *isa, const attention_t *a, const float *keys, size_t key_stride, const float *values, size_t value_stride)
{
    const int n_heads = a->shape->n_kv_heads;
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < (int64_t)a->batch->n_requests * n_heads; i++)
        append(isa, a, (int)(i / n_heads), (int)(i % n_heads), keys, key_stride, values, value_stride);
}

/* ---- what was found ------------------------------------------------------------------------------------------------------ */

static void write_result(const isa_t *isa, const attention_t *a, size_t at, float reference, const float *sums, const float *output,
                         void *result)
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

/* ---- one item ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    int request, first_head, n_heads, first_row, n_rows, range; /* rows of each head: (token, query head of the group) */
    const unsigned char *then;                                  /* what will probably be read next */
} item_t;

/* Keys of a head, and behind them its values, in the page of a position. */
static const unsigned char *head_at(const attention_t *a, int request, int position, int head)
{
    const int32_t *table = a->batch->page_table + (size_t)request * (size_t)a->batch->max_pages;
    return a->pages + (size_t)table[position / PAGE_TOKENS] * kv_page_bytes(a->shape) + (size_t)head * head_bytes(a->shape);
}

/* Number of (token, query head) of a folded row. */
static size_t output_of(const attention_t *a, int request, int head, int row)
{
    const int group = a->shape->n_heads / a->shape->n_kv_heads;
    return (size_t)(a->batch->row_start[request] + row / group) * (size_t)a->shape->n_heads + (size_t)(head * group + row % group);
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

/* What is read `ahead` bytes after `at` of a head's `whole` bytes; `next` follows them. */
static inline const unsigned char *after(ptrdiff_t at, size_t ahead, const unsigned char *head, size_t whole, const unsigned char *next)
{
    const size_t then = (size_t)at + (ahead < whole ? ahead : whole);
    return then < whole ? head + then : next + (then - whole);
}

/* Online softmax over the pages of a range, head by head: a page is read from one end to the other. */
static void attend(const isa_t *isa, const attention_t *a, const item_t *item, const void *query, void *result, float *partials)
{
    const kv_shape_t *s = a->shape;
    const int format = s->format, tile_rows = isa->tile_rows[format], halves = isa->half_tiles[format] ? 2 : 1;
    const tile_t tile = isa->tile[format];
    const batch_t *b = a->batch;
    const int group = s->n_heads / s->n_kv_heads, n = item->n_rows, n_all = n * item->n_heads, wide = NUMBERS[format].wide;
    const size_t bytes = NUMBERS[format].bytes, per_step = NUMBERS[format].per_step, unit = bytes * per_step;
    const size_t number = wide ? sizeof(float) : sizeof(uint16_t), dim = (size_t)s->value_dim, query_row = (size_t)s->key_dim * number;
    float scores[MOST_TILE_ROWS * PAGE_TOKENS] __attribute__((aligned(64)));
    float outputs[ITEM_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float sums[ITEM_ROWS * LANES] __attribute__((aligned(64)));
    float probabilities[ITEM_ROWS * PAGE_TOKENS] __attribute__((aligned(64)));
    const void *queries[ITEM_ROWS], *weights[ITEM_ROWS];
    float reference[ITEM_ROWS];
    sight_t sights[ITEM_ROWS];

    for (int i = 0; i < n_all; i++) {
        const size_t at = output_of(a, item->request, item->first_head + i / n, item->first_row + i % n);
        queries[i] = (const unsigned char *)query + at * query_row;
        weights[i] = (const unsigned char *)probabilities + (size_t)(i % n) * PAGE_TOKENS * number;
        reference[i] = LOWEST;
    }
    for (int r = 0; r < n; r++) sights[r] = sight_of(a, item->request, (item->first_row + r) / group);
    memset(outputs, 0, sizeof(float) * (size_t)n_all * dim);
    memset(sums, 0, sizeof(float) * (size_t)n_all * LANES);

    int begin = item->range * RANGE_TOKENS, end = begin + RANGE_TOKENS;
    if (sights[n - 1].limit < end) end = sights[n - 1].limit;
    if (sights[0].lowest > begin) begin = sights[0].lowest / PAGE_TOKENS * PAGE_TOKENS;
    /* Where one tile does not do, but one of half the columns and twice the rows: memory is then read all the time, not in every other
     * pass. (More of those would do no better: their rows are too many for the registers that point to them.) */
    const int width = n > tile_rows && n <= halves * tile_rows ? COLUMNS / halves : COLUMNS, most = tile_rows * COLUMNS / width;
    const int n_tiles = (n + most - 1) / most, few = n / n_tiles, larger = n % n_tiles; /* 7 rows are 4 + 3 */
    const int n_passes = n_tiles * COLUMNS / width;
    const int key_steps = s->key_dim / (int)per_step;
    const size_t strip = key_bytes(s) / (PAGE_TOKENS / COLUMNS), whole = head_bytes(s);
    /* A strip is first read in one of n_tiles passes and fetched during all of them: two strips before it is due, and one. */
    const size_t one = COLUMNS * PAGE_TOKENS * bytes, soon = n_passes > 1 ? one : 2 * one;
    const size_t key_fetch = fetch_step(strip, n_passes, key_steps);
    for (int first = begin; first < end; first += PAGE_TOKENS) {
        const int used = end - first < PAGE_TOKENS ? end - first : PAGE_TOKENS;
        const unsigned char *keys = head_at(a, item->request, first, item->first_head);
        const int is_last = first + PAGE_TOKENS >= end;
        const unsigned char *following = is_last ? item->then : head_at(a, item->request, first + PAGE_TOKENS, item->first_head);
        for (int h = 0; h < item->n_heads; h++, keys += whole) {
            const unsigned char *values = keys + key_bytes(s);
            const unsigned char *next = h + 1 < item->n_heads ? keys + whole : following;
            const float *scales = NUMBERS[format].scaled ? (const float *)(values + value_bytes(s)) : 0;
            const int base = h * n, value_steps = (used + (int)per_step - 1) / (int)per_step;
            /* Scores of one tile at a time: they stay in the L1 cache. */
            for (int r = 0, t = 0; t < n_tiles; t++) {
                const int rows = few + (t < larger);
                for (int i = 0; i * COLUMNS < used; i++) {
                    const unsigned char *key = keys + (size_t)i * strip, *then = after(key - keys, 2 * one, keys, whole, next);
                    const unsigned char *again = after(key - keys, soon, keys, whole, next);
                    for (int column = 0, pass = t; column < COLUMNS && i * COLUMNS + column < used; column += width, pass += n_tiles) {
                        const int left = used - i * COLUMNS - column, columns = left < width ? left : width;
                        const part_t part = part_of(key + (size_t)column * unit, COLUMNS * unit, key_steps, pass, then, again, key_fetch);
                        tile(rows, queries + base + r, &part, (columns + LANES - 1) / LANES, 0, scores + i * COLUMNS + column, PAGE_TOKENS);
                    }
                }
                for (int q = 0; q < rows; q++, r++) {
                    uint16_t mask[PAGE_TOKENS / LANES];
                    if (first == begin && h + 1 < item->n_heads) /* not all at once: then most would be dropped */
                        for (size_t i = 0; i < query_row; i += 64) __builtin_prefetch((const char *)queries[base + n + r] + i);
                    const int full = first >= sights[r].lowest && first + PAGE_TOKENS <= sights[r].all;
                    if (!full) fill_mask(sights[r], first, mask);
                    isa->softmax(scores + q * PAGE_TOKENS, full ? 0 : mask, scales, &reference[base + r], sums + (base + r) * LANES,
                                 outputs + (size_t)(base + r) * dim, s->value_dim, wide, (void *)weights[r]);
                }
            }
            for (int first_column = 0; first_column < s->value_dim; first_column += COLUMNS) {
                const int all = s->value_dim - first_column < COLUMNS ? s->value_dim - first_column : COLUMNS;
                const unsigned char *value = values + (size_t)first_column * PAGE_TOKENS * bytes;
                const unsigned char *then = after(value - keys, 2 * one, keys, whole, next), *again = after(value - keys, soon, keys, whole, next);
                const size_t row = (size_t)all * unit, value_fetch = fetch_step(row * (PAGE_TOKENS / per_step), n_passes, PAGE_TOKENS / (int)per_step);
                for (int column = 0, pass = 0; column < all; column += width) {
                    const int columns = all - column < width ? all - column : width;
                    for (int r = 0, t = 0; t < n_tiles; t++, pass++) {
                        const int rows = few + (t < larger);
                        const part_t part = part_of(value + (size_t)column * unit, row, value_steps, pass, then, again, value_fetch);
                        tile(rows, weights + r, &part, columns / LANES, 1, outputs + (size_t)(base + r) * dim + first_column + column, dim);
                        r += rows;
                    }
                }
            }
        }
    }
    for (int i = 0; i < n_all; i++) {
        const size_t at = output_of(a, item->request, item->first_head + i / n, item->first_row + i % n);
        const float *output = outputs + (size_t)i * dim;
        if (end_of(b, item->request) <= RANGE_TOKENS) {
            write_result(isa, a, at, reference[i], sums + i * LANES, output, result);
            continue;
        }
        float *record = partials + ((size_t)item->range * (size_t)b->n_rows * (size_t)s->n_heads + at) * record_floats(s);
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

typedef struct {
    int heads, head_groups, chunks, n_ranges;
} work_t;

/* Chunks of rows of the same pages follow each other. Without rows where there is nothing to do. */
static item_t item_of(const attention_t *a, work_t w, int64_t i)
{
    const kv_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    item_t item = {.first_row = (int)(i % w.chunks) * ITEM_ROWS};
    const int64_t rest = i / w.chunks;
    item.first_head = (int)(rest % w.head_groups) * w.heads;
    item.range = (int)(rest / w.head_groups % w.n_ranges);
    item.request = (int)(rest / w.head_groups / w.n_ranges);
    const int rows = (b->row_start[item.request + 1] - b->row_start[item.request]) * (s->n_heads / s->n_kv_heads) - item.first_row;
    if (rows > 0 && item.range * RANGE_TOKENS < end_of(b, item.request)) item.n_rows = rows < ITEM_ROWS ? rows : ITEM_ROWS;
    item.n_heads = s->n_kv_heads - item.first_head < w.heads ? s->n_kv_heads - item.first_head : w.heads;
    return item;
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
    const work_t work = {heads, head_groups, chunks, n_ranges};
    const int64_t in_a_row = n_items / (4 * ITEMS_A_THREAD * omp_get_num_threads()); /* by one thread, which fetches the next meanwhile */
#pragma omp for schedule(dynamic, in_a_row < 1 ? 1 : in_a_row)
    for (int64_t i = 0; i < n_items; i++) {
        item_t item = item_of(a, work, i);
        if (!item.n_rows) continue;
        item_t next = item_of(a, work, i + 1 < n_items ? i + 1 : i);
        if (!next.n_rows) next = item;
        item.then = head_at(a, next.request, next.range * RANGE_TOKENS, next.first_head);
        attend(isa, a, &item, query, result, partials);
    }
    if (longest <= RANGE_TOKENS) return;
#pragma omp for schedule(dynamic, 1)
    for (int r = 0; r < b->n_requests; r++)
        if (end_of(b, r) > RANGE_TOKENS)
            for (size_t at = (size_t)b->row_start[r] * (size_t)s->n_heads; at < (size_t)b->row_start[r + 1] * (size_t)s->n_heads; at++)
                merge_ranges(isa, a, r, at, partials, result);
}
