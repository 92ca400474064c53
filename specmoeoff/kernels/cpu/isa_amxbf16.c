/* AMX: bf16 by tiles of 16 rows (Sapphire Rapids and newer); all else as AVX-512 does it.
 *
 * A tile instruction takes 16 steps of a strip. They are counted from the first one, and the last of them filled up with zeros:
 * an element's chain is the same for any number of rows.
 */
#include "avx512.h"
#include "amx.h"
#include "isa_body.h"
#include "codes_body.h"

enum { STEPS = 16, STEP_BYTES = 4 * COLUMNS };

/* Tiles 0 to 3 are the sums of 16 columns each, 4 the rows, 5 and 6 the strip. */
#define EACH_VECTOR(DO)                                      \
    do {                                                     \
        DO(0, 5);                                            \
        if (vectors > 1) DO(1, 6);                           \
        if (vectors > 2) DO(2, 5);                           \
        if (vectors > 3) DO(3, 6);                           \
    } while (0)
#define BEGIN(J, W) _tile_zero(J)
#define LOAD(J, W) _tile_loadd(J, sums + (J) * LANES, sums_stride)
#define MULTIPLY(J, W) do { _tile_loadd(W, strip + 64 * (J), strip_stride); _tile_dpbf16ps(J, 4, W); } while (0)
#define STORE(J, W) _tile_stored(J, sums + (J) * LANES, sums_stride)

static void tile_amx(int rows, const void *const *x, const part_t *part, int vectors, int accumulate, float *out, size_t out_stride)
{
    float some[AMX_ROWS * COLUMNS] __attribute__((aligned(64)));
    unsigned char values[AMX_ROWS * 64] __attribute__((aligned(64))), last[STEPS * STEP_BYTES] __attribute__((aligned(64)));
    const size_t width = sizeof(float) * LANES * (size_t)vectors;
    float *sums = rows == AMX_ROWS ? out : some;
    const size_t sums_stride = sizeof(float) * (rows == AMX_ROWS ? out_stride : COLUMNS);
    amx_configure();
    memset(values, 0, sizeof values);
    if (!accumulate) {
        EACH_VECTOR(BEGIN);
    } else {
        if (sums == some) memset(some, 0, sizeof some);
        for (int r = 0; r < rows && sums == some; r++) memcpy(some + r * COLUMNS, out + (size_t)r * out_stride, width);
        EACH_VECTOR(LOAD);
    }
    for (int first = 0; first < part->steps; first += STEPS) {
        const int steps = part->steps - first < STEPS ? part->steps - first : STEPS;
        const unsigned char *strip = part->w + (size_t)first * part->w_stride;
        size_t strip_stride = part->w_stride;
        if (steps < STEPS) {
            memset(values, 0, sizeof values);
            memset(last, 0, sizeof last);
            for (int p = 0; p < steps; p++) memcpy(last + p * STEP_BYTES, strip + (size_t)p * strip_stride, 64 * (size_t)vectors);
            strip = last;
            strip_stride = STEP_BYTES;
        }
        for (int r = 0; r < rows; r++) memcpy(values + r * 64, (const unsigned char *)x[r] + 4 * first, 4 * (size_t)steps);
        for (int p = 0; p < steps; p++)
            for (int j = 0; j < vectors; j++) {
                PREFETCH(part->fetch + (size_t)(first + p) * part->fetch_step + 64 * j);
                PREFETCH(part->again + (size_t)(first + p) * part->fetch_step + 64 * j);
            }
        _tile_loadd(4, values, 64);
        EACH_VECTOR(MULTIPLY);
    }
    EACH_VECTOR(STORE);
    for (int r = 0; r < rows && sums == some; r++) memcpy(out + (size_t)r * out_stride, some + r * COLUMNS, width);
}

static int supported(void) { return has_avx512bf16() && smo_has_amx_bf16(); }

const isa_t isa_amxbf16 = ISA("amxbf16", AMX_ROWS, tile_amx, , to_bf16, 1, isa_amxbf16_f32);
const isa_t isa_amxbf16_f32 = ISA("amxbf16", TILE_ROWS, tile_bf16, _f32, to_f32, 2, isa_amxbf16_f32);
