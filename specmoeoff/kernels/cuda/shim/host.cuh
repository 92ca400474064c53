// The CUDA names the kernels use, on a CPU: every thread a fiber, one block after another.
//
// A fiber runs until it must wait: for its warp (shuffles, ballots, mma) or its block. Warps run as far as they can, one after
// the other, forwards, backwards or in random order: what a missing barrier lets happen does happen. Shared memory is NaN at first.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct float2 { float x, y; } __attribute__((aligned(8)));
inline float2 make_float2(float x, float y) { return {x, y}; }
struct dim3 { unsigned x, y, z; };
inline dim3 blockIdx, blockDim, gridDim;

struct Copy { void *to; const void *from; };
struct Product { float *d; const uint4 *a; unsigned long long b; int tiles; };
struct Warp { unsigned char words[2][32][32]; long arrived = 0; };
struct Thread {
    ucontext_t context;
    jmp_buf saved;
    std::unique_ptr<char[]> stack;
    dim3 index;
    int lane;
    Warp *warp;
    long collectives = 0, barriers = 0;
    bool started = false, done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    std::vector<Product> open_products;
    std::deque<std::vector<Product>> committed_products;
};
inline Thread *current;
inline jmp_buf scheduler;
inline long barriers_passed, barrier_arrivals;
inline int skip_barrier = -1, skip_waits, at_once, clock_ns;
#define threadIdx (current->index)

constexpr size_t SHARED_BYTES = 99 << 10;
extern uint4 __align__(1024) shared_memory[];

// To the scheduler; it comes back once the fiber may go on.
inline void pause()
{
    if (!_setjmp(current->saved)) _longjmp(scheduler, 1);
}

inline void barrier(int site)
{
    if (site == skip_barrier) return;
    barrier_arrivals++;
    current->barriers++;
    pause();
}
constexpr int FIRST_SITE = __COUNTER__ + 1;
#define __syncthreads() barrier(__COUNTER__ - FIRST_SITE)

// Every lane's value, once all 32 have come.
template <class T> inline const T *collective(const T &mine)
{
    static_assert(sizeof(T) <= 32);
    Warp &warp = *current->warp;
    const long turn = current->collectives++ % 2;
    // Packed as an array of T at the buffer's beginning.
    memcpy(warp.words[turn][0] + current->lane * sizeof(T), &mine, sizeof(T));
    warp.arrived++;
    pause();
    return (const T *)warp.words[turn][0];
}
template <class T> inline T __shfl_xor_sync(unsigned, T x, int step) { const int from = current->lane ^ step; return collective(x)[from]; }
template <class T> inline T __shfl_sync(unsigned, T x, int from) { return collective(x)[from]; }
template <class T> inline T __shfl_up_sync(unsigned, T x, int by) { const int lane = current->lane; return collective(x)[lane < by ? lane : lane - by]; }
inline unsigned __ballot_sync(unsigned, bool x)
{
    const bool *of = collective(x);
    unsigned found = 0;
    for (int lane = 0; lane < 32; lane++) found |= (unsigned)of[lane] << lane;
    return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned x; memcpy(&x, &f, 4); return x; }

struct Body { void (*call)(void **); void **arguments; };
inline Body body;
inline void run_fiber()
{
    body.call(body.arguments);
    current->done = true;
    _longjmp(scheduler, 1);
}

inline bool may_run(const Thread &t)
{
    return !t.done && (!t.started || (t.warp->arrived >= t.collectives * 32 && barriers_passed >= t.barriers));
}

inline void step(Thread &t)
{
    current = &t;
    if (_setjmp(scheduler)) return;
    if (t.started) _longjmp(t.saved, 1);
    t.started = true;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = 64 << 10;
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_fiber, 0);
    setcontext(&t.context);
}

// 0; 1: threads wait for what never comes; 2: written beyond the shared memory asked for.
inline int run_block(dim3 block, size_t shared_bytes, int order, std::mt19937 &random, std::vector<std::unique_ptr<char[]>> &stacks)
{
    const int n = block.x * block.y * block.z, n_warps = (n + 31) / 32;
    std::vector<Warp> warps(n_warps);
    std::vector<Thread> threads(n);
    for (int i = 0; i < n; i++) {
        threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        threads[i].lane = i % 32;
        threads[i].warp = &warps[i / 32];
        threads[i].stack = std::move(stacks[i]);
    }
    memset(shared_memory, 0xff, SHARED_BYTES);
    barriers_passed = barrier_arrivals = 0;
    std::vector<int> warp_order(n_warps), lanes(32);
    int result = 0;
    for (bool all_done = false; !all_done;) {
        for (int i = 0; i < n_warps; i++) warp_order[i] = order == 1 ? n_warps - 1 - i : i;
        for (int i = 0; i < 32; i++) lanes[i] = order == 1 ? 31 - i : i;
        if (order > 1) {
            std::shuffle(warp_order.begin(), warp_order.end(), random);
            std::shuffle(lanes.begin(), lanes.end(), random);
        }
        bool any = false;
        for (int w : warp_order)
            for (bool progress = true; progress;) {
                progress = false;
                for (int lane : lanes)
                    if (w * 32 + lane < n && may_run(threads[w * 32 + lane])) {
                        step(threads[w * 32 + lane]);
                        any = progress = true;
                    }
            }
        int live = 0;
        for (const Thread &t : threads) live += !t.done;
        all_done = !live;
        if (live && barrier_arrivals == live) {
            barrier_arrivals = 0;
            barriers_passed++;
        } else if (live && !any) {
            result = 1;
            break;
        }
    }
    for (size_t i = shared_bytes; i < SHARED_BYTES; i++)
        if (((unsigned char *)shared_memory)[i] != 0xff) result = 2;
    for (int i = 0; i < n; i++) stacks[i] = std::move(threads[i].stack);
    return result;
}

template <class... A, size_t... I> void call_with(void (*kernel)(A...), void **arguments, std::index_sequence<I...>)
{
    kernel(*(A *)arguments[I]...);
}
template <class... A> void call(void (*kernel)(A...), void **arguments) { call_with(kernel, arguments, std::index_sequence_for<A...>()); }
template <class... A> constexpr int n_arguments(void (*)(A...)) { return sizeof...(A); }

struct Kernel { const char *name; void (*call)(void **); int n_arguments; };

inline int run_grid(const Kernel &kernel, const int *grid, const int *block, int shared_bytes, void **arguments, int order)
{
    std::mt19937 random(order);
    at_once = order % 2;
    body = {kernel.call, arguments};
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)block[0], (unsigned)block[1], (unsigned)block[2]};
    std::vector<std::unique_ptr<char[]>> stacks(block[0] * block[1] * block[2]);
    for (auto &stack : stacks) stack = std::make_unique<char[]>(64 << 10);
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                if (const int failed = run_block(blockDim, shared_bytes, order, random, stacks)) return failed;
            }
    return 0;
}
