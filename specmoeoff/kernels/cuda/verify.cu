// Which drafted tokens stand, and the token after them: Leviathan et al. 2023, algorithm 1, in float64.
//
// Draws are those of runtime/sampling.py's `uniforms`, where position is that of the token drawn for. They depend on nothing
// else, so neither on the batch nor on how many tokens were drafted.
#include "common.cuh"

namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
typedef unsigned long long u64;

// Philox4x64-10 (Salmon et al. 2011), its first two words (to accept by, to choose by) as uniforms in [0, 1) of 52 bits.
__device__ void draw(u64 seed, u64 position, double (&uniform)[2])
{
    u64 c[4] = {position + 1, 0, 0, 0}, k[2] = {seed, 0};  // NumPy counts up before it draws
    for (int round = 0; round < 10; round++) {
        const u64 a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const u64 high_a = __umul64hi(a, c[0]), low_a = a * c[0], high_b = __umul64hi(b, c[2]), low_b = b * c[2];
        c[0] = high_b ^ c[1] ^ k[0], c[1] = low_b, c[2] = high_a ^ c[3] ^ k[1], c[3] = low_a;
        k[0] += 0x9E3779B97F4A7C15ull, k[1] += 0xBB67AE8584CAA73Bull;
    }
    for (int i = 0; i < 2; i++) uniform[i] = (double)(c[i] >> 12) * 0x1p-52;
}

struct Softmax {
    const float *logits;
    double highest, sum, temperature;
    __device__ double operator()(int token) const { return exp((logits[token] - highest) / temperature) / sum; }
};

// Of every warp's value the sum, in their order.
__device__ double block_sum(double x)
{
    double *of = (double *)shared_memory;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < WARPS; w++) sum += of[w];
    return sum;
}

__device__ Softmax softmax(const float *logits, int vocab, double temperature, int *highest_at)
{
    float *of = (float *)shared_memory;
    int *at_of = (int *)(of + WARPS);
    float most = MINUS_INFINITY;
    int at = 0x7fffffff;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        const float value = or_lowest(logits[v]);
        if (at == 0x7fffffff || value > most) {
            most = value;
            at = v;
        }
    }
    for (int step = WARP / 2; step; step /= 2) {
        const float other = __shfl_xor_sync(ALL, most, step);
        const int other_at = __shfl_xor_sync(ALL, at, step);
        if (other > most || (other == most && other_at < at)) {
            most = other;
            at = other_at;
        }
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        of[threadIdx.x / WARP] = most;
        at_of[threadIdx.x / WARP] = at;
    }
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        if (of[w] > most || (of[w] == most && at_of[w] < at)) {
            most = of[w];
            at = at_of[w];
        }
    *highest_at = at;
    Softmax p = {logits, most, 1.0, temperature};
    if (temperature <= 0) return p;
    double sum = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) sum += p(v);
    p.sum = block_sum(sum);
    return p;
}

// The lowest token whose cumulative weight exceeds uniform times their sum, of the target's distribution, less the draft's where
// there is one: q, or all of it on one token.
struct Residual {
    Softmax p, q;
    int drafted;  // -1: nothing is taken away
    __device__ double operator()(int token) const
    {
        if (drafted < 0) return p(token);
        return q.logits ? fmax(p(token) - q(token), 0.) : token == drafted ? 0. : p(token);
    }
};

__device__ int sample(Residual weight, int vocab, double uniform)
{
    double *of = (double *)shared_memory;
    int *chosen = (int *)(of + WARPS);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = (vocab + WARPS - 1) / WARPS;
    const int first = min(warp * part, vocab), last = min(first + part, vocab);
    double total = 0, before = 0;
    for (; total == 0; weight.drafted = total == 0 ? -1 : weight.drafted) {  // p and q that differ by rounding leave nothing: p
        double sum = 0;
        for (int v = first + lane; v < last; v += WARP) sum += weight(v);
        sum = warp_sum(sum);
        __syncthreads();
        if (lane == 0) of[warp] = sum;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) total += of[w];
    }
    const double wanted = uniform * total;
    int mine = 0;
    for (; mine < WARPS - 1 && before + of[mine] <= wanted; mine++) before += of[mine];
    while (mine && of[mine] == 0) before -= of[--mine];  // rounding may lead past the last weight
    if (warp == mine) {
        int found = -1, last_weighted = first;
        for (int v = first; v < last && found < 0; v += WARP) {
            const double own = v + lane < last ? weight(v + lane) : 0;
            double up_to = own;
            for (int step = 1; step < WARP; step *= 2) {
                const double lower = __shfl_up_sync(ALL, up_to, step);
                if (lane >= step) up_to += lower;
            }
            const unsigned weighted = __ballot_sync(ALL, own > 0), past = __ballot_sync(ALL, own > 0 && before + up_to > wanted);
            if (weighted) last_weighted = v + 31 - __clz(weighted);
            if (past) found = v + __ffs(past) - 1;
            before += __shfl_sync(ALL, up_to, WARP - 1);
        }
        if (lane == 0) *chosen = found < 0 ? last_weighted : found;
    }
    __syncthreads();
    return *chosen;
}

}  // namespace

// One block a request. logits (M, vocab): row i of a request judges what comes after i of its drafted tokens; a filter's victims
// are -inf. drafted (M), in each request's last row unused. draft_logits (M, vocab) likewise, or NULL where a drafter is sure of
// its tokens. seeds, temperature (n_requests), 0: greedy; first_position (n_requests): of the token the first row decides.
// -> n_accepted (n_requests), and next_token (n_requests): what follows the accepted ones.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    verify(const float *logits, const float *draft_logits, const int *drafted, const int *row_start, const int *first_position,
           const u64 *seeds, const double *temperature, int vocab, int *n_accepted, int *next_token)
{
    const int request = blockIdx.x, first = row_start[request], n_drafted = row_start[request + 1] - first - 1;
    const double heat = temperature[request];
    int accepted = 0, highest_at, draft_highest;
    for (;; accepted++) {
        const size_t row = first + accepted;
        const bool bonus = accepted == n_drafted;
        const int token = bonus ? -1 : drafted[row];
        const Softmax p = softmax(logits + row * vocab, vocab, heat, &highest_at);
        if (heat <= 0) {
            if (token == highest_at) continue;
            break;
        }
        double uniform[2];
        draw(seeds[request], first_position[request] + accepted, uniform);
        Softmax q = {nullptr, 0., 1., 1.};
        if (draft_logits && !bonus) q = softmax(draft_logits + row * vocab, vocab, heat, &draft_highest);
        if (!bonus && uniform[0] * (q.logits ? q(token) : 1.) < p(token)) continue;
        highest_at = sample(Residual{p, q, token}, vocab, uniform[1]);
        break;
    }
    if (threadIdx.x == 0) {
        n_accepted[request] = accepted;
        next_token[request] = highest_at;
    }
}
