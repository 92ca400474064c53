/* Products of quantised rows and weights over 16 lanes of four bytes. Included by each isa_*.c after isa_body.h, once it has
 * defined VI and its operations; what codes are is said in experts.c. */

/* Where a quantised row of n numbers has the scales of its groups, and what a sum of code * row begins with: -offset * sum(row). */
#define ROW_SCALES(row, n) ((const float *)((row) + (n)))
#define ROW_STARTS(row, n, group) ((const int32_t *)(ROW_SCALES(row, n) + (n) / (group)))

#if SMALL_TILES
enum { CODES_ROWS = 3, CODES_VECTORS = 1 };
#else
enum { CODES_ROWS = TILE_ROWS, CODES_VECTORS = COLUMNS / LANES };
#endif

/* Vectors `from` and on of a strip's four. */
INLINE void codes_body(const int format, const int rows, int from, const unsigned char *const *x, int n, int first, int last,
                       const unsigned char *w, float *out, const char *next, size_t next_step)
{
    const int group = FORMATS[format].group, halves = FORMATS[format].bits == 4 ? 2 : 1, lines = group / (4 * halves);
    const int column = CODES_VECTORS * LANES == COLUMNS ? 0 : from;
    for (int g = first; g < last; g++) {
        const uint16_t *scales = (const uint16_t *)(const void *)w + column * LANES;
        VI acc[CODES_ROWS][CODES_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < CODES_VECTORS; j++) acc[r][j] = v_ints(ROW_STARTS(x[r], n, group)[g]);
        w += 2 * COLUMNS;
        for (int line = 0; line < lines; line++, w += 4 * COLUMNS, next += next_step)
#pragma GCC unroll 2
            for (int half = 0; half < halves; half++) {
                VI codes[CODES_VECTORS];
#pragma GCC unroll 4
                for (int j = 0; j < CODES_VECTORS; j++) {
                    const VI bytes = v_bytes(w + (column + j) * 4 * LANES);
                    codes[j] = halves == 1 ? bytes : half ? v_high(bytes) : v_low(bytes);
                    if (format == MXFP4) codes[j] = v_e2m1(codes[j]);
                    if (!half) __builtin_prefetch(next + (column + j) * 4 * LANES, 0, 2);
                }
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const VI values = v_bytes_all(x[r] + g * group + 4 * (halves * line + half));
#pragma GCC unroll 4
                    for (int j = 0; j < CODES_VECTORS; j++) acc[r][j] = v_dot4(acc[r][j], codes[j], values);
                }
            }
#pragma GCC unroll 4
        for (int j = 0; j < CODES_VECTORS; j++) {
            const V scale = v_widen(scales + j * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                float *sum = out + r * COLUMNS + (column + j) * LANES;
                const V both = v_mul(scale, v_all(ROW_SCALES(x[r], n)[g]));
                v_store(sum, v_fma(both, v_float(acc[r][j]), g ? v_load(sum) : v_zero()));
            }
        }
    }
}

/* A function for each size: inlined into one that holds them all, the sums would not stay in registers. */
typedef void (*codes_fn)(int, const unsigned char *const *, int, int, int, const unsigned char *, float *, const char *, size_t);
#define CODES(F, R)                                                                                                                \
    static __attribute__((noinline)) void codes_##F##_##R(int column, const unsigned char *const *x, int n, int first, int last,     \
                                                          const unsigned char *w, float *out, const char *next, size_t next_step) \
    {                                                                                                                              \
        codes_body(F, R, column, x, n, first, last, w, out, next, next_step);                                                      \
    }
#if SMALL_TILES
#define CODES_OF(F) CODES(F, 1) CODES(F, 2) CODES(F, 3)
#define CODES_NAMES(F) {0, codes_##F##_1, codes_##F##_2, codes_##F##_3}
#else
#define CODES_OF(F) CODES(F, 1) CODES(F, 2) CODES(F, 3) CODES(F, 4) CODES(F, 5) CODES(F, 6)
#define CODES_NAMES(F) {0, codes_##F##_1, codes_##F##_2, codes_##F##_3, codes_##F##_4, codes_##F##_5, codes_##F##_6}
#endif
CODES_OF(INT8) CODES_OF(INT4) CODES_OF(MXFP4)

static void tile_codes(int format, int rows, const unsigned char *const *x, int n, int first, int last, const unsigned char *w,
                       float *out, const char *next, size_t next_step)
{
    static const codes_fn tiles[N_FORMATS][CODES_ROWS + 1] = {{0}, CODES_NAMES(INT8), CODES_NAMES(INT4), CODES_NAMES(MXFP4)};
    for (int r = 0; r < rows; r += CODES_ROWS)
        for (int column = 0; column < COLUMNS / LANES; column += CODES_VECTORS)
            tiles[format][rows - r < CODES_ROWS ? rows - r : CODES_ROWS](column, x + r, n, first, last, w, out + r * COLUMNS, next, next_step);
}

/* Columns first .. first + n, a whole number of groups or the rest of the row, of a row of `width`. */
INLINE void quantise_body(const int format, const uint16_t *x, int n, int first, int width, unsigned char *row)
{
    const int group = FORMATS[format].group;
    for (int i = 0; i < n || (first + i) % COLUMNS; i += group) {
        uint16_t rest[COLUMNS] = {0};
        if (n - i < group) memcpy(rest, x + i, 2 * (size_t)(n - i < 0 ? 0 : n - i));
        const uint16_t *part = n - i < group ? rest : x + i;
        V highest = v_zero(), nothing = v_zero(); /* NaN where a number is not finite */
        for (int k = 0; k < group; k += LANES) {
            const V value = v_widen(part + k);
            highest = v_max(highest, v_max(value, v_sub(v_zero(), value)));
            nothing = v_fma(value, v_zero(), nothing);
        }
        const float most = v_highest(highest) + v_sum(nothing);
        const int finite = most < __builtin_inff(), g = (first + i) / group;
        const V inverse = v_all(finite && most > 1e-30f ? 127.f / most : 0.f);
        V sum = v_zero();
        for (int k = 0; k < group; k += LANES) {
            const V code = v_round(v_mul(v_widen(part + k), inverse));
            v_store_bytes((signed char *)row + first + i + k, code);
            sum = v_add(sum, code);
        }
        ((float *)ROW_SCALES(row, width))[g] = most / 127.f;
        ((int32_t *)ROW_STARTS(row, width, group))[g] = finite ? -FORMATS[format].offset * (int)v_sum(sum) : 0;
    }
}

static void quantise(int format, const uint16_t *x, int n, int first, int width, unsigned char *row)
{
    if (format == INT8) quantise_body(INT8, x, n, first, width, row);
    else if (format == INT4) quantise_body(INT4, x, n, first, width, row);
    else quantise_body(MXFP4, x, n, first, width, row);
}
