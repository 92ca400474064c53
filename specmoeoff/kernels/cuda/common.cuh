// bf16 is carried in 16-bit words. Compiled with --fmad=false: multiply-adds are written out where they are wanted, for the
// compiler's own choice would differ between otherwise equal kernels.
#pragma once
#include <ptx.cuh>

typedef unsigned short u16;

constexpr int WARP = 32, PAGE_TOKENS = 128, STRIP = 64;
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOWEST = -1e30f;
#define MINUS_INFINITY __uint_as_float(0xff800000u)  // NVRTC brings no headers

// Where a page of the CPU's kernels has number `at` of a token's key (kernels/cpu/attention.h; both counted in bf16) of one KV
// head, and number `at` of its value.
__device__ inline size_t key_at(int slot, int at, int dim)
{
    return (size_t)(slot / STRIP) * dim * STRIP + (size_t)(at / 2) * 2 * STRIP + slot % STRIP * 2 + at % 2;
}

__device__ inline size_t value_at(int slot, int at, int dim)
{
    const int first = at / STRIP * STRIP, columns = dim - first < STRIP ? dim - first : STRIP;
    return (size_t)(dim + first) * PAGE_TOKENS + ((size_t)(slot / 2) * columns + (at - first)) * 2 + slot % 2;
}

__device__ inline size_t head_at(int page, int kv_head, int n_kv_heads, int dim)
{
    return ((size_t)page * n_kv_heads + kv_head) * 2 * dim * PAGE_TOKENS;
}

// The one shared array of a block, carved by the kernel; aligned as wgmma's swizzle wants it.
extern __shared__ uint4 __align__(1024) shared_memory[];

__device__ inline float from_bf16(u16 x) { return __uint_as_float((unsigned)x << 16); }

// NaN compares with nothing: lanes that look for the largest would not agree, and point out of arrays.
__device__ inline float or_lowest(float x) { return x == x ? x : MINUS_INFINITY; }

// To nearest, ties to even; NaN stays NaN.
__device__ inline u16 to_bf16(float x)
{
    const unsigned bits = __float_as_uint(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? (u16)(bits >> 16 | 0x40) : (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Over the lanes of a warp as a butterfly: the same tree whatever the rest of the grid does, the same bits in every lane.
template <class T> __device__ inline T warp_sum(T x)
{
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

template <class T> __device__ inline T warp_max(T x)
{
    for (int step = WARP / 2; step; step /= 2) {
        const T other = __shfl_xor_sync(ALL, x, step);
        x = other > x ? other : x;
    }
    return x;
}
