/* The primitives of kernels.h over 16-lane vectors. Included once by each isa_*.c, which defines V and v_*; nothing here is
 * visible outside that file, so no code compiled for one instruction set can be linked into another. */

#define INLINE static inline __attribute__((always_inline))

#ifndef v_store_bf16_two
#define v_store_bf16_two(p, v, w) (v_store_bf16(p, v), v_store_bf16((p) + LANES, w))
#endif
#ifndef PREFETCH
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#endif
/* BYTES: of 16 columns of a step. */
#define TILE_BODY(NAME, STEP, BYTES, ROW_VALUE, LOAD, DOT)                                                              \
    INLINE void body_##NAME(const int rows, const int vectors, const void *const *x, const part_t *part, int accumulate, float *out, \
                            size_t out_stride)                                                                         \
    {                                                                                                                  \
        V acc[2 * TILE_ROWS][COLUMNS / LANES];                                                                             \
        float *to = out;                                                                                               \
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++, to += out_stride)                                       \
            _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++)                                                  \
                acc[r][j] = accumulate ? v_load(to + j * LANES) : v_zero();                                            \
        const unsigned char *row = part->w;                                                                             \
        const char *fetch = part->fetch, *again = part->again;                                                         \
        const size_t stride = part->w_stride, fetch_step = part->fetch_step;                                           \
        const int steps = part->steps;                                                                                 \
        _Pragma("GCC unroll 4") for (int p = 0; p < steps; p++, row += stride, fetch += fetch_step, again += fetch_step) { \
            STEP strip[COLUMNS / LANES];                                                                               \
            _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++)                                                  \
            {                                                                                                          \
                strip[j] = LOAD(row + j * BYTES);                                                                      \
                if (j * BYTES % 64 != 0 || (j > 0 && fetch_step <= (size_t)j * BYTES)) continue;                  \
                PREFETCH(fetch + j * BYTES);                                                                           \
                PREFETCH(again + j * BYTES);                                                                           \
            }                                                                                                          \
            _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++)                                                     \
            {                                                                                                          \
                STEP value = ROW_VALUE;                                                                                \
                _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++) acc[r][j] = DOT(acc[r][j], value, strip[j]);  \
            }                                                                                                          \
        }                                                                                                              \
        __asm__("" : "+r"(out)); /* else 24 addresses are kept from the loads above */                                 \
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++, out += out_stride)                                      \
            _Pragma("GCC unroll 4") for (int j = 0; j < vectors; j++) v_store(out + j * LANES, acc[r][j]);             \
    }
#define PAIR_OF_ROW v_pair_all((const uint16_t *)x[r] + 2 * p)
#define FLOAT_OF_ROW v_all(((const float *)x[r])[p])
#define LOAD_PAIRS(at) v_pairs((const uint16_t *)(const void *)(at))
#define LOAD_FP16(at) v_load_fp16((const uint16_t *)(const void *)(at))
#define LOAD_FP32(at) v_load((const float *)(const void *)(at))
#define LOAD_INT8(at) v_load_int8((const int8_t *)(at))
#define FMA(acc, x, y) v_fma(x, y, acc)
TILE_BODY(bf16, PAIRS, 64, PAIR_OF_ROW, LOAD_PAIRS, v_dot)
TILE_BODY(fp16, V, 32, FLOAT_OF_ROW, LOAD_FP16, FMA)
TILE_BODY(fp32, V, 64, FLOAT_OF_ROW, LOAD_FP32, FMA)
TILE_BODY(int8, V, 16, FLOAT_OF_ROW, LOAD_INT8, FMA)

typedef void (*tile_fn)(const void *const *, const part_t *, int, float *, size_t);
#define TILE(F, R, N)                                                                                  \
    static void tile_##F##_##R##_##N(const void *const *x, const part_t *part, int acc, float *out, size_t os) \
    {                                                                                                  \
        body_##F(R, N, x, part, acc, out, os);                                                         \
    }

#if SMALL_TILES
/* Registers for the sums of four rows of 16 columns, or one of 64: with fewer at once each sum would wait for itself. */
#define TILES(F, BYTES)                                                                                                       \
    TILE(F, 1, 1) TILE(F, 1, 2) TILE(F, 1, 3) TILE(F, 1, 4) TILE(F, 2, 1) TILE(F, 3, 1) TILE(F, 4, 1)                         \
    static void tile_##F(int rows, const void *const *x, const part_t *part, int vectors, int accumulate, float *out, size_t stride) \
    {                                                                                                                         \
        static const tile_fn one_row[5] = {0, tile_##F##_1_1, tile_##F##_1_2, tile_##F##_1_3, tile_##F##_1_4};                \
        static const tile_fn narrow_tiles[5] = {0, tile_##F##_1_1, tile_##F##_2_1, tile_##F##_3_1, tile_##F##_4_1};           \
        if (rows == 1) {                                                                                                      \
            one_row[vectors](x, part, accumulate, out, stride);                                                               \
            return;                                                                                                           \
        }                                                                                                                     \
        const int passes = (rows + 3) / 4, most = (rows + passes - 1) / passes; /* 5 rows are 3 + 2 */                        \
        for (int j = 0; j < vectors; j++) {                                                                                   \
            part_t narrow = *part;                                                                                             \
            narrow.w += j * BYTES;                                                                                            \
            narrow.fetch += j * BYTES;                                                                                        \
            narrow.again += j * BYTES;                                                                                        \
            for (int r = 0; r < rows; r += most)                                                                              \
                narrow_tiles[rows - r < most ? rows - r : most](x + r, &narrow, accumulate, out + r * stride + j * LANES, stride); \
        }                                                                                                                     \
    }
#else
#define TILES_OF(F, R) TILE(F, R, 1) TILE(F, R, 2) TILE(F, R, 3) TILE(F, R, 4)
#define NAMES_OF(F, R) {0, tile_##F##_##R##_1, tile_##F##_##R##_2, tile_##F##_##R##_3, tile_##F##_##R##_4}
/* Twice the rows of half a strip. */
#define HALVES_OF(F, R) TILE(F, R, 1) TILE(F, R, 2)
#define HALF_NAMES_OF(F, R) {0, tile_##F##_##R##_1, tile_##F##_##R##_2}
#define TILES(F, BYTES)                                                                                                       \
    TILES_OF(F, 1) TILES_OF(F, 2) TILES_OF(F, 3) TILES_OF(F, 4) TILES_OF(F, 5) TILES_OF(F, 6)                                 \
    HALVES_OF(F, 7) HALVES_OF(F, 8) HALVES_OF(F, 9) HALVES_OF(F, 10) HALVES_OF(F, 11) HALVES_OF(F, 12)                        \
    static void tile_##F(int rows, const void *const *x, const part_t *part, int vectors, int accumulate, float *out, size_t stride) \
    {                                                                                                                         \
        static const tile_fn tiles[][5] = {{0},                  NAMES_OF(F, 1),       NAMES_OF(F, 2),      NAMES_OF(F, 3),      \
                                           NAMES_OF(F, 4),       NAMES_OF(F, 5),       NAMES_OF(F, 6),      HALF_NAMES_OF(F, 7), \
                                           HALF_NAMES_OF(F, 8),  HALF_NAMES_OF(F, 9),  HALF_NAMES_OF(F, 10),                     \
                                           HALF_NAMES_OF(F, 11), HALF_NAMES_OF(F, 12)};                                          \
        tiles[rows][vectors](x, part, accumulate, out, stride);                                                               \
    }
#endif
TILES(bf16, 64) TILES(fp16, 32) TILES(fp32, 64) TILES(int8, 16)

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

static void to_fp16(const float *x, int n, uint16_t *out)
{
    for (int i = 0; i < n; i += LANES) v_store_fp16(out + i, v_load(x + i));
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

INLINE void softmax_body(const int full, const int wide, const float *scores, const uint16_t *mask, const float *scales,
                         float *reference, float *sums, float *output, int n, void *probabilities)
{
    enum { VECTORS = PAGE_TOKENS / LANES };
    const V log2e = v_all(1.44269504f);
    V score[VECTORS], highest = v_all(LOWEST);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
        score[j] = v_load(scores + j * LANES);
        if (wide && scales) score[j] = v_mul(score[j], v_load(scales + j * LANES));
        if (!full) score[j] = v_keep(score[j], mask[j], LOWEST);
        highest = v_max(highest, score[j]);
    }
    if (v_any_above(highest, v_all(*reference + SLACK))) {
        const float found = v_highest(highest);
        if (*reference != LOWEST) { /* else nothing is there yet */
            const V factor = v_exp(v_all(*reference - found));
            v_store(sums, v_mul(v_load(sums), factor));
            for (int i = 0; i < n; i += LANES) v_store(output + i, v_mul(v_load(output + i), factor));
        }
        *reference = found;
    }
    const V shift = v_all(-1.44269504f * *reference), level = v_all(*reference);
    V total = v_load(sums), p[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
        p[j] = wide ? v_exp(v_sub(score[j], level)) : v_exp2(v_fma(score[j], log2e, shift));
        if (!full) p[j] = v_keep(p[j], mask[j], 0.f);
        total = v_add(total, p[j]);
        if (wide) v_store((float *)probabilities + j * LANES, scales ? v_mul(p[j], v_load(scales + PAGE_TOKENS + j * LANES)) : p[j]);
        else if (j % 2) v_store_bf16_two((uint16_t *)probabilities + (j - 1) * LANES, p[j - 1], p[j]);
    }
    v_store(sums, total);
}

static void softmax(const float *scores, const uint16_t *mask, const float *scales, float *reference, float *sums, float *output, int n,
                    int wide, void *probabilities)
{
    if (wide && mask) softmax_body(0, 1, scores, mask, scales, reference, sums, output, n, probabilities);
    else if (wide) softmax_body(1, 1, scores, mask, scales, reference, sums, output, n, probabilities);
    else if (mask) softmax_body(0, 0, scores, mask, scales, reference, sums, output, n, probabilities);
    else softmax_body(1, 0, scores, mask, scales, reference, sums, output, n, probabilities);
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

/* ROWS at most in a tile of bf16, and what computes it. */
#define ISA(NAME, ROWS, TILE_BF16, PRECISION, PUT, HALVES, F32)                                                            \
    {NAME, supported, {TILE_BF16, tile_fp16, tile_fp32, tile_int8}, {ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS}, {(int)ROWS == (int)TILE_ROWS && !SMALL_TILES, !SMALL_TILES, !SMALL_TILES, !SMALL_TILES}, rmsnorm##PRECISION, to_bf16, \
     to_fp16, swiglu##PRECISION, add, add_scaled, softmax, sum_of, merge, HALVES, PUT, &F32, tile_codes, quantise}
