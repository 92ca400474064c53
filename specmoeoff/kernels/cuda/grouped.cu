// Rows gathered by expert times packed weights: the expert feed-forward, and as a single group every dense projection.
//
// Weights are the tensor cores' A operand, packed so that a lane's 16 bytes are its fragment (see `pack_linear`): a warp streams
// them from global memory to registers. Rows are the B operand, through a ring of chunks in shared memory, swizzled as wgmma
// reads them. One output element is one chain of mma, or of wgmma where there is one, over the summed dimension in its order,
// whichever column of whichever tile it falls into: the tile trades rows for bandwidth, and changes no bit.
#include "common.cuh"

namespace {

constexpr int WARPS = 4, GROUP = WARPS * WARP, FEATURES = 16, DEPTH = 64, STEPS = DEPTH / 16, PIECES = DEPTH / 8, ROW_BYTES = DEPTH * 2;
constexpr int STAGES = 4;   // chunks of the ring
constexpr int MANY = 128;   // rows of tiles that wait for the tensor cores rather than for memory

struct Rows {
    const int *slots;  // NULL: rows as they come
    int first, last, divisor;
    __device__ int slot(int i) const  // what is past the end repeats the last and is not stored
    {
        const int at = first + i < last ? first + i : last - 1;
        return slots ? slots[at] : at;
    }
    __device__ int operator()(int i) const { return slot(i) / divisor; }
};

// What a block of GROUPS * 4 warps has of the rows: a thread copies the same 16-byte piece of some of them in every chunk.
template <int GROUPS, int ROWS> struct Ring {
    static constexpr int STEP = GROUPS * GROUP / PIECES, EACH = (ROWS + STEP - 1) / STEP, BYTES = ROWS * ROW_BYTES;
    const uint4 *x;
    unsigned from[EACH], to;
    int chunks;
    __device__ Ring(const u16 *x, int depth, const Rows &rows) : x((const uint4 *)x), chunks(depth / DEPTH)
    {
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        to = row * ROW_BYTES + (piece ^ row % 8) * 16;
#pragma unroll
        for (int i = 0; i < EACH; i++) from[i] = (unsigned)rows(row + i * STEP) * (unsigned)(depth / 8) + piece;
    }
    __device__ unsigned char *stage(int chunk) const { return (unsigned char *)shared_memory + chunk % STAGES * BYTES; }
    __device__ void copy(int chunk) const
    {
        if (chunk < chunks && (ROWS >= STEP || threadIdx.x < ROWS * PIECES)) {
#pragma unroll
            for (int i = 0; i < EACH; i++) copy_async(stage(chunk) + to + i * STEP * ROW_BYTES, x + from[i] + chunk * PIECES);
        }
        commit_copies();
    }
};

template <int MATRICES> struct Weights {
    const uint4 *of[MATRICES];  // this warp's 16 features of each, from this lane's word on
    int chunks;
    __device__ void load(uint4 (&to)[MATRICES][STEPS], int chunk) const
    {
        const int at = chunk < chunks ? chunk : chunks - 1;
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int s = 0; s < STEPS; s++) to[m][s] = load_once(of[m] + (at * STEPS + s) * WARP);
    }
    __device__ void fetch(int) const {}
    __device__ void end() const {}
};

#ifdef CLUSTERS
// The same for the two blocks of a cluster, which have the same features of adjacent rows: from the GPU's second-level cache each
// word comes once for both. A warp of block m fetches its matrix m, into both blocks' rings; the two warps of a number wait for
// each other, and for nobody else.
struct SharedWeights {
    static constexpr int SLOTS = 4, PIECE = STEPS * WARP, BYTES = SLOTS * 2 * PIECE * 16, BARRIERS = SLOTS * 16;
    const uint4 *mine, *ring;
    unsigned filled, emptied;
    int chunks;
    __device__ SharedWeights(const Weights<2> &weights, int rows, int warps) : chunks(weights.chunks)
    {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, block = blockIdx.x % 2;
        const unsigned char *const rings = (const unsigned char *)shared_memory + STAGES * rows * ROW_BYTES;
        mine = weights.of[block] - lane;
        ring = (const uint4 *)(rings + warp * BYTES) + lane;
        filled = shared_address(rings + warps * BYTES + warp * BARRIERS), emptied = filled + SLOTS * 8;
        if (lane == 0) {
            for (int slot = 0; slot < SLOTS; slot++) begin_barrier(filled + slot * 8, 1), begin_barrier(emptied + slot * 8, 2);
            fence_barriers();
        }
        meet_cluster();
        for (int chunk = 0; chunk < SLOTS - 1; chunk++) fetch_slot(chunk);
    }
    // The one after those that are there or on their way, in the place of the one before `chunk`.
    __device__ void fetch(int chunk) const { fetch_slot(chunk + SLOTS - 1); }
    __device__ void fetch_slot(int chunk) const
    {
        const int slot = chunk % SLOTS, block = blockIdx.x % 2;
        if (threadIdx.x % WARP == 0 && chunk < chunks) {
            if (chunk >= SLOTS) wait_barrier(emptied + slot * 8, chunk / SLOTS - 1 & 1);
            expect_bytes(filled + slot * 8, 2 * PIECE * 16);
            copy_to_both(shared_address(ring + (slot * 2 + block) * PIECE), mine + chunk * PIECE, PIECE * 16, filled + slot * 8);
        }
        __syncwarp();
    }
    __device__ void load(uint4 (&to)[2][STEPS], int chunk) const
    {
        const int slot = chunk % SLOTS;
        if (chunk < chunks) wait_barrier(filled + slot * 8, chunk / SLOTS & 1);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int s = 0; s < STEPS; s++) to[m][s] = ring[(slot * 2 + m) * PIECE + s * WARP];
        __syncwarp();
        if (threadIdx.x % WARP == 0 && chunk < chunks) arrive_at_both(emptied + slot * 8);
        __syncwarp();
    }
    // Nobody leaves while the other may still write to its memory.
    __device__ void end() const { meet_cluster(); }
};
#endif

#ifdef WGMMA
// Of 128-byte rows, whose 16-byte pieces are exchanged by the row's number in 8; eight rows after 1024 bytes.
__device__ inline unsigned long long b_descriptor(const void *rows)
{
    return (unsigned long long)(shared_address(rows) >> 4) | 1ull << 16 | (unsigned long long)(8 * ROW_BYTES >> 4) << 32 | 1ull << 62;
}
#endif

// One chunk's: with wgmma, on their way.
template <int MATRICES, int TILES>
__device__ void products(float (&sums)[MATRICES][TILES][4], const uint4 (&a)[MATRICES][STEPS], const unsigned char *rows)
{
#ifdef WGMMA
    const unsigned long long b = b_descriptor(rows);
    fence_products();
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int m = 0; m < MATRICES; m++) wgmma(sums[m], a[m][s], b + s * 2);  // 16 inputs are 32 bytes
    commit_products();
#else
    const int lane = threadIdx.x % WARP, row = lane % 8;
#pragma unroll
    for (int s = 0; s < STEPS; s += 2)
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint4 b = load_matrices(rows + (t * 8 + row) * ROW_BYTES + ((s * 2 + lane / 8) ^ row) * 16);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                mma(sums[m][t], a[m][s], b.x, b.y);
                mma(sums[m][t], a[m][s + 1], b.z, b.w);
            }
        }
#endif
}

// Until those of all chunks but the youngest PENDING are there.
template <int PENDING> __device__ inline void wait_for_products()
{
#ifdef WGMMA
    wait_products<PENDING>();
#endif
}

// `a` has this chunk's weights; `other` had the one's before, gets the one's after.
template <int GROUPS, int MATRICES, int ROWS, class Source>
__device__ inline void chunk_of(int chunk, float (&sums)[MATRICES][ROWS / 8][4], uint4 (&a)[MATRICES][STEPS], uint4 (&other)[MATRICES][STEPS],
                                const Source &weights, const Ring<GROUPS, ROWS> &ring)
{
    constexpr bool OVERLAP = ROWS >= MANY;  // this chunk's products begin before the last one's are done
    wait_copies<STAGES - 3>();
#ifdef WGMMA
    fence_copies();
#endif
    if (!OVERLAP) weights.load(other, chunk + 1);
    __syncthreads();  // the chunk is there, and nobody reads the one before the last any more
    if (!OVERLAP) ring.copy(chunk + STAGES - 2);
    products(sums, a, ring.stage(chunk));
    if (OVERLAP) ring.copy(chunk + STAGES - 2);
    weights.fetch(chunk);
    wait_for_products<OVERLAP>();
    if (OVERLAP) weights.load(other, chunk + 1);
}

template <int GROUPS, int MATRICES, int ROWS, class Source>
__device__ void multiply(float (&sums)[MATRICES][ROWS / 8][4], const Source &weights, const u16 *x, const Rows &rows)
{
    const int chunks = weights.chunks;
    const Ring<GROUPS, ROWS> ring(x, chunks * DEPTH, rows);
    uint4 even[MATRICES][STEPS], odd[MATRICES][STEPS];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int t = 0; t < ROWS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][t][i] = 0.f;

    weights.load(even, 0);
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 2; chunk++) ring.copy(chunk);
    for (int chunk = 0; chunk < chunks; chunk += 2) {
        chunk_of<GROUPS, MATRICES, ROWS>(chunk, sums, even, odd, weights, ring);
        if (chunk + 1 == chunks) break;
        chunk_of<GROUPS, MATRICES, ROWS>(chunk + 1, sums, odd, even, weights, ring);
    }
    wait_for_products<0>();
#ifdef WGMMA
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int t = 0; t < ROWS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) pin(sums[m][t][i]);
#endif
    weights.end();
}

// With BLOCKS of rows that share their weights where blocks can.
template <int GROUPS, int MATRICES, int ROWS, int BLOCKS>
__device__ void multiply_in(float (&sums)[MATRICES][ROWS / 8][4], const Weights<MATRICES> &weights, const u16 *x, const Rows &rows)
{
#ifdef CLUSTERS
    if constexpr (BLOCKS == 2) {
        multiply<GROUPS, MATRICES, ROWS>(sums, SharedWeights(weights, ROWS, GROUPS * WARPS), x, rows);
        return;
    }
#endif
    multiply<GROUPS, MATRICES, ROWS>(sums, weights, x, rows);
}

// Of this lane's columns: all before any is stored, for the compiler cannot know that they stay.
template <int TILES> __device__ void slots_of(int (&to)[TILES][2], const Rows &rows)
{
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) to[t][i] = rows.slot(t * 8 + threadIdx.x % 4 * 2 + i);
}

__device__ inline float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Grid (row tiles of the largest group, a multiple of BLOCKS, ceil(features / those of a block), groups). A group without weights (NULL) is left to
// others. A warp has 16 of every 64 features of a block; one that would be past the end does the last ones', for the barriers.
template <int GROUPS, int ROWS, int BLOCKS>
__device__ void gate_up(const u16 *x, const uint4 *const *experts, const int *start, const int *slots, int hidden, int intermediate, int n_active, u16 *out)
{
    const int expert = blockIdx.z, lane = threadIdx.x % WARP, tile = blockIdx.y * GROUPS * WARPS + threadIdx.x / WARP;
    const Rows rows = {slots, start[expert] + (int)blockIdx.x * ROWS, start[expert + 1], n_active};
    if (rows.first - (int)blockIdx.x % BLOCKS * ROWS >= rows.last || !experts[expert]) return;
    const int n_tiles = intermediate / FEATURES, mine = tile < n_tiles ? tile : n_tiles - 1;
    const size_t tile_size = (size_t)hidden * FEATURES / 8;
    const Weights<2> weights = {{experts[expert] + mine * tile_size + lane, experts[expert] + (n_tiles + mine) * tile_size + lane}, hidden / DEPTH};
    float sums[2][ROWS / 8][4];
    multiply_in<GROUPS, 2, ROWS, BLOCKS>(sums, weights, x, rows);
    if (tile >= n_tiles) return;
    const int feature = tile * FEATURES + lane / 4 * 2;
    int to[ROWS / 8][2];
    slots_of(to, rows);
#pragma unroll
    for (int t = 0; t < ROWS / 8; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (rows.first + t * 8 + lane % 4 * 2 + i >= rows.last) continue;
            *(unsigned *)(out + (size_t)to[t][i] * intermediate + feature) =
                bf16_pair(silu(sums[0][t][i]) * sums[1][t][i], silu(sums[0][t][i + 2]) * sums[1][t][i + 2]);
        }
}

// offset: uint4 words before the matrix in each group's weights. A slot is both the row read and the row written.
template <int GROUPS, int MATRICES, int ROWS, int BLOCKS>
__device__ void linear(const u16 *x, const uint4 *const *weights_of, long long offset, const int *start, const int *slots, int depth, int features, float *out)
{
    const int group = blockIdx.z, lane = threadIdx.x % WARP;
    const int tile = (blockIdx.y * GROUPS + threadIdx.x / GROUP) * MATRICES * WARPS + threadIdx.x / WARP % WARPS;
    const Rows rows = {slots, start[group] + (int)blockIdx.x * ROWS, start[group + 1], 1};
    if (rows.first - (int)blockIdx.x % BLOCKS * ROWS >= rows.last || !weights_of[group]) return;
    const int n_tiles = (features + FEATURES - 1) / FEATURES;
    Weights<MATRICES> weights;
    weights.chunks = depth / DEPTH;
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        const int mine = tile + m * WARPS < n_tiles ? tile + m * WARPS : n_tiles - 1;
        weights.of[m] = weights_of[group] + offset + mine * ((size_t)depth * FEATURES / 8) + lane;
    }
    float sums[MATRICES][ROWS / 8][4];
    multiply_in<GROUPS, MATRICES, ROWS, BLOCKS>(sums, weights, x, rows);
    const int column = tile * FEATURES + lane / 4 * 2;
    const bool even = features % 2 == 0;
    int to[ROWS / 8][2];
    slots_of(to, rows);
#pragma unroll
    for (int t = 0; t < ROWS / 8; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (rows.first + t * 8 + lane % 4 * 2 + i >= rows.last) continue;
            float *const row = out + (size_t)to[t][i] * features;
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                const int feature = column + m * WARPS * FEATURES;
                if (even && feature < features) {
                    *(float2 *)(row + feature) = make_float2(sums[m][t][i], sums[m][t][i + 2]);
                } else {
                    if (feature < features) row[feature] = sums[m][t][i];
                    if (feature + 1 < features) row[feature + 1] = sums[m][t][i + 2];
                }
            }
        }
}

}  // namespace

// name_FxR: a block takes F features (64 to a group of four warps, or 64 of each of its matrices) and R rows, a pair of blocks
// that shares weights half of R each.
#ifdef CLUSTERS
#define PAIR __cluster_dims__(2, 1, 1)
#else
#define PAIR
#endif
#define ALONE
#define GATE_UP(tile, cluster, groups, rows, blocks)                                                                              \
    extern "C" __global__ void cluster __launch_bounds__(groups * GROUP, 1)                                                       \
        gate_up_##tile(const u16 *x, const uint4 *const *experts, const int *start, const int *slots, int hidden,                 \
                       int intermediate, int n_active, u16 *out)                                                                  \
    {                                                                                                                             \
        gate_up<groups, rows, blocks>(x, experts, start, slots, hidden, intermediate, n_active, out);                             \
    }
#define LINEAR(tile, cluster, groups, matrices, rows, blocks)                                                                     \
    extern "C" __global__ void cluster __launch_bounds__(groups * GROUP, 1)                                                       \
        linear_##tile(const u16 *x, const uint4 *const *weights, long long offset, const int *start, const int *slots, int depth, \
                      int n_out, float *out)                                                                                      \
    {                                                                                                                             \
        linear<groups, matrices, rows, blocks>(x, weights, offset, start, slots, depth, n_out, out);                              \
    }

GATE_UP(64x8, ALONE, 1, 8, 1)
GATE_UP(64x16, ALONE, 1, 16, 1)
GATE_UP(64x32, ALONE, 1, 32, 1)
GATE_UP(64x64, ALONE, 1, 64, 1)
GATE_UP(128x128, ALONE, 2, 128, 1)
GATE_UP(128x256, PAIR, 2, 128, 2)
LINEAR(64x8, ALONE, 1, 1, 8, 1)
LINEAR(64x16, ALONE, 1, 1, 16, 1)
LINEAR(64x32, ALONE, 1, 1, 32, 1)
LINEAR(64x64, ALONE, 1, 1, 64, 1)
LINEAR(128x128, ALONE, 2, 1, 128, 1)
LINEAR(256x128, ALONE, 2, 2, 128, 1)
LINEAR(256x256, PAIR, 2, 2, 128, 2)

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
