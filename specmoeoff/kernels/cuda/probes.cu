// What a GPU can do at most, and something to keep it waiting.
#include "common.cuh"

// Eight independent chains a thread.
extern "C" __global__ void fma_peak(float *out, float m, int rounds)
{
    float a[8];
    for (int j = 0; j < 8; j++) a[j] = threadIdx.x + j;
    for (int i = 0; i < rounds; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = fmaf(a[j], m, 1e-3f);
    float sum = 0;
    for (int j = 0; j < 8; j++) sum += a[j];
    if (sum == -1) *out = sum;  // never so, which the compiler does not know
}

// Of n 16-byte words.
extern "C" __global__ void copy(const uint4 *from, uint4 *to, long long n)
{
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) to[i] = from[i];
}

// Holds its stream until the host writes to the flag, for at most most_ns: what is enqueued behind it then starts at once.
extern "C" __global__ void block_stream(const volatile int *flag, unsigned long long most_ns)
{
    const unsigned long long begin = nanoseconds();
    while (!*flag && nanoseconds() - begin < most_ns) {}
}
