/* What the machine can do at best: arithmetic peaks, and moving bytes. Each probe picks the widest form this CPU has,
 * whatever instruction set the kernels use. */
#define _GNU_SOURCE
#include <omp.h>
#include <string.h>
#include <time.h>

#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx.h"
#endif

/* Works `rounds` times; a memory probe over its own n bytes, n a multiple of 3072. */
typedef void run_t(unsigned char *mine, size_t n, int64_t rounds);
typedef struct {
    const char *name;
    int (*supported)(void);
    double operations; /* of one round and thread; 0: of a memory probe, whose bytes count */
    run_t *run;
} probe_t;

enum { PATTERN = 0x3e }; /* floats of 0.18: not zeros, which some memory systems carry for less */

static int always(void) { return 1; }

#define REPEAT_6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define REPEAT_12(X) REPEAT_6(X) X(6) X(7) X(8) X(9) X(10) X(11)
#define REPEAT_20(X) REPEAT_12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19)

/* Independent chains, enough to cover latency times ports. Named variables, not an array: an array whose elements go through
 * asm is kept in memory. */
#define CHAINS(NAME, TARGET, REPEAT, KEEP, TYPE, START, OPERATION)                \
    __attribute__((target(TARGET))) static void NAME(unsigned char *mine, size_t n, int64_t rounds) \
    {                                                                             \
        (void)mine, (void)n;                                                      \
        TYPE a = START;                                                           \
        __asm__ volatile("" : KEEP(a));                                           \
        REPEAT(CHAIN)                                                             \
        for (int64_t i = 0; i < rounds; i++) { REPEAT(OPERATION) }                \
    }
#define KEEP_WIDE "+v"
#define KEEP_SSE "+x"
#define CHAIN(i) __typeof__(a) c##i = a;

/* Moves over arrays; V, its alignment and its non-temporal store given. Copies go from one half to the other, a triad reads two
 * thirds and writes one. Bytes count as the program moves them: a write that first fetches its line counts once. */
#define MOVES(SUFFIX, TARGET, V, STREAM, KEEP)                                                                     \
    __attribute__((target(TARGET))) static void read_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)       \
    {                                                                                                              \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n; i += 8 * sizeof(V))                                                          \
                _Pragma("GCC unroll 8") for (size_t j = 0; j < 8; j++)                                             \
                {                                                                                                  \
                    V v = *(const V *)(mine + i + j * sizeof(V));                                                  \
                    __asm__ volatile("" ::KEEP(v));                                                                \
                }                                                                                                  \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void read_ahead_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds) \
    {                                                                                                              \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n; i += 512) {                                                                  \
                _Pragma("GCC unroll 8") for (size_t j = 0; j < 512; j += 64) __builtin_prefetch(mine + i + 4096 + j, 0, 2); \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V))                               \
                {                                                                                                  \
                    V v = *(const V *)(mine + i + j);                                                              \
                    __asm__ volatile("" ::KEEP(v));                                                                \
                }                                                                                                  \
            }                                                                                                      \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void store_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)      \
    {                                                                                                              \
        V v;                                                                                                       \
        memset(&v, PATTERN, sizeof v);                                                                             \
        __asm__ volatile("" : "+" KEEP(v));                                                                        \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n; i += 512)                                                                    \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V))                               \
                {                                                                                                  \
                    *(V *)(mine + i + j) = v;                                                                      \
                    __asm__ volatile("" ::: "memory");                                                             \
                }                                                                                                  \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void nt_store_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)   \
    {                                                                                                              \
        V v;                                                                                                       \
        memset(&v, PATTERN, sizeof v);                                                                             \
        __asm__ volatile("" : "+" KEEP(v));                                                                        \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n; i += 512)                                                                    \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V)) STREAM(mine + i + j, v);      \
        FENCE();                                                                                                   \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void copy_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)       \
    {                                                                                                              \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n / 2; i += 512)                                                                \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V))                               \
                {                                                                                                  \
                    *(V *)(mine + n / 2 + i + j) = *(const V *)(mine + i + j);                                     \
                    __asm__ volatile("" ::: "memory");                                                             \
                }                                                                                                  \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void nt_copy_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)    \
    {                                                                                                              \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < n / 2; i += 512) {                                                              \
                _Pragma("GCC unroll 8") for (size_t j = 0; j < 512; j += 64) __builtin_prefetch(mine + i + 4096 + j, 0, 2); \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V))                               \
                    STREAM(mine + n / 2 + i + j, *(const V *)(mine + i + j));                                      \
            }                                                                                                      \
        FENCE();                                                                                                   \
    }                                                                                                              \
    __attribute__((target(TARGET))) static void triad_##SUFFIX(unsigned char *mine, size_t n, int64_t rounds)      \
    {                                                                                                              \
        const size_t third = n / 3;                                                                                \
        V scale;                                                                                                   \
        memset(&scale, PATTERN, sizeof scale);                                                                     \
        __asm__ volatile("" : "+" KEEP(scale));                                                                    \
        while (rounds--)                                                                                           \
            for (size_t i = 0; i < third; i += 512)                                                                \
                _Pragma("GCC unroll 16") for (size_t j = 0; j < 512; j += sizeof(V))                               \
                {                                                                                                  \
                    unsigned char *at = mine + i + j;                                                              \
                    *(V *)(at + 2 * third) = *(const V *)at + scale * *(const V *)(at + third);                    \
                    __asm__ volatile("" ::: "memory");                                                             \
                }                                                                                                  \
    }

#if defined(__x86_64__)

#define FENCE() _mm_sfence()
#define STREAM_512(p, v) _mm512_stream_ps((float *)(p), v)
#define STREAM_256(p, v) _mm256_stream_ps((float *)(p), v)
#define STREAM_128(p, v) _mm_stream_ps((float *)(p), v)
MOVES(512, "avx512f", __m512, STREAM_512, "v")
MOVES(256, "avx2", __m256, STREAM_256, "x")
MOVES(128, "sse2", __m128, STREAM_128, "x")

#define FMA_512(i) c##i = _mm512_fmadd_ps(c##i, a, a); __asm__ volatile("" : "+v"(c##i));
#define FMA_256(i) c##i = _mm256_fmadd_ps(c##i, a, a); __asm__ volatile("" : "+x"(c##i));
#define HALF_512(i) c##i = _mm512_fmadd_ph(c##i, a, a); __asm__ volatile("" : "+v"(c##i));
#define BF16_512(i) c##i = _mm512_dpbf16_ps(c##i, (__m512bh)a, (__m512bh)a); __asm__ volatile("" : "+v"(c##i));
#define INT8_512(i) c##i = _mm512_dpbusd_epi32(c##i, a, a); __asm__ volatile("" : "+v"(c##i));
#define INT8_256(i) c##i = _mm256_dpbusd_avx_epi32(c##i, a, a); __asm__ volatile("" : "+x"(c##i));
CHAINS(fp32_512, "avx512f", REPEAT_20, KEEP_WIDE, __m512, _mm512_set1_ps(.5f), FMA_512)
CHAINS(fp32_256, "avx2,fma", REPEAT_12, KEEP_SSE, __m256, _mm256_set1_ps(.5f), FMA_256)
CHAINS(fp16_512, "avx512f,avx512bw,avx512vl,avx512fp16", REPEAT_20, KEEP_WIDE, __m512h, _mm512_set1_ph((_Float16).5f), HALF_512)
CHAINS(bf16_512, "avx512f,avx512bf16", REPEAT_20, KEEP_WIDE, __m512, _mm512_set1_ps(1e-3f), BF16_512)
CHAINS(int8_512, "avx512f,avx512vnni", REPEAT_20, KEEP_WIDE, __m512i, _mm512_set1_epi32(0x01010101), INT8_512)
CHAINS(int8_256, "avx2,avxvnni", REPEAT_12, KEEP_SSE, __m256i, _mm256_set1_epi32(0x01010101), INT8_256)

/* A chain of multiplications of three cycles each, on every x86 of the last fifteen years; additions can be folded away. */
static void cycles(unsigned char *mine, size_t n, int64_t rounds)
{
    (void)mine, (void)n;
    uint64_t x = 1;
    for (int64_t i = 0; i < rounds; i++) __asm__ volatile(".rept 100\n\timul %0, %0\n\t.endr" : "+r"(x));
}

static int leaf7(int sub, int reg, int bit)
{
    unsigned r[4];
    return __get_cpuid_count(7, (unsigned)sub, r, r + 1, r + 2, r + 3) && (r[reg] >> bit & 1);
}
static int has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
static int has_fma(void) { return has_avx2() && __builtin_cpu_supports("fma"); }
static int has_bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
static int has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static int has_avx_vnni(void) { return has_avx2() && leaf7(1, 0, 4); }
static int has_fp16(void) { return has_avx512() && leaf7(0, 3, 23); }

/* The kernel hands out the tiles' state on request, once a process. */
static int has_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return leaf7(0, 3, 24) && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
int smo_has_amx_bf16(void) { return leaf7(0, 3, 22) && has_tiles(); }
static int has_amx_int8(void) { return leaf7(0, 3, 25) && has_tiles(); }

/* Four tiles accumulate, four hold zeros; all of 16 rows of 64 bytes. */
#define TILES(NAME, TARGET, DOT)                                                                                   \
    __attribute__((target(TARGET))) static void NAME(unsigned char *mine, size_t n, int64_t rounds)                \
    {                                                                                                              \
        (void)mine, (void)n;                                                                                       \
        amx_configure();                                                                                           \
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                                                \
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);                                                \
        for (int64_t i = 0; i < rounds; i++) { DOT(0, 4, 6); DOT(1, 4, 7); DOT(2, 5, 6); DOT(3, 5, 7); }           \
        _tile_release();                                                                                           \
        smo_tiles_configured = 0;                                                                                  \
    }
TILES(amx_bf16, "amx-tile,amx-bf16", _tile_dpbf16ps)
TILES(amx_int8, "amx-tile,amx-int8", _tile_dpbssd)

#define EVERY_MOVE(SUFFIX, HAS)                                                                                    \
    {"read", HAS, 0, read_##SUFFIX}, {"read_ahead", HAS, 0, read_ahead_##SUFFIX}, {"store", HAS, 0, store_##SUFFIX}, \
        {"nt_store", HAS, 0, nt_store_##SUFFIX}, {"copy", HAS, 0, copy_##SUFFIX}, {"nt_copy", HAS, 0, nt_copy_##SUFFIX}, \
        {"triad", HAS, 0, triad_##SUFFIX}

/* Of one name the first that is supported counts. */
static const probe_t PROBES[] = {
    {"fp32_fma", has_avx512, 20 * 32, fp32_512},
    {"fp32_fma", has_fma, 12 * 16, fp32_256},
    {"fp16_fma", has_fp16, 20 * 64, fp16_512},
    {"bf16_dot", has_bf16, 20 * 64, bf16_512},
    {"int8_dot", has_vnni, 20 * 128, int8_512},
    {"int8_dot", has_avx_vnni, 12 * 64, int8_256},
    {"bf16_amx", smo_has_amx_bf16, 4 * 16384, amx_bf16},
    {"int8_amx", has_amx_int8, 4 * 32768, amx_int8},
    {"cycles", always, 300, cycles},
    EVERY_MOVE(512, has_avx512),
    EVERY_MOVE(256, has_avx2),
    EVERY_MOVE(128, always),
};

#else

typedef float wide_t __attribute__((vector_size(16)));
static void read_plain(unsigned char *mine, size_t n, int64_t rounds)
{
    while (rounds--)
        for (size_t i = 0; i < n; i += sizeof(wide_t)) {
            wide_t v = *(const wide_t *)(mine + i);
            __asm__ volatile("" ::"m"(v));
        }
}
static void store_plain(unsigned char *mine, size_t n, int64_t rounds)
{
    while (rounds--) {
        memset(mine, PATTERN, n);
        __asm__ volatile("" ::: "memory");
    }
}
static void copy_plain(unsigned char *mine, size_t n, int64_t rounds)
{
    while (rounds--) {
        memcpy(mine + n / 2, mine, n / 2);
        __asm__ volatile("" ::: "memory");
    }
}
static const probe_t PROBES[] = {
    {"read", always, 0, read_plain},
    {"read_ahead", always, 0, read_plain},
    {"store", always, 0, store_plain},
    {"copy", always, 0, copy_plain},
};

#endif

int smo_probe_count(void) { return (int)(sizeof PROBES / sizeof *PROBES); }
const char *smo_probe_name(int i) { return PROBES[i].name; }
int smo_probe_supported(int i) { return PROBES[i].supported(); }
double smo_probe_operations(int i) { return PROBES[i].operations; }

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Every thread works on its own `share` bytes. found: seconds from the first start to the last end, and the least share of its
 * own time that a thread was on a CPU. */
void smo_probe(int probe, int threads, unsigned char *buffer, size_t share, int64_t rounds, double *found)
{
    double first = 1e300, last = 0, on_cpu = 1;
    EACH_THREAD(
        threads, unsigned char *mine = buffer ? buffer + share * (size_t)omp_get_thread_num() : 0;
        _Pragma("omp barrier") const double cpu = seconds(CLOCK_THREAD_CPUTIME_ID), begin = seconds(CLOCK_MONOTONIC_RAW);
        PROBES[probe].run(mine, share, rounds);
        const double end = seconds(CLOCK_MONOTONIC_RAW), used = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
        _Pragma("omp critical")
        {
            if (begin < first) first = begin;
            if (end > last) last = end;
            if (used / (end - begin) < on_cpu) on_cpu = used / (end - begin);
        });
    found[0] = last - first;
    found[1] = on_cpu;
}

/* Follows `steps` links of a cycle of indices from `at`; returns where it ends, so that nothing can be left out. */
int64_t smo_probe_chase(const int64_t *next, int64_t at, int64_t steps)
{
    for (int64_t i = 0; i < steps; i++) at = next[at];
    return at;
}
