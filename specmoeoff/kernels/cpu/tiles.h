/* Rows against strips of packed weights or pages, cut into tiles. Included by the files that compute; nothing is exported. */
#ifndef SPECMOEOFF_TILES_H
#define SPECMOEOFF_TILES_H

#include "kernels.h"

static inline size_t align64(size_t n) { return (n + 63) / 64 * 64; }
static inline int strips(int n) { return (n + COLUMNS - 1) / COLUMNS; }
static inline size_t strip_elements(int n_in) { return (size_t)n_in * COLUMNS; }

/* The tiles that share a strip share the fetching of what comes next into the L2 cache too: memory is read at a steady rate,
 * however many rows use a strip. Bytes to fetch at every step of each of n_tiles: */
static inline size_t fetch_step(size_t next_bytes, int n_tiles, int steps)
{
    const size_t parts = (size_t)(n_tiles * steps);
    return (next_bytes + parts - 1) / parts;
}
/* Tile t's part. */
static inline part_t part_of(const void *w, size_t w_stride, int steps, int t, const void *next, const void *again, size_t step)
{
    const size_t before = (size_t)t * (size_t)steps * step;
    return (part_t){w, w_stride, steps, (const char *)next + before, (const char *)again + before, step};
}

/* Some steps of packed weights for n rows in even tiles, 7 rows are 4 + 3, not 6 + 1: out[r][0 .. 64) (+)= .... Columns are
 * computed in whole vectors up to `columns`. `next`: what follows. */
static inline void tile_rows(const isa_t *isa, const uint16_t *const *x, int n, const void *w, int steps, int columns, int accumulate,
                             float *out, size_t out_stride, const void *next, const void *again, size_t next_bytes)
{
    const int format = isa->halves == 2 ? KV_FP32 : KV_BF16, n_tiles = (n + isa->tile_rows[format] - 1) / isa->tile_rows[format];
    const size_t step = fetch_step(next_bytes, n_tiles, steps);
    for (int r = 0, t = 0; t < n_tiles; t++) {
        const int rows = n / n_tiles + (t < n % n_tiles);
        const part_t part = part_of(w, 4 * COLUMNS, steps, t, next, again, step);
        isa->tile[format](rows, (const void *const *)(x + r), &part, (columns + LANES - 1) / LANES,
                          accumulate, out + (size_t)r * out_stride, out_stride);
        r += rows;
    }
}

/* A whole strip of n_in halves, and the one after it. */
static inline void strip_rows(const isa_t *isa, const uint16_t *const *x, int n, const uint16_t *w, int n_in, int columns,
                              float *out, size_t out_stride, const uint16_t *next)
{
    tile_rows(isa, x, n, w, n_in / 2, columns, 0, out, out_stride, next, next, 2 * strip_elements(n_in));
}

#endif
