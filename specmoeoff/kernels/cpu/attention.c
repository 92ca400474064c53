/* Verification attention: the new tokens of every request against its paged keys and values, each read once for all of them.
 *
 * Query heads that share a KV head are folded into rows. A work item is some rows of some KV heads of one request over one
 * range of positions. Ranges lie at fixed positions and each begins anew; what they found is merged in their order. So a row's
 * bits depend neither on how the work is split nor on what it is split with, and one long request keeps all threads busy.
 */
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "tiles.h"

enum {
    RANGE_TOKENS = 4096, /* a multiple of BLOCK_TOKENS */
    ITEM_ROWS = 48,      /* rows of all its heads: scores, probabilities and outputs stay in the L2 cache */
    ITEMS_A_THREAD = 8,  /* enough to even out threads of unequal speed */
    MAX_DIM = 256,
    RECORD = 2 * LANES /* what stands before the output in a partial result: reference, sums */
};

static int ranges(int end) { return (end + RANGE_TOKENS - 1) / RANGE_TOKENS; }
static size_t record_floats(const layer_shape_t *s) { return RECORD + (size_t)s->head_dim; }

size_t partial_bytes(const layer_shape_t *s, int n_rows, int end)
{
    return end > RANGE_TOKENS ? (size_t)ranges(end) * (size_t)n_rows * (size_t)s->n_heads * record_floats(s) * sizeof(float) : 0;
}

typedef struct {
    int request, first_head, n_heads, first_row, n_rows, range; /* rows of each head: (token, query head of the group) */
} item_t;

static int end_of(const batch_t *b, int request)
{
    return b->first_position[request] + b->row_start[request + 1] - b->row_start[request];
}

/* Number of (token, query head) of a folded row. */
static size_t output_of(const attention_t *a, int request, int head, int row)
{
    const int group = a->shape->n_heads / a->shape->n_kv_heads;
    return (size_t)(a->batch->row_start[request] + row / group) * (size_t)a->shape->n_heads + (size_t)(head * group + row % group);
}

/* Online softmax over the blocks of a range. The heads take turns at every block: a page is read from one end to the other. */
static void attend(const isa_t *isa, const attention_t *a, item_t item, const uint16_t *query, uint16_t *result, float *partials)
{
    const layer_shape_t *s = a->shape;
    const batch_t *b = a->batch;
    const int dim = s->head_dim, group = s->n_heads / s->n_kv_heads, n = item.n_rows, n_all = n * item.n_heads;
    float scores[TILE_ROWS * BLOCK_TOKENS] __attribute__((aligned(64)));
    float outputs[ITEM_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float sums[ITEM_ROWS * LANES] __attribute__((aligned(64)));
    uint16_t probabilities[ITEM_ROWS * BLOCK_TOKENS] __attribute__((aligned(64)));
    const uint16_t *queries[ITEM_ROWS], *weights[ITEM_ROWS];
    float reference[ITEM_ROWS];
    int limit[ITEM_ROWS];

    for (int i = 0; i < n_all; i++) {
        const int row = item.first_row + i % n;
        queries[i] = query + output_of(a, item.request, item.first_head + i / n, row) * (size_t)dim;
        weights[i] = probabilities + i * BLOCK_TOKENS;
        limit[i] = b->first_position[item.request] + row / group + 1;
        reference[i] = LOWEST;
    }
    memset(outputs, 0, sizeof(float) * (size_t)n_all * (size_t)dim);
    memset(sums, 0, sizeof(float) * (size_t)n_all * LANES);

    const int begin = item.range * RANGE_TOKENS;
    const int end = limit[n - 1] < begin + RANGE_TOKENS ? limit[n - 1] : begin + RANGE_TOKENS;
    const int last_page = (end - 1) / PAGE_TOKENS, n_tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    const int32_t *table = b->page_table + (size_t)item.request * b->max_pages;
    const size_t head_elements = (size_t)dim * PAGE_TOKENS, step = 2 * head_elements / (size_t)(n_tiles * (dim / 2)) + 1;
    for (int first = begin; first < end; first += BLOCK_TOKENS) {
        const int used = end - first < BLOCK_TOKENS ? end - first : BLOCK_TOKENS;
        const uint16_t *keys[BLOCK_PAGES], *values[BLOCK_PAGES], *later[BLOCK_PAGES];
        for (int i = 0; i < BLOCK_PAGES; i++) {
            const int wanted = first / PAGE_TOKENS + i, page = wanted < last_page ? wanted : last_page;
            const int next_page = page + BLOCK_PAGES <= last_page ? page + BLOCK_PAGES : page;
            keys[i] = a->k_pages + (size_t)table[page] * page_elements(s) + (size_t)item.first_head * head_elements;
            values[i] = a->v_pages + (keys[i] - a->k_pages);
            later[i] = a->k_pages + (size_t)table[next_page] * page_elements(s) + (size_t)item.first_head * head_elements;
        }
        for (int h = 0; h < item.n_heads; h++) {
            /* Scores of one tile at a time: they stay in the L1 cache. */
            for (int r = 0, t = 0; t < n_tiles; t++) {
                const int rows = (n - r + n_tiles - t - 1) / (n_tiles - t);
                for (int i = 0; i * PAGE_TOKENS < used; i++) {
                    const int columns = used - i * PAGE_TOKENS < PAGE_TOKENS ? used - i * PAGE_TOKENS : PAGE_TOKENS;
                    const uint16_t *key = keys[i] + (size_t)h * head_elements;
                    const uint16_t *next = h + 1 < item.n_heads ? key + head_elements : values[i];
                    const char *fetch = (const char *)next + (size_t)t * (size_t)(dim / 2) * step;
                    isa->tile(rows, queries + h * n + r, &key, 2 * PAGE_TOKENS, dim / 2, dim / 2,
                              (columns + LANES - 1) / LANES, 0, scores + i * PAGE_TOKENS, BLOCK_TOKENS, &fetch, step);
                }
                for (int q = 0; q < rows; q++, r++)
                    isa->softmax(scores + q * BLOCK_TOKENS, limit[r] - first, &reference[h * n + r], sums + (h * n + r) * LANES,
                                 outputs + (size_t)(h * n + r) * (size_t)dim, dim, probabilities + (h * n + r) * BLOCK_TOKENS);
            }
        }
        for (int h = 0; h < item.n_heads; h++)
            for (int column = 0; column < dim; column += COLUMNS) {
                const int columns = dim - column < COLUMNS ? dim - column : COLUMNS;
                const uint16_t *part[BLOCK_PAGES], *next[BLOCK_PAGES];
                for (int i = 0; i < BLOCK_PAGES; i++) {
                    const uint16_t *value = values[i] + (size_t)h * head_elements;
                    part[i] = value + 2 * column;
                    next[i] = (h + 1 < item.n_heads ? value + head_elements : later[i]) + (size_t)column * PAGE_TOKENS;
                }
                tiles(isa, weights + h * n, n, part, 2 * (size_t)dim, (used + 1) / 2, PAGE_TOKENS / 2, columns / LANES, 1,
                      outputs + (size_t)(h * n) * (size_t)dim + column, (size_t)dim, next, (size_t)columns * PAGE_TOKENS * 2);
            }
    }
    for (int i = 0; i < n_all; i++) {
        const size_t at = output_of(a, item.request, item.first_head + i / n, item.first_row + i % n);
        const float *output = outputs + (size_t)i * (size_t)dim;
        if (end_of(b, item.request) <= RANGE_TOKENS) {
            isa->to_bf16(output, 1.f / isa->sum_of(sums + i * LANES), dim, result + at * (size_t)dim);
            continue;
        }
        float *record = partials + ((size_t)item.range * (size_t)b->n_rows * (size_t)s->n_heads + at) * record_floats(s);
        record[0] = reference[i];
        memcpy(record + LANES, sums + i * LANES, sizeof(float) * LANES);
        memcpy(record + RECORD, output, sizeof(float) * (size_t)dim);
    }
}

/* What the ranges of one row and head found, in their order. */
static void merge_ranges(const isa_t *isa, const attention_t *a, int request, size_t at, float *partials, uint16_t *result)
{
    const layer_shape_t *s = a->shape;
    const size_t stride = (size_t)a->batch->n_rows * (size_t)s->n_heads * record_floats(s);
    float *into = partials + at * record_floats(s);
    for (int i = 1; i < ranges(end_of(a->batch, request)); i++) {
        const float *from = into + (size_t)i * stride;
        if (from[0] != LOWEST) /* else the row ends before this range */
            isa->merge(into, into + LANES, into + RECORD, from[0], from + LANES, from + RECORD, s->head_dim);
    }
    isa->to_bf16(into + RECORD, 1.f / isa->sum_of(into + LANES), s->head_dim, result + at * (size_t)s->head_dim);
}

void attend_all(const isa_t *isa, const attention_t *a, const uint16_t *query, uint16_t *result, float *partials)
{
    const layer_shape_t *s = a->shape;
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
