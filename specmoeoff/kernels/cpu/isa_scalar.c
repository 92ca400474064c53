/* Portable C: what every other instruction set is compared with, and what runs where there is none. */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef struct {
    float f[LANES];
} V;
typedef struct {
    uint16_t h[2 * LANES];
} PAIRS;
#define SMALL_TILES 1
#define EACH(expression)                                \
    V result;                                           \
    for (int i = 0; i < LANES; i++) result.f[i] = expression; \
    return result
static inline V v_all(float x) { EACH(x); }
static inline V v_zero(void) { return v_all(0.f); }
static inline V v_load(const float *p) { EACH(p[i]); }
static inline void v_store(float *p, V v) { memcpy(p, v.f, sizeof v.f); }
static inline V v_add(V x, V y) { EACH(x.f[i] + y.f[i]); }
static inline V v_sub(V x, V y) { EACH(x.f[i] - y.f[i]); }
static inline V v_mul(V x, V y) { EACH(x.f[i] * y.f[i]); }
static inline V v_div(V x, V y) { EACH(x.f[i] / y.f[i]); }
static inline V v_max(V x, V y) { EACH(x.f[i] > y.f[i] ? x.f[i] : y.f[i]); }
static inline V v_min(V x, V y) { EACH(x.f[i] < y.f[i] ? x.f[i] : y.f[i]); }
static inline V v_fma(V x, V y, V z) { EACH(x.f[i] * y.f[i] + z.f[i]); }
static inline V v_round(V x) { EACH(rintf(x.f[i])); }
static inline V v_scale(V x, V n) { EACH(ldexpf(x.f[i], n.f[i] > -200.f ? (int)n.f[i] : -200)); }
static inline float v_sum(V x)
{
    float sum = 0.f;
    for (int i = 0; i < LANES; i++) sum += x.f[i];
    return sum;
}
static inline float v_highest(V x)
{
    float highest = x.f[0];
    for (int i = 1; i < LANES; i++) highest = x.f[i] > highest ? x.f[i] : highest;
    return highest;
}
static inline float widen(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline PAIRS v_pairs(const uint16_t *p)
{
    PAIRS pairs;
    memcpy(pairs.h, p, sizeof pairs.h);
    return pairs;
}
static inline PAIRS v_pair_all(const uint16_t *p)
{
    PAIRS pairs;
    for (int i = 0; i < 2 * LANES; i++) pairs.h[i] = p[i & 1];
    return pairs;
}
static inline V v_dot(V acc, PAIRS x, PAIRS y)
{
    EACH((acc.f[i] + widen(x.h[2 * i]) * widen(y.h[2 * i])) + widen(x.h[2 * i + 1]) * widen(y.h[2 * i + 1]));
}
static inline void v_store_bf16(uint16_t *p, V v)
{
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        memcpy(&bits, v.f + i, 4);
        p[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
static inline V v_load_fp16(const uint16_t *p)
{
    _Float16 h[LANES];
    memcpy(h, p, sizeof h);
    EACH((float)h[i]);
}
static inline void v_store_fp16(uint16_t *p, V v)
{
    _Float16 h[LANES];
    for (int i = 0; i < LANES; i++) h[i] = (_Float16)v.f[i];
    memcpy(p, h, sizeof h);
}
static inline V v_load_int8(const int8_t *p) { EACH((float)p[i]); }
/* v where `mask` has a bit, else `fill`. */
static inline V v_keep(V v, uint16_t mask, float fill) { EACH(mask >> i & 1 ? v.f[i] : fill); }

static inline int v_any_above(V x, V y)
{
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= x.f[i] > y.f[i];
    return any;
}

typedef struct {
    int32_t i[LANES];
} VI;
#define EACH_INT(expression)                                    \
    VI result;                                                  \
    for (int i = 0; i < LANES; i++) result.i[i] = expression;   \
    return result
static inline VI v_ints(int32_t x) { EACH_INT(x); }
static inline VI v_bytes(const unsigned char *p)
{
    VI v;
    memcpy(v.i, p, sizeof v.i);
    return v;
}
static inline VI v_bytes_all(const unsigned char *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return v_ints(four);
}
static inline VI v_low(VI c) { EACH_INT(c.i[i] & 0x0f0f0f0f); }
static inline VI v_high(VI c) { EACH_INT((int32_t)((uint32_t)c.i[i] >> 4 & 0x0f0f0f0f)); }
static inline int byte_(int32_t four, int i) { return (int)((uint32_t)four >> (8 * i) & 255); }
/* 12 + 2 x of the sixteen numbers of e2m1 */
static inline int32_t e2m1_(int32_t c)
{
    static const unsigned char numbers[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    uint32_t four = 0;
    for (int i = 0; i < 4; i++) four |= (uint32_t)numbers[byte_(c, i)] << (8 * i);
    return (int32_t)four;
}
static inline VI v_e2m1(VI c) { EACH_INT(e2m1_(c.i[i])); }
static inline int32_t dot4_(int32_t acc, int32_t c, int32_t x)
{
    for (int i = 0; i < 4; i++) acc += byte_(c, i) * (signed char)byte_(x, i);
    return acc;
}
static inline VI v_dot4(VI acc, VI c, VI x) { EACH_INT(dot4_(acc.i[i], c.i[i], x.i[i])); }
static inline V v_float(VI a) { EACH((float)a.i[i]); }
static inline V v_widen(const uint16_t *p) { EACH(widen(p[i])); }
static inline void v_store_bytes(signed char *p, V v)
{
    for (int i = 0; i < LANES; i++) p[i] = v.f[i] == v.f[i] ? (signed char)rintf(v.f[i]) : -128; /* NaN as the others have it */
}

#include "isa_body.h"
#include "codes_body.h"

static int supported(void) { return 1; }

const isa_t isa_scalar = ISA("scalar", TILE_ROWS, tile_bf16, , to_bf16, 1, isa_scalar_f32);
const isa_t isa_scalar_f32 = ISA("scalar", TILE_ROWS, tile_bf16, _f32, to_f32, 2, isa_scalar_f32);
