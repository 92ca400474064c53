/* 16 lanes in one register: what isa_body.h and codes_body.h are made of. Included by the isa_*.c of AVX-512. */
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

typedef __m512 V;
typedef __m512i PAIRS;
#define SMALL_TILES 0
#define v_zero() _mm512_setzero_ps()
#define v_all(x) _mm512_set1_ps(x)
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, v) _mm512_storeu_ps(p, v)
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_div(a, b) _mm512_div_ps(a, b)
#define v_max(a, b) _mm512_max_ps(a, b)
#define v_min(a, b) _mm512_min_ps(a, b)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_round(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_scale(a, n) _mm512_scalef_ps(a, n)
#define v_sum(a) _mm512_reduce_add_ps(a)
#define v_highest(a) _mm512_reduce_max_ps(a)
#define v_pairs(p) _mm512_loadu_si512(p)
#define v_dot(acc, a, b) _mm512_dpbf16_ps(acc, (__m512bh)(b), (__m512bh)(a))
#define v_store_bf16_two(p, v, w) _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(w, v))
#define v_store_bf16(p, v) _mm256_storeu_si256((__m256i *)(p), (__m256i)_mm512_cvtneps_pbh(v))

static inline __m512i v_pair_all(const uint16_t *p)
{
    int pair;
    memcpy(&pair, p, sizeof pair); /* p may lie between two ints */
    return _mm512_set1_epi32(pair);
}

#define v_load_fp16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define v_store_fp16(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define v_load_int8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))))
/* v where `mask` has a bit, else `fill`. */
#define v_keep(v, mask, fill) _mm512_mask_blend_ps((__mmask16)(mask), _mm512_set1_ps(fill), v)

#define v_any_above(a, b) (_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0)

typedef __m512i VI;
static inline __m512i v_ints(int x)
{
    __m512i v = _mm512_set1_epi32(x);
    __asm__ volatile("" : "+v"(v)); /* else sums that begin alike are one, and copied in every step */
    return v;
}
/* Once for all rows, and in each half of a line anew: registers are for the sums. */
static inline __m512i v_bytes(const unsigned char *p)
{
    __m512i v;
    __asm__ volatile("vmovdqu64 %1, %0" : "=v"(v) : "m"(*(const __m512i_u *)p));
    return v;
}
#define v_bytes_all(p) v_pair_all((const uint16_t *)(p))
#define v_low(c) _mm512_and_si512(c, _mm512_set1_epi8(15))
#define v_high(c) v_low(_mm512_srli_epi16(c, 4))
/* Not the intrinsic: GCC 12 copies the sum before each and runs out of registers. */
static inline __m512i v_dot4(__m512i acc, __m512i codes, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
}
#define v_float(a) _mm512_cvtepi32_ps(a)
#define v_widen(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define v_store_bytes(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)))
/* 12 + 2 x of the sixteen numbers of e2m1 */
static inline __m512i v_e2m1(__m512i c)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), c);
}

static inline int has_avx512bf16(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
