// What CUDA C++ has no name for. The tests put a host's version of this file first on the include path.
#pragma once

// d (16, 8) fp32 += a (16, 16) bf16 * b (16, 8) bf16; lane 4 g + q holds d[g][2q, 2q+1], d[g+8][2q, 2q+1], a[g][2q, 2q+1],
// a[g+8][2q, 2q+1], a[g][2q+8, 2q+9], a[g+8][2q+8, 2q+9], b[2q, 2q+1][g], b[2q+8, 2q+9][g].
__device__ inline void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory: there once a later wait says so.
__device__ inline void copy_async(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until this thread's copies are there, but for the youngest PENDING commits.
template <int PENDING> __device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Once and past the caches.
__device__ inline uint4 load_once(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ inline unsigned long long nanoseconds()
{
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
