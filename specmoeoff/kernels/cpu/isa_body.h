/* The primitives of kernels.h over 16-lane vectors. Included once by each isa_*.c, which defines V and v_*; nothing here is
 * visible outside that file, so no code compiled for one instruction set can be linked into another. */

#define INLINE static inline __attribute__((always_inline))

INLINE void tile_body(const int rows, const int vectors, const uint16_t *const *x, const uint16_t *w, size_t w_stride,
                      int pairs, int accumulate, float *out, size_t out_stride, const uint16_t *next, size_t next_step)
{
    const char *fetch = (const char *)next;
    V acc[TILE_ROWS][COLUMNS / LANES];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) acc[r][j] = accumulate ? v_load(out + r * out_stride + j * LANES) : v_zero();
    for (int p = 0; p < pairs; p++, w += w_stride, fetch += next_step) {
        PAIRS strip[COLUMNS / LANES];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            strip[j] = v_pairs(w + j * 2 * LANES);
            __builtin_prefetch(fetch + j * 4 * LANES, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            PAIRS value = v_pair_all(x[r] + 2 * p);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) acc[r][j] = v_dot(acc[r][j], value, strip[j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) v_store(out + r * out_stride + j * LANES, acc[r][j]);
}

#define TILE(R, N)                                                                                                     \
    static void tile_##R##_##N(const uint16_t *const *x, const uint16_t *w, size_t ws, int pairs, int acc, float *out, \
                               size_t os, const uint16_t *next, size_t step)                                           \
    {                                                                                                                  \
        tile_body(R, N, x, w, ws, pairs, acc, out, os, next, step);                                                    \
    }

typedef void (*tile_fn)(const uint16_t *const *, const uint16_t *, size_t, int, int, float *, size_t, const uint16_t *, size_t);

#if SMALL_TILES
/* Registers for 3 rows of 16 columns at most. */
TILE(1, 1) TILE(2, 1) TILE(3, 1)
static const tile_fn TILES[4] = {0, tile_1_1, tile_2_1, tile_3_1};

static void tile(int rows, const uint16_t *const *x, const uint16_t *w, size_t w_stride, int pairs, int vectors,
                 int accumulate, float *out, size_t out_stride, const uint16_t *next, size_t next_step)
{
    for (int r = 0; r < rows; r += 3)
        for (int j = 0; j < vectors; j++)
            TILES[rows - r < 3 ? rows - r : 3](x + r, w + j * 2 * LANES, w_stride, pairs, accumulate,
                                               out + r * out_stride + j * LANES, out_stride, next + j * 2 * LANES, next_step);
}
#else
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(2, 1) TILE(2, 2) TILE(2, 3) TILE(2, 4) TILE(3, 1) TILE(3, 2) TILE(3, 3)
TILE(3, 4) TILE(4, 1) TILE(4, 2) TILE(4, 3) TILE(4, 4) TILE(5, 1) TILE(5, 2) TILE(5, 3) TILE(5, 4) TILE(6, 1) TILE(6, 2)
TILE(6, 3) TILE(6, 4)
#define TILES_OF(R) {0, tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
static const tile_fn TILES[7][5] = {{0}, TILES_OF(1), TILES_OF(2), TILES_OF(3), TILES_OF(4), TILES_OF(5), TILES_OF(6)};

static void tile(int rows, const uint16_t *const *x, const uint16_t *w, size_t w_stride, int pairs, int vectors,
                 int accumulate, float *out, size_t out_stride, const uint16_t *next, size_t next_step)
{
    TILES[rows][vectors](x, w, w_stride, pairs, accumulate, out, out_stride, next, next_step);
}
#endif

/* e^x for -87 <= x <= 88; smaller is clamped. Degree-6 polynomial of 2^fraction, relative error below 2e-7 near 0, 4e-6 at the ends. */
INLINE V v_exp(V x)
{
    V scaled = v_mul(v_max(x, v_all(-87.f)), v_all(1.44269504f));
    V whole = v_round(scaled);
    V f = v_sub(scaled, whole);
    V p = v_all(1.5403530e-4f);
    p = v_fma(p, f, v_all(1.33335581e-3f));
    p = v_fma(p, f, v_all(9.61812911e-3f));
    p = v_fma(p, f, v_all(5.55041087e-2f));
    p = v_fma(p, f, v_all(2.40226507e-1f));
    p = v_fma(p, f, v_all(6.93147181e-1f));
    p = v_fma(p, f, v_all(1.f));
    return v_scale(p, whole);
}

static void rmsnorm(const float *x, const float *weight, float eps, int n, uint16_t *out)
{
    V sum = v_zero();
    for (int i = 0; i < n; i += LANES) {
        V value = v_load(x + i);
        sum = v_fma(value, value, sum);
    }
    V scale = v_all(1.f / __builtin_sqrtf(v_sum(sum) / (float)n + eps));
    for (int i = 0; i < n; i += LANES) v_store_bf16(out + i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
}

static void to_bf16(const float *x, float scale, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += LANES) v_store_bf16(out + i, v_mul(v_load(x + i), v_all(scale)));
}

static void silu_mul(const float *gate, const float *up, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += LANES) {
        V g = v_load(gate + i);
        V denominator = v_add(v_all(1.f), v_exp(v_min(v_sub(v_zero(), g), v_all(88.f))));
        v_store_bf16(out + i, v_mul(v_div(g, denominator), v_load(up + i)));
    }
}

static void add(float *x, const float *y, int n)
{
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_add(v_load(x + i), v_load(y + i)));
}

static void add_scaled(float *x, float a, const float *y, int n)
{
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_add(v_load(x + i), v_mul(v_all(a), v_load(y + i))));
}

static void softmax(const float *scores, int visible, float *maximum, float *sum, float *output, int n,
                    uint16_t *probabilities)
{
    enum { VECTORS = PAGE_TOKENS / LANES };
    V score[VECTORS], highest = v_all(-1e30f);
    for (int j = 0; j < VECTORS; j++) {
        score[j] = v_first(v_load(scores + j * LANES), visible - j * LANES, -1e30f);
        highest = v_max(highest, score[j]);
    }
    float block_maximum = v_highest(highest);
    if (block_maximum > *maximum) {
        V factor = v_exp(v_all(*maximum - block_maximum));
        float first[LANES];
        v_store(first, factor);
        if (*sum == 0.f) first[0] = 0.f; /* nothing accumulated: the clamped exponential must not matter */
        *maximum = block_maximum;
        *sum *= first[0];
        factor = v_all(first[0]);
        for (int i = 0; i < n; i += LANES) v_store(output + i, v_mul(v_load(output + i), factor));
    }
    V total = v_zero();
    for (int j = 0; j < VECTORS; j++) {
        V p = v_first(v_exp(v_sub(score[j], v_all(*maximum))), visible - j * LANES, 0.f);
        total = v_add(total, p);
        v_store_bf16(probabilities + j * LANES, p);
    }
    *sum += v_sum(total);
}
