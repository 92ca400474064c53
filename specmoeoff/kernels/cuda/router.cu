// Which experts a row goes to, and which rows an expert gets.
#include "common.cuh"

// One warp a row. logits (M, stride), the first n_experts <= 1024 count -> index, weight (M, n_active); lowest index among equals.
// renormalise: weights are the softmax over the chosen, else over all.
extern "C" __global__ void route(const float *logits, int n_rows, int n_experts, int stride, int n_active, int renormalise, int *index, float *weight)
{
    const int lane = threadIdx.x % WARP, row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= n_rows) return;
    const float *mine = logits + (size_t)row * stride;
    unsigned taken = 0;
    float highest = 0.f, sum = 0.f;
    for (int rank = 0; rank < n_active; rank++) {
        float best = MINUS_INFINITY;
        int at = n_experts;
        for (int e = lane; e < n_experts; e += WARP) {
            const float value = or_lowest(mine[e]);
            if (!(taken >> e / WARP & 1) && (at == n_experts || value > best)) {
                best = value;
                at = e;
            }
        }
        for (int step = WARP / 2; step; step /= 2) {
            const float other = __shfl_xor_sync(ALL, best, step);
            const int other_at = __shfl_xor_sync(ALL, at, step);
            if (other_at < n_experts && (at == n_experts || other > best || (other == best && other_at < at))) {
                best = other;
                at = other_at;
            }
        }
        if (at % WARP == lane) taken |= 1u << at / WARP;
        if (rank == 0) highest = best;
        const float share = expf(best - highest);
        sum += share;
        if (lane == 0) {
            index[(size_t)row * n_active + rank] = at;
            weight[(size_t)row * n_active + rank] = share;
        }
    }
    if (!renormalise) {
        sum = 0.f;
        for (int e = lane; e < n_experts; e += WARP) sum += expf(mine[e] - highest);
        sum = warp_sum(sum);
    }
    if (lane == 0)
        for (int rank = 0; rank < n_active; rank++) weight[(size_t)row * n_active + rank] /= sum;
}

// One block of 256 an expert, no block waits for another. index (n_slots) -> start (n_experts + 1), and slots (n_slots): the
// places in index where each expert stands, ascending.
extern "C" __global__ void token_lists(const int *index, int n_slots, int *start, int *slots)
{
    int *count = (int *)shared_memory;  // of each warp
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int before = 0;
    for (int i = threadIdx.x; i < n_slots; i += blockDim.x) before += index[i] < expert;
    before = warp_sum(before);
    if (lane == 0) count[warp] = before;
    __syncthreads();
    int at = 0;
    for (int w = 0; w < warps; w++) at += count[w];
    if (threadIdx.x == 0) {
        start[expert] = at;
        if (expert == 0) start[gridDim.x] = n_slots;
    }
    for (int first = 0; first < n_slots; first += blockDim.x) {
        const int i = first + threadIdx.x;
        const unsigned found = __ballot_sync(ALL, i < n_slots && index[i] == expert);
        __syncthreads();
        if (lane == 0) count[warp] = __popc(found);
        __syncthreads();
        int mine = at;
        for (int w = 0; w < warps; w++) {
            mine += w < warp ? count[w] : 0;
            at += count[w];
        }
        if (found >> lane & 1) slots[mine + __popc(found & ((1u << lane) - 1))] = i;
    }
}
