// Rows gathered by expert times packed weights: the expert feed-forward, and as a single group every dense projection.
//
// Weights are the tensor cores' A operand, packed so that a lane's 16 bytes are its fragment (see `pack_linear`): a warp streams
// them from global memory to registers, each once for all the rows of a tile. Rows are the B operand, through shared memory. One
// output element is one chain of mma over the summed dimension in its order, whichever column of whichever tile it falls into:
// TILES (8 rows each) trades rows for bandwidth, and changes no bit.
#include "common.cuh"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP, FEATURES = 16, DEPTH = 64, STEPS = DEPTH / 16;
constexpr int STRIDE = DEPTH * 2 + 64;  // bytes of a staged row: 8 lanes' 16 bytes fall on different banks

struct Rows {
    const int *slots;  // NULL: rows as they come
    int first, last, divisor;
    __device__ int operator()(int i) const  // what is past the end repeats the last row and is not stored
    {
        const int at = first + i < last ? first + i : last - 1;
        return slots ? slots[at] / divisor : at;
    }
};

template <int TILES> __device__ void stage(unsigned char *buffer, const u16 *x, int depth, int chunk, const Rows &rows)
{
    for (int i = threadIdx.x; i < TILES * 8 * (DEPTH / 8); i += THREADS) {
        const int row = i / (DEPTH / 8), piece = i % (DEPTH / 8);
        copy_async(buffer + row * STRIDE + piece * 16, x + (size_t)rows(row) * depth + chunk * DEPTH + piece * 8);
    }
    commit_copies();
}

template <int MATRICES>
__device__ void fetch(uint4 (&to)[MATRICES][STEPS], const uint4 *const (&weights)[MATRICES], int chunk)
{
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int s = 0; s < STEPS; s++) to[m][s] = load_once(weights[m] + (chunk * STEPS + s) * WARP + threadIdx.x % WARP);
}

// weights: this warp's 16 features of every matrix.
template <int MATRICES, int TILES>
__device__ void multiply(float (&sums)[MATRICES][TILES][4], const uint4 *const (&weights)[MATRICES], const u16 *x, int depth, const Rows &rows)
{
    constexpr int BUFFER = TILES * 8 * STRIDE;
    unsigned char *staged = (unsigned char *)shared_memory;
    const int lane = threadIdx.x % WARP, chunks = depth / DEPTH;
    uint4 now[MATRICES][STEPS], next[MATRICES][STEPS];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][t][i] = 0.f;

    fetch(now, weights, 0);
    stage<TILES>(staged, x, depth, 0, rows);
    for (int chunk = 0; chunk < chunks; chunk++) {
        if (chunk + 1 < chunks) {
            fetch(next, weights, chunk + 1);
            stage<TILES>(staged + (chunk + 1) % 2 * BUFFER, x, depth, chunk + 1, rows);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < STEPS; s += 2)
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const unsigned char *row = staged + chunk % 2 * BUFFER + (t * 8 + lane / 4) * STRIDE;
                const uint4 b = *(const uint4 *)(row + s * 32 + lane % 4 * 16);
#pragma unroll
                for (int m = 0; m < MATRICES; m++) {
                    mma(sums[m][t], now[m][s], b.x, b.y);
                    mma(sums[m][t], now[m][s + 1], b.z, b.w);
                }
            }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int s = 0; s < STEPS; s++) now[m][s] = next[m][s];
    }
}

// Grid (row tiles of the largest group, ceil(features / 64), groups). A group without weights (NULL) is left to others.
template <int TILES>
__device__ void gate_up(const u16 *x, const uint4 *const *experts, const int *start, const int *slots, int hidden, int intermediate, int n_active, u16 *out)
{
    const int expert = blockIdx.z, tile = blockIdx.y * WARPS + threadIdx.x / WARP;
    const Rows rows = {slots, start[expert] + (int)blockIdx.x * TILES * 8, start[expert + 1], n_active};
    if (rows.first >= rows.last || !experts[expert]) return;
    const int n_tiles = intermediate / FEATURES, mine = tile < n_tiles ? tile : n_tiles - 1;  // idle warps keep the barriers
    const size_t tile_size = (size_t)hidden * FEATURES / 8;
    const uint4 *const weights[2] = {experts[expert] + mine * tile_size, experts[expert] + (n_tiles + mine) * tile_size};
    float sums[2][TILES][4];
    multiply(sums, weights, x, hidden, rows);
    if (tile >= n_tiles) return;
    const int lane = threadIdx.x % WARP, feature = tile * FEATURES + lane / 4 * 2;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = rows.first + t * 8 + lane % 4 * 2 + i;
            if (at >= rows.last) continue;
            const float g0 = sums[0][t][i], g1 = sums[0][t][i + 2];
            *(unsigned *)(out + (size_t)slots[at] * intermediate + feature) =
                bf16_pair(g0 / (1.f + expf(-g0)) * sums[1][t][i], g1 / (1.f + expf(-g1)) * sums[1][t][i + 2]);
        }
}

// offset: uint4 words before the matrix in each group's weights. A slot is both the row read and the row written.
template <int TILES>
__device__ void linear(const u16 *x, const uint4 *const *weights_of, long long offset, const int *start, const int *slots, int depth, int features, float *out)
{
    const int group = blockIdx.z, tile = blockIdx.y * WARPS + threadIdx.x / WARP;
    const Rows rows = {slots, start[group] + (int)blockIdx.x * TILES * 8, start[group + 1], 1};
    if (rows.first >= rows.last || !weights_of[group]) return;
    const int n_tiles = (features + FEATURES - 1) / FEATURES, mine = tile < n_tiles ? tile : n_tiles - 1;
    const uint4 *const weights[1] = {weights_of[group] + offset + mine * ((size_t)depth * FEATURES / 8)};
    float sums[1][TILES][4];
    multiply(sums, weights, x, depth, rows);
    const int lane = threadIdx.x % WARP, feature = tile * FEATURES + lane / 4 * 2;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = t * 8 + lane % 4 * 2 + i % 2;
            if (rows.first + at < rows.last && feature + i / 2 < features)
                out[(size_t)rows(at) * features + feature + i / 2] = sums[0][t][i];
        }
}

}  // namespace

#define FOR_TILES(n)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                         \
        gate_up_##n(const u16 *x, const uint4 *const *experts, const int *start, const int *slots, int hidden, int intermediate,  \
                    int n_active, u16 *out)                                                                                       \
    {                                                                                                                             \
        gate_up<n>(x, experts, start, slots, hidden, intermediate, n_active, out);                                                \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                         \
        linear_##n(const u16 *x, const uint4 *const *weights, long long offset, const int *start, const int *slots, int depth,    \
                   int features, float *out)                                                                                      \
    {                                                                                                                             \
        linear<n>(x, weights, offset, start, slots, depth, features, out);                                                        \
    }

FOR_TILES(1)
FOR_TILES(2)
FOR_TILES(4)
FOR_TILES(8)

// x (M, hidden) += sum over ranks, in order, of weight (M, n_active) * out (M * n_active, hidden); product rounded before the sum.
// Experts that `elsewhere` (n_experts; NULL: none) marks are left out: index (M, n_active) tells whose a slot is.
extern "C" __global__ void combine(float *x, const float *expert_out, const float *weight, const int *index, const int *elsewhere, int hidden,
                                   int n_active)
{
    const int row = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= hidden) return;
    float sum = x[(size_t)row * hidden + column];
    for (int rank = 0; rank < n_active; rank++) {
        const size_t slot = (size_t)row * n_active + rank;
        if (elsewhere && elsewhere[index[slot]]) continue;
        sum += weight[slot] * expert_out[slot * hidden + column];
    }
    x[(size_t)row * hidden + column] = sum;
}
