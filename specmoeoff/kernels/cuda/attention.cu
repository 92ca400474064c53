// Verification attention over paged keys and values, laid out as kernels/cpu/attention.h has them:
// k [page][kv head][dim / 2][64][2], v [page][kv head][32][dim][2].
//
// One warp takes 16 folded rows (token, query head of the group) of one KV head of one request over one range of positions. The
// layout gives every lane whole fragments in 16-byte loads, and the scores' fragment is the probabilities': no shared memory, no
// barrier. Ranges and blocks lie at fixed positions, a block without a visible key leaves a row untouched, and `merge` adds what
// the ranges found in their order: a row's bits depend on its own visible keys alone.
#include "common.cuh"

namespace {

constexpr int ROWS = 16, BLOCK = 32, RANGE_TOKENS = 512;

struct Mask {
    int first, window, n_sinks;  // drafts begin at `first`; window 0: none; the first n_sinks positions are seen beyond the window
    __device__ bool sees(int row_position, int position) const
    {
        return position <= row_position && (!window || position > row_position - window || position < n_sinks);
    }
    __device__ bool may_see(int lowest, int highest, int block) const  // any of a block, from rows lowest .. highest
    {
        return block <= highest && (!window || block + BLOCK > lowest - window + 1 || block < n_sinks);
    }
};

// paths (M, max_depth), in a tree of drafts: the slots, counted from `first`, of a row's ancestors and itself by depth; NULL: a
// chain. In a tree a tile holds the heads of a single token, so that each can see its own path at the positions it would have in
// a chain. Partial (range, M, n_heads): reference, sum, dim outputs.
// Grid (row tiles, n_kv_heads * ranges, n_requests); each of a block's warps takes a tile.
template <int DIM>
__device__ void attend(const u16 *query, const u16 *pages, const int *row_start, const int *first_position,
                       const int *page_table, const int *paths, const int *depths, int max_depth, int max_pages, int n_heads,
                       int n_kv_heads, int window, int n_sinks, float *partials)
{
    constexpr int K_STEPS = DIM / 16, GROUPS = (DIM + 31) / 32;  // groups of 32 output columns, the last may be half full
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, request = blockIdx.z;
    const int kv_head = blockIdx.y % n_kv_heads, range = blockIdx.y / n_kv_heads, group = n_heads / n_kv_heads;
    const int tile = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, row0 = row_start[request];
    const int n_rows = (row_start[request + 1] - row0) * group, tiles_a_token = (group + ROWS - 1) / ROWS;
    const int begin_row = paths ? tile / tiles_a_token * group + tile % tiles_a_token * ROWS : tile * ROWS;
    const int end_row = paths ? min(begin_row + ROWS, (tile / tiles_a_token + 1) * group) : min(begin_row + ROWS, n_rows);
    if (begin_row >= n_rows) return;
    const Mask mask = {first_position[request], window, n_sinks};
    const int *table = page_table + (size_t)request * max_pages;
    const int *path = paths ? paths + (size_t)(row0 + begin_row / group) * max_depth : nullptr;

    int position[2];
    size_t out[2];  // (token, head) of this lane's rows
    uint4 queries[K_STEPS];
    const unsigned *words[2];
    for (int i = 0; i < 2; i++) {
        const int row = min(begin_row + g + 8 * i, end_row - 1), token = row0 + row / group;
        position[i] = mask.first + (paths ? depths[token] : row / group);
        out[i] = (size_t)token * n_heads + kv_head * group + row % group;
        words[i] = (const unsigned *)(query + out[i] * DIM);
    }
#pragma unroll
    for (int s = 0; s < K_STEPS; s++)
        queries[s] = make_uint4(words[0][s * 8 + q], words[1][s * 8 + q], words[0][s * 8 + 4 + q], words[1][s * 8 + 4 + q]);

    const int lowest = mask.first + (paths ? depths[row0 + begin_row / group] : begin_row / group);
    const int highest = mask.first + (paths ? depths[row0 + begin_row / group] : (end_row - 1) / group);
    float reference[2] = {LOWEST, LOWEST}, sums[2] = {0.f, 0.f}, outputs[GROUPS][4][4];
#pragma unroll
    for (int d = 0; d < GROUPS; d++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) outputs[d][j][i] = 0.f;

    for (int block = range * RANGE_TOKENS; block < (range + 1) * RANGE_TOKENS && block <= highest; block += BLOCK) {
        if (!mask.may_see(lowest, highest, block)) continue;
        const u16 *in_page = pages + head_at(table[block / PAGE_TOKENS], kv_head, n_kv_heads, DIM);
        const bool gather = paths && block + BLOCK > mask.first;
        // Scores of tokens 8q .. 8q+7: column c of tile j is token 4c + j.
        float scores[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[j][i] = 0.f;
        const unsigned *keys = (const unsigned *)(in_page + key_at(block % PAGE_TOKENS + 4 * g, 0, DIM));
#define SLOT(at) ((at) < mask.first || (at) > highest ? min(at, highest) : mask.first + path[(at) - mask.first])
#define PAGE_OF(slot) (pages + head_at(table[(slot) / PAGE_TOKENS], kv_head, n_kv_heads, DIM))
#pragma unroll
        for (int s = 0; s < K_STEPS; s++) {
            unsigned b[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int pair = s * 8 + half * 4 + q;
                if (!gather) {
                    const uint4 four = *(const uint4 *)(keys + pair * STRIP);
                    b[half][0] = four.x, b[half][1] = four.y, b[half][2] = four.z, b[half][3] = four.w;
                } else {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int slot = SLOT(block + 4 * g + j);
                        b[half][j] = *(const unsigned *)(PAGE_OF(slot) + key_at(slot % PAGE_TOKENS, 2 * pair, DIM));
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) mma(scores[j], queries[s], b[0][j], b[1][j]);
        }
        float scale[2];
        bool touched[2];
        unsigned pairs[2][4];  // probabilities of tokens 8q + 2p, 8q + 2p + 1
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float mine[8], most = LOWEST;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                mine[c] = mask.sees(position[i], block + 8 * q + c) ? scores[c % 4][i * 2 + c / 4] : MINUS_INFINITY;
                most = fmaxf(most, mine[c]);
            }
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            touched[i] = most > LOWEST;
            const float higher = fmaxf(reference[i], most);
            scale[i] = expf(reference[i] - higher);
            reference[i] = higher;
            float sum = 0.f;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                mine[c] = expf(mine[c] - higher);
                sum += mine[c];
            }
            if (touched[i]) sums[i] = fmaf(sums[i], scale[i], sum);
#pragma unroll
            for (int p = 0; p < 4; p++) pairs[i][p] = bf16_pair(mine[2 * p], mine[2 * p + 1]);
        }
        // What lies past the last visible token may be anything, and 0 times NaN is NaN.
        const int left = highest - (block + 8 * q) + 1;
#pragma unroll
        for (int d = 0; d < GROUPS; d++) {
            const int column = 32 * d + 4 * g;
            unsigned v[4][4];  // token pair, column
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const int at = block + 8 * q + 2 * p, known = left - 2 * p;
                uint4 four = make_uint4(0, 0, 0, 0);
                if (known > 0 && column < DIM) {
                    if (!gather) {
                        four = *(const uint4 *)(in_page + value_at(at % PAGE_TOKENS, 32 * d, DIM) + 8 * g);
                    } else {
                        unsigned both[4] = {0, 0, 0, 0};
#pragma unroll
                        for (int side = 0; side < 2; side++) {
                            const int slot = SLOT(at + side);
                            const u16 *value = PAGE_OF(slot) + value_at(slot % PAGE_TOKENS, 32 * d, DIM) + 8 * g;
#pragma unroll
                            for (int j = 0; j < 4; j++) both[j] |= (unsigned)value[2 * j] << 16 * side;
                        }
                        four = make_uint4(both[0], both[1], both[2], both[3]);
                    }
                }
                const unsigned keep = known > 1 ? ALL : 0xffffu;
                v[p][0] = four.x & keep, v[p][1] = four.y & keep, v[p][2] = four.z & keep, v[p][3] = four.w & keep;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float found[4] = {0.f, 0.f, 0.f, 0.f};
                mma(found, make_uint4(pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]), v[0][j], v[1][j]);
                mma(found, make_uint4(pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]), v[2][j], v[3][j]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (touched[i / 2]) outputs[d][j][i] = fmaf(outputs[d][j][i], scale[i / 2], found[i]);
            }
        }
    }
    const size_t stride = (size_t)row_start[gridDim.z] * n_heads;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(ALL, sums[i], 1);
        sums[i] += __shfl_xor_sync(ALL, sums[i], 2);
        if (begin_row + g + 8 * i >= end_row) continue;
        float *record = partials + (range * stride + out[i]) * (DIM + 2);
        if (q == 0) {
            record[0] = reference[i];
            record[1] = sums[i];
        }
#pragma unroll
        for (int d = 0; d < GROUPS; d++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int column = 32 * d + 8 * q + 4 * c + j;
                    if (column < DIM) record[2 + column] = outputs[d][j][i * 2 + c];
                }
    }
}

}  // namespace

#define FOR_DIM(n)                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(4 * WARP, 1)                                                                      \
        attend_##n(const u16 *query, const u16 *pages, const int *row_start, const int *first_position,      \
                   const int *page_table, const int *paths, const int *depths, int max_depth, int max_pages, int n_heads,          \
                   int n_kv_heads, int window, int n_sinks, float *partials)                                                       \
    {                                                                                                                              \
        attend<n>(query, pages, row_start, first_position, page_table, paths, depths, max_depth, max_pages, n_heads,    \
                  n_kv_heads, window, n_sinks, partials);                                                                          \
    }

FOR_DIM(64)
FOR_DIM(80)
FOR_DIM(96)
FOR_DIM(112)
FOR_DIM(128)
FOR_DIM(192)
FOR_DIM(256)

// One warp a (row, head): what the ranges found, in their order, and the head's learned sink (sink_logits (n_heads); NULL: none)
// -> result (M, n_heads, dim) bf16. ends (M): a row sees positions below.
extern "C" __global__ void merge(const float *partials, const int *ends, const float *sink_logits, int n_rows, int n_heads, int dim, u16 *result)
{
    const int lane = threadIdx.x % WARP, task = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (task >= n_rows * n_heads) return;
    const size_t stride = (size_t)n_rows * n_heads * (dim + 2);
    const float *records = partials + (size_t)task * (dim + 2);
    const int n_ranges = (ends[task / n_heads] + RANGE_TOKENS - 1) / RANGE_TOKENS;
    float reference = LOWEST, sum = 0.f, outputs[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};  // dim <= 256
    for (int range = 0; range < n_ranges; range++) {
        const float *record = records + range * stride;
        if (record[0] == LOWEST) continue;  // nothing of it was in the window
        const float higher = fmaxf(reference, record[0]), mine = expf(reference - higher), its = expf(record[0] - higher);
        reference = higher;
        sum = fmaf(sum, mine, record[1] * its);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane + i * WARP < dim) outputs[i] = fmaf(outputs[i], mine, record[2 + lane + i * WARP] * its);
    }
    if (sink_logits) {
        const float sink = sink_logits[task % n_heads], higher = fmaxf(reference, sink), mine = expf(reference - higher);
        sum = fmaf(sum, mine, expf(sink - higher));
#pragma unroll
        for (int i = 0; i < 8; i++) outputs[i] *= mine;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (lane + i * WARP < dim) result[(size_t)task * dim + lane + i * WARP] = to_bf16(outputs[i] / sum);
}
