/* Products of quantised rows and weights over 16 lanes of four bytes. Included by each isa_*.c after isa_body.h, once it has
 * defined VI and its operations; what codes are is said in experts.c. */

/* Where a quantised row of n numbers has the scales of its groups, and what a sum of code * row begins with: -offset * sum(row). */
#define ROW_SCALES(row, n) ((const float *)((row) + (n)))
#define ROW_STARTS(row, n, group) ((const int32_t *)(ROW_SCALES(row, n) + (n) / (group)))

/* Vectors `column` and on of a strip's four. */
INLINE void tile_codes_body(const int format, const int rows, const int vectors, int column, const unsigned char *const *x, int n,
                            int first, int last, const unsigned char *w, float *out, const char *next, size_t next_step)
{
    const int group = FORMATS[format].group, two = FORMATS[format].bits == 4, lines = group / (two ? 8 : 4);
    for (int g = first; g < last; g++) {
        const uint16_t *scales = (const uint16_t *)w + column * LANES;
        VI acc[TILE_ROWS][COLUMNS / LANES];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) acc[r][j] = v_ints(ROW_STARTS(x[r], n, group)[g]);
        w += 2 * COLUMNS;
        for (int line = 0; line < lines; line++, w += 4 * COLUMNS, next += next_step) {
            VI bytes[COLUMNS / LANES];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) {
                bytes[j] = v_bytes(w + (column + j) * 4 * LANES);
                __builtin_prefetch(next + (column + j) * 4 * LANES, 0, 2);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 1 + two; half++) {
                VI codes[COLUMNS / LANES];
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) {
                    codes[j] = !two ? bytes[j] : half ? v_high(bytes[j]) : v_low(bytes[j]);
                    if (format == MXFP4) codes[j] = v_e2m1(codes[j]);
                }
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const VI values = v_bytes_all(x[r] + g * group + 4 * ((1 + two) * line + half));
#pragma GCC unroll 4
                    for (int j = 0; j < vectors; j++) acc[r][j] = v_dot4(acc[r][j], codes[j], values);
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
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

#if SMALL_TILES
#define CODES_ROWS 3
#define CODES_VECTORS 1
#else
#define CODES_ROWS TILE_ROWS
#define CODES_VECTORS (COLUMNS / LANES)
#endif

static void tile_codes(int format, int rows, const unsigned char *const *x, int n, int first, int last, const unsigned char *w,
                       float *out, const char *next, size_t next_step)
{
    for (int r = 0; r < rows; r += CODES_ROWS)
        for (int j = 0; j < COLUMNS / LANES; j += CODES_VECTORS)
            switch (format << 3 | (rows - r < CODES_ROWS ? rows - r : CODES_ROWS)) {
#define CASE(F, R)                                                                                                      \
    case F << 3 | R:                                                                                                    \
        if (R <= CODES_ROWS)                                                                                            \
            tile_codes_body(F, R, CODES_VECTORS, j, x + r, n, first, last, w, out + r * COLUMNS, next, next_step); \
        break;
#define CASES(F) CASE(F, 1) CASE(F, 2) CASE(F, 3) CASE(F, 4) CASE(F, 5) CASE(F, 6)
                CASES(INT8) CASES(INT4) CASES(MXFP4)
            }
}

/* Columns first .. first + n, a whole number of groups or the rest of the row, of a row of `width`. */
static void quantise(int format, const uint16_t *x, int n, int first, int width, unsigned char *row)
{
    const int group = FORMATS[format].group;
    for (int i = 0; i < n || (first + i) % COLUMNS; i += group) {
        uint16_t part[64] = {0}, highest = 0;
        memcpy(part, x + i, 2 * (size_t)(n - i < 0 ? 0 : n - i < group ? n - i : group));
        for (int k = 0; k < group; k++) highest = (part[k] & 0x7fff) > highest ? part[k] & 0x7fff : highest; /* NaN is highest */
        const uint32_t bits = (uint32_t)highest << 16;
        float most;
        memcpy(&most, &bits, 4);
        signed char *codes = (signed char *)row + first + i;
        const V inverse = v_all(most > 1e-30f && most < __builtin_inff() ? 127.f / most : 0.f);
        for (int k = 0; k < group; k += LANES) v_store_bytes(codes + k, v_mul(v_widen(part + k), inverse));
        int sum = 0;
        for (int k = 0; k < group; k++) sum += codes[k];
        const int g = (first + i) / group;
        ((float *)ROW_SCALES(row, width))[g] = most / 127.f;
        ((int32_t *)ROW_STARTS(row, width, group))[g] = -FORMATS[format].offset * sum;
    }
}
