// From residual rows to queries, and keys and values in their pages.
#include "common.cuh"

// One block a row: x = embedding of its token.
extern "C" __global__ void embed(const int *tokens, const u16 *embedding, int hidden, float *x)
{
    const u16 *from = embedding + (size_t)tokens[blockIdx.x] * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) x[(size_t)blockIdx.x * hidden + i] = from_bf16(from[i]);
}

// One warp a row: out = bf16(x * rsqrt(mean(x^2) + eps) * weight), or bf16(x) where weight is NULL, of x's rows at `rows` (NULL: all).
extern "C" __global__ void rmsnorm(const float *x, const int *rows, const float *weight, float eps, int n_rows, int hidden, u16 *out)
{
    const int lane = threadIdx.x % WARP, row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= n_rows) return;
    const float *mine = x + (size_t)(rows ? rows[row] : row) * hidden;
    float squares = 0.f;
    for (int i = lane; i < hidden; i += WARP) squares = fmaf(mine[i], mine[i], squares);
    const float scale = 1.f / sqrtf(warp_sum(squares) / hidden + eps);
    for (int i = lane; i < hidden; i += WARP) out[(size_t)row * hidden + i] = to_bf16(weight ? mine[i] * scale * weight[i] : mine[i]);
}

// One warp a (row, head). qkv (M, n_heads + 2 n_kv_heads, dim) -> query (M, n_heads, dim) bf16, normed (unless its weight is
// NULL), rotated and scaled; keys, likewise unscaled, and values to their pages. request_of, slot_of, position_of (M): a row's
// request, its place in the request's pages, and the position it is rotated by (other than the place in a tree of drafts). Keys and
// values whose pages are not here go to away (2, M, n_kv_heads, dim) as they are; NULL: all pages are here.
extern "C" __global__ void norm_rope_append(const float *qkv, const float *q_norm, const float *k_norm, float eps, const float *cosines,
                                            const float *sines, const int *request_of, const int *slot_of, const int *position_of,
                                            const int *page_table, int max_pages, int n_rows, int n_heads, int n_kv_heads, int dim,
                                            u16 *query, u16 *pages, float *away)
{
    const int lane = threadIdx.x % WARP, heads = n_heads + 2 * n_kv_heads, half = dim / 2;
    const int task = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, row = task / heads, head = task % heads;
    if (row >= n_rows) return;
    const float *x = qkv + (size_t)task * dim;
    const int slot = slot_of[row] % PAGE_TOKENS, kv_head = (head - n_heads) % n_kv_heads;
    const int page = away ? 0 : page_table[(size_t)request_of[row] * max_pages + slot_of[row] / PAGE_TOKENS];
    u16 *const head_pages = pages + head_at(page, kv_head, n_kv_heads, dim);
    float *const mine_away = away + ((size_t)(row + (head >= n_heads + n_kv_heads ? n_rows : 0)) * n_kv_heads + kv_head) * dim;
    if (head >= n_heads + n_kv_heads && away) {
        for (int i = lane; i < dim; i += WARP) mine_away[i] = x[i];
        return;
    }
    if (head >= n_heads + n_kv_heads) {
        const bool last = row + 1 == n_rows || request_of[row + 1] != request_of[row];
        for (int i = lane; i < dim; i += WARP) {
            head_pages[value_at(slot, i, dim)] = to_bf16(x[i]);
            // The CPU's kernel reads pairs: the other half may hold anything, and probability 0 times NaN is NaN.
            if (last && slot % 2 == 0) head_pages[value_at(slot + 1, i, dim)] = 0;
        }
        return;
    }
    const float *norm = head < n_heads ? q_norm : k_norm;
    const float *c = cosines + (size_t)position_of[row] * half, *s = sines + (size_t)position_of[row] * half;
    float scale = 1.f;
    if (norm) {
        float squares = 0.f;
        for (int i = lane; i < dim; i += WARP) squares = fmaf(x[i], x[i], squares);
        scale = 1.f / sqrtf(warp_sum(squares) / dim + eps);
    }
    const float query_scale = 1.f / sqrtf((float)dim);
    for (int i = lane; i < half; i += WARP) {
        const float low = norm ? x[i] * scale * norm[i] : x[i], high = norm ? x[i + half] * scale * norm[i + half] : x[i + half];
        const float rotated[2] = {low * c[i] - high * s[i], high * c[i] + low * s[i]};
        for (int side = 0; side < 2; side++) {
            const int at = i + side * half;
            if (head < n_heads)
                query[((size_t)row * n_heads + head) * dim + at] = to_bf16(rotated[side] * query_scale);
            else if (away)
                mine_away[at] = rotated[side];
            else
                head_pages[key_at(slot, at, dim)] = to_bf16(rotated[side]);
        }
    }
}
