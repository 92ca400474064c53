/* Rows against strips of packed weights or pages, cut into tiles. Included by the files that compute; nothing is exported. */
#ifndef SPECMOEOFF_TILES_H
#define SPECMOEOFF_TILES_H

#include "kernels.h"

static inline size_t align64(size_t n) { return (n + 63) / 64 * 64; }
static inline int strips(int n) { return (n + COLUMNS - 1) / COLUMNS; }
static inline size_t strip_elements(int n_in) { return (size_t)n_in * COLUMNS; }

/* n rows against `pairs` rows of a strip, which lies in pieces of `piece_pairs`, in even tiles: 7 rows are 4 + 3, not 6 + 1.
 * While they compute, the tiles share the fetching of `next_bytes` at each piece's `next` into the L2 cache: memory is read
 * at a steady rate, however many rows use a strip. */
static inline void tiles(const isa_t *isa, const uint16_t *const *x, int n, const uint16_t *const *w, size_t w_stride, int pairs,
                         int piece_pairs, int vectors, int accumulate, float *out, size_t out_stride,
                         const uint16_t *const *next, size_t next_bytes)
{
    const int n_tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    const size_t step = next_bytes / (size_t)(n_tiles * piece_pairs) + 1;
    for (int r = 0, t = 0; t < n_tiles; t++) {
        const int rows = (n - r + n_tiles - t - 1) / (n_tiles - t);
        const char *fetch[MAX_PIECES];
        for (int i = 0; i * piece_pairs < pairs; i++)
            fetch[i] = (const char *)next[i] + (size_t)t * (size_t)piece_pairs * step;
        isa->tile(rows, x + r, w, w_stride, pairs, piece_pairs, vectors, accumulate, out + (size_t)r * out_stride, out_stride,
                  fetch, step);
        r += rows;
    }
}

/* One strip for n rows: out[r][0 .. 64). Columns are computed in whole vectors up to `columns`. `next`: the strip after it. */
static inline void strip_rows(const isa_t *isa, const uint16_t *const *x, int n, const uint16_t *w, int n_in, int columns,
                              float *out, size_t out_stride, const uint16_t *next)
{
    tiles(isa, x, n, &w, 2 * COLUMNS, n_in / 2, n_in / 2, (columns + LANES - 1) / LANES, 0, out, out_stride, &next,
          2 * strip_elements(n_in));
}

#endif
