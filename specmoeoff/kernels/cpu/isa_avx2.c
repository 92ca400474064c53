/* AVX2 with FMA: bf16 is widened by a shift or a mask; the low element of a pair is added first. */
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

typedef struct {
    __m256 a, b;
} V;
typedef struct {
    __m256i a, b;
} PAIRS;
#define SMALL_TILES 1
#define EACH(call_a, call_b) ((V){call_a, call_b})
#define v_zero() EACH(_mm256_setzero_ps(), _mm256_setzero_ps())
#define v_all(x) v_all_(x)
static inline V v_all_(float x) { return EACH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline V v_load(const float *p) { return EACH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void v_store(float *p, V v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
#define BINARY(name, op) \
    static inline V name(V x, V y) { return EACH(op(x.a, y.a), op(x.b, y.b)); }
BINARY(v_add, _mm256_add_ps)
BINARY(v_sub, _mm256_sub_ps)
BINARY(v_mul, _mm256_mul_ps)
BINARY(v_div, _mm256_div_ps)
BINARY(v_max, _mm256_max_ps)
BINARY(v_min, _mm256_min_ps)
static inline V v_fma(V x, V y, V z) { return EACH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
static inline __m256 round_(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V v_round(V x) { return EACH(round_(x.a), round_(x.b)); }
static inline __m256 scale_(__m256 x, __m256 n)
{
    n = _mm256_max_ps(n, _mm256_set1_ps(-127.f)); /* and what is smaller becomes 0 */
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
static inline V v_scale(V x, V n) { return EACH(scale_(x.a, n.a), scale_(x.b, n.b)); }
static inline float v_sum(V x)
{
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
static inline float v_highest(V x)
{
    float lanes[8], highest;
    _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
    highest = lanes[0];
    for (int i = 1; i < 8; i++) highest = lanes[i] > highest ? lanes[i] : highest;
    return highest;
}
static inline PAIRS v_pairs(const uint16_t *p)
{
    return (PAIRS){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 16))};
}
static inline PAIRS v_pair_all(const uint16_t *p)
{
    int pair;
    memcpy(&pair, p, sizeof pair); /* p may lie between two ints */
    const __m256i all = _mm256_set1_epi32(pair);
    return (PAIRS){all, all};
}
static inline __m256 dot_(__m256 acc, __m256i x, __m256i y)
{
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    __m256 low_x = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), low_y = _mm256_castsi256_ps(_mm256_slli_epi32(y, 16));
    __m256 high_x = _mm256_castsi256_ps(_mm256_and_si256(x, upper)), high_y = _mm256_castsi256_ps(_mm256_and_si256(y, upper));
    return _mm256_fmadd_ps(high_x, high_y, _mm256_fmadd_ps(low_x, low_y, acc));
}
static inline V v_dot(V acc, PAIRS x, PAIRS y) { return EACH(dot_(acc.a, x.a, y.a), dot_(acc.b, x.b, y.b)); }
static inline __m128i narrow_(__m256 v)
{
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    return _mm256_castsi256_si128(packed);
}
static inline void v_store_bf16(uint16_t *p, V v)
{
    _mm_storeu_si128((__m128i *)p, narrow_(v.a));
    _mm_storeu_si128((__m128i *)(p + 8), narrow_(v.b));
}
static inline V v_load_fp16(const uint16_t *p)
{
    return EACH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
static inline void v_store_fp16(uint16_t *p, V v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m256 widen_int8_(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
static inline V v_load_int8(const int8_t *p) { return EACH(widen_int8_(p), widen_int8_(p + 8)); }
/* v where `mask` has a bit, else `fill`. */
static inline __m256 keep_(__m256 v, int mask, float fill)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bit), bit);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(set));
}
static inline V v_keep(V v, uint16_t mask, float fill) { return EACH(keep_(v.a, mask & 255, fill), keep_(v.b, mask >> 8, fill)); }

static inline int v_any_above(V x, V y)
{
    const __m256 above = _mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
    return _mm256_movemask_ps(above) != 0;
}

typedef struct {
    __m256i a, b;
} VI;
#define EACH_INT(call_a, call_b) ((VI){call_a, call_b})
static inline VI v_ints(int x) { return EACH_INT(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static inline VI v_bytes(const unsigned char *p)
{
    return EACH_INT(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32)));
}
static inline VI v_bytes_all(const unsigned char *p)
{
    int four;
    memcpy(&four, p, sizeof four);
    return v_ints(four);
}
static inline __m256i low_(__m256i c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
static inline VI v_low(VI c) { return EACH_INT(low_(c.a), low_(c.b)); }
static inline VI v_high(VI c) { return EACH_INT(low_(_mm256_srli_epi16(c.a, 4)), low_(_mm256_srli_epi16(c.b, 4))); }
/* 12 + 2 x of the sixteen numbers of e2m1 */
static inline __m256i e2m1_(__m256i c)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), c);
}
static inline VI v_e2m1(VI c) { return EACH_INT(e2m1_(c.a), e2m1_(c.b)); }
/* Bytes become 16 bits, even and odd ones apart: sums of pairs of bytes would saturate. */
static inline __m256i dot4_(__m256i acc, __m256i c, __m256i x)
{
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
static inline VI v_dot4(VI acc, VI c, VI x) { return EACH_INT(dot4_(acc.a, c.a, x.a), dot4_(acc.b, c.b, x.b)); }
static inline V v_float(VI a) { return EACH(_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)); }
static inline __m256 widen_(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline V v_widen(const uint16_t *p) { return EACH(widen_(p), widen_(p + 8)); }
static inline void v_store_bytes(signed char *p, V v)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xd8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words, words), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bytes));
}

#include "isa_body.h"
#include "codes_body.h"

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

const isa_t isa_avx2 = ISA("avx2", TILE_ROWS, tile_bf16, , to_bf16, 1, isa_avx2_f32);
const isa_t isa_avx2_f32 = ISA("avx2", TILE_ROWS, tile_bf16, _f32, to_f32, 2, isa_avx2_f32);
