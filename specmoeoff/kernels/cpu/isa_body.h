/* The primitives of kernels.h over 16-lane vectors. Included once by each isa_*.c, which defines V and v_*; nothing here is
 * visible outside that file, so no code compiled for one instruction set can be linked into another. */

#define INLINE static inline __attribute__((always_inline))

INLINE void tile_body(const int rows, const int vectors, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride,
                      int pairs, int piece_pairs, int accumulate, float *out, size_t out_stride, const char *const *next,
                      size_t next_step)
{
    V acc[TILE_ROWS][COLUMNS / LANES];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) acc[r][j] = accumulate ? v_load(out + r * out_stride + j * LANES) : v_zero();
    for (int piece = 0, first = 0; first < pairs; piece++, first += piece_pairs) {
        const int last = pairs - first < piece_pairs ? pairs : first + piece_pairs;
        const uint16_t *row = w[piece];
        const char *fetch = next[piece];
        for (int p = first; p < last; p++, row += w_stride, fetch += next_step) {
            PAIRS strip[COLUMNS / LANES];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) {
                strip[j] = v_pairs(row + j * 2 * LANES);
                __builtin_prefetch(fetch + j * 4 * LANES, 0, 2);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                PAIRS value = v_pair_all(x[r] + 2 * p);
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) acc[r][j] = v_dot(acc[r][j], value, strip[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) v_store(out + r * out_stride + j * LANES, acc[r][j]);
}

#define TILE(R, N)                                                                                                     \
    static void tile_##R##_##N(const uint16_t *const *x, const uint16_t *const *w, size_t ws, int pairs, int piece,    \
                               int acc, float *out, size_t os, const char *const *next, size_t step)                   \
    {                                                                                                                  \
        tile_body(R, N, x, w, ws, pairs, piece, acc, out, os, next, step);                                             \
    }

typedef void (*tile_fn)(const uint16_t *const *, const uint16_t *const *, size_t, int, int, int, float *, size_t,
                        const char *const *, size_t);

#if SMALL_TILES
/* Registers for 3 rows of 16 columns at most. */
TILE(1, 1) TILE(2, 1) TILE(3, 1)
static const tile_fn TILES[4] = {0, tile_1_1, tile_2_1, tile_3_1};

static void tile(int rows, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride, int pairs, int piece_pairs,
                 int vectors, int accumulate, float *out, size_t out_stride, const char *const *next, size_t next_step)
{
    for (int j = 0; j < vectors; j++) {
        const uint16_t *part[MAX_PIECES];
        const char *fetch[MAX_PIECES];
        for (int piece = 0; piece * piece_pairs < pairs; piece++) {
            part[piece] = w[piece] + j * 2 * LANES;
            fetch[piece] = next[piece] + j * 4 * LANES;
        }
        for (int r = 0; r < rows; r += 3)
            TILES[rows - r < 3 ? rows - r : 3](x + r, part, w_stride, pairs, piece_pairs, accumulate,
                                               out + r * out_stride + j * LANES, out_stride, fetch, next_step);
    }
}
#else
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(2, 1) TILE(2, 2) TILE(2, 3) TILE(2, 4) TILE(3, 1) TILE(3, 2) TILE(3, 3)
TILE(3, 4) TILE(4, 1) TILE(4, 2) TILE(4, 3) TILE(4, 4) TILE(5, 1) TILE(5, 2) TILE(5, 3) TILE(5, 4) TILE(6, 1) TILE(6, 2)
TILE(6, 3) TILE(6, 4)
#define TILES_OF(R) {0, tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
static const tile_fn TILES[7][5] = {{0}, TILES_OF(1), TILES_OF(2), TILES_OF(3), TILES_OF(4), TILES_OF(5), TILES_OF(6)};

static void tile(int rows, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride, int pairs, int piece_pairs,
                 int vectors, int accumulate, float *out, size_t out_stride, const char *const *next, size_t next_step)
{
    TILES[rows][vectors](x, w, w_stride, pairs, piece_pairs, accumulate, out, out_stride, next, next_step);
}
#endif

/* The same in fp32: a word of 32 bits is one element in place of a pair. */
INLINE void tile_f32_body(const int rows, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride, int words,
                          int piece_words, int accumulate, float *out, size_t out_stride)
{
    V acc[TILE_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) acc[r] = accumulate ? v_load(out + r * out_stride) : v_zero();
    for (int piece = 0, first = 0; first < words; piece++, first += piece_words) {
        const int last = words - first < piece_words ? words : first + piece_words;
        const uint16_t *row = w[piece];
        for (int p = first; p < last; p++, row += w_stride) {
            const V strip = v_load((const float *)row);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) acc[r] = v_fma(v_all(((const float *)x[r])[p]), strip, acc[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) v_store(out + r * out_stride, acc[r]);
}

static void tile_f32(int rows, const uint16_t *const *x, const uint16_t *const *w, size_t w_stride, int words, int piece_words,
                     int vectors, int accumulate, float *out, size_t out_stride, const char *const *next, size_t next_step)
{
    (void)next, (void)next_step;
    for (int j = 0; j < vectors; j++) {
        const uint16_t *part[MAX_PIECES];
        for (int piece = 0; piece * piece_words < words; piece++) part[piece] = w[piece] + j * 2 * LANES;
#define ROWS(R)                                                                                                        \
    case R: tile_f32_body(R, x, part, w_stride, words, piece_words, accumulate, out + j * LANES, out_stride); break;
        switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
    }
}

/* Activations are bf16 or fp32, as the model's weights are. */
INLINE void v_put(const int f32, uint16_t *out, int i, V v)
{
    if (f32) v_store((float *)out + i, v);
    else v_store_bf16(out + i, v);
}
#define OF_EACH_PRECISION(name, parameters, ...)                                    \
    static void name parameters { name##_body(0, __VA_ARGS__); }                    \
    static void name##_f32 parameters { name##_body(1, __VA_ARGS__); }

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

INLINE void rmsnorm_body(const int f32, const float *x, const float *weight, float eps, int n, uint16_t *out)
{
    V sum = v_zero();
    for (int i = 0; i < n; i += LANES) {
        V value = v_load(x + i);
        sum = v_fma(value, value, sum);
    }
    V scale = v_all(1.f / __builtin_sqrtf(v_sum(sum) / (float)n + eps));
    for (int i = 0; i < n; i += LANES) v_put(f32, out, i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
}
OF_EACH_PRECISION(rmsnorm, (const float *x, const float *weight, float eps, int n, uint16_t *out), x, weight, eps, n, out)

static void to_bf16(const float *x, float scale, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += LANES) v_store_bf16(out + i, v_mul(v_load(x + i), v_all(scale)));
}

static void to_f32(const float *x, float scale, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += LANES) v_store((float *)out + i, v_mul(v_load(x + i), v_all(scale)));
}

INLINE void swiglu_body(const int f32, const float *gate, const float *up, const swiglu_t *s, int n, uint16_t *out)
{
    const V limit = v_all(s->limit), lowest = v_all(-s->limit); /* on the left: NaN passes */
    for (int i = 0; i < n; i += LANES) {
        const V g = v_min(limit, v_load(gate + i)), u = v_max(lowest, v_min(limit, v_load(up + i)));
        const V denominator = v_add(v_all(1.f), v_exp(v_min(v_mul(v_all(-s->alpha), g), v_all(88.f))));
        v_put(f32, out, i, v_mul(v_div(g, denominator), v_add(u, v_all(s->shift))));
    }
}
OF_EACH_PRECISION(swiglu, (const float *gate, const float *up, const swiglu_t *s, int n, uint16_t *out), gate, up, s, n, out)

static void add(float *x, const float *y, int n)
{
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_add(v_load(x + i), v_load(y + i)));
}

static void add_scaled(float *x, float a, const float *y, int n)
{
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_add(v_load(x + i), v_mul(v_all(a), v_load(y + i))));
}

/* 2^x for x <= 127, exactly 1 for 0. Degree-3 minimax polynomial of 2^fraction: relative error 1e-4, where bf16 rounds by 2e-3. */
INLINE V v_exp2(V x)
{
    V whole = v_round(x);
    V f = v_sub(x, whole);
    V p = v_fma(v_all(5.500892923e-2f), f, v_all(2.422109544e-1f));
    p = v_fma(p, f, v_all(6.932829022e-1f));
    return v_scale(v_fma(p, f, v_all(1.f)), whole);
}

INLINE void softmax_body(const int full, const float *scores, int visible, float *reference, float *sums, float *output, int n,
                         uint16_t *probabilities)
{
    enum { VECTORS = BLOCK_TOKENS / LANES };
    const V log2e = v_all(1.44269504f);
    V score[VECTORS], highest = v_all(LOWEST);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
        score[j] = v_load(scores + j * LANES);
        if (!full) score[j] = v_first(score[j], visible - j * LANES, LOWEST);
        highest = v_max(highest, score[j]);
    }
    if (v_any_above(highest, v_all(*reference + SLACK))) {
        const float found = v_highest(highest);
        const V factor = v_exp(v_all(*reference - found)); /* of nothing yet: about 0, times 0 */
        *reference = found;
        v_store(sums, v_mul(v_load(sums), factor));
        for (int i = 0; i < n; i += LANES) v_store(output + i, v_mul(v_load(output + i), factor));
    }
    const V shift = v_all(-1.44269504f * *reference);
    V total = v_load(sums);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
        V p = v_exp2(v_fma(score[j], log2e, shift));
        if (!full) p = v_first(p, visible - j * LANES, 0.f);
        total = v_add(total, p);
        v_store_bf16(probabilities + j * LANES, p);
    }
    v_store(sums, total);
}

static void softmax(const float *scores, int visible, float *reference, float *sums, float *output, int n, uint16_t *probabilities)
{
    if (visible >= BLOCK_TOKENS) softmax_body(1, scores, visible, reference, sums, output, n, probabilities);
    else softmax_body(0, scores, visible, reference, sums, output, n, probabilities);
}

static float sum_of(const float *lanes) { return v_sum(v_load(lanes)); }

static void merge(float *reference, float *sums, float *output, float other, const float *other_sums, const float *other_output,
                  int n)
{
    const float highest = other > *reference ? other : *reference;
    const V mine = v_exp(v_all(*reference - highest)), its = v_exp(v_all(other - highest));
    *reference = highest;
    v_store(sums, v_add(v_mul(v_load(sums), mine), v_mul(v_load(other_sums), its)));
    for (int i = 0; i < n; i += LANES)
        v_store(output + i, v_add(v_mul(v_load(output + i), mine), v_mul(v_load(other_output + i), its)));
}
