/* AMX tile instructions in C, after Intel's manual (TDPBF16PS, TILELOADD, TILESTORED; all tiles of 16 rows of 64 bytes): included
 * before isa_amxbf16.c by the build with sanitizers, so that it is tested where no CPU has them. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static __thread unsigned char played_tiles[8][16][64];

static inline int played_amx(void) { return 1; }
#define smo_has_amx_bf16 played_amx

static inline float played_widen(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void played_load(int tile, const void *from, size_t stride)
{
    for (size_t r = 0; r < 16; r++) memcpy(played_tiles[tile][r], (const char *)from + r * stride, 64);
}

static inline void played_store(int tile, void *to, size_t stride)
{
    for (size_t r = 0; r < 16; r++) memcpy((char *)to + r * stride, played_tiles[tile][r], 64);
}

static inline void played_dot(int sums, int rows, int strip)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0.f, odd = 0.f, sum;
            for (int k = 0; k < 16; k++) {
                uint16_t x[2], w[2];
                memcpy(x, played_tiles[rows][m] + 4 * k, 4);
                memcpy(w, played_tiles[strip][k] + 4 * n, 4);
                even += played_widen(x[0]) * played_widen(w[0]);
                odd += played_widen(x[1]) * played_widen(w[1]);
            }
            memcpy(&sum, played_tiles[sums][m] + 4 * n, 4);
            sum += even + odd;
            memcpy(played_tiles[sums][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_zero(tile) memset(played_tiles[tile], 0, sizeof played_tiles[tile])
#define _tile_loadd(tile, from, stride) played_load(tile, from, stride)
#define _tile_stored(tile, to, stride) played_store(tile, to, stride)
#define _tile_dpbf16ps(sums, rows, strip) played_dot(sums, rows, strip)
