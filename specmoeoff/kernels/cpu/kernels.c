/* Packing, products and experts, for whichever instruction set was chosen. No intrinsics here.
 *
 * Every call is one parallel region; phases inside it are separated by the barriers of `omp for`. A work item is a strip of
 * 64 output columns times all rows (or a group of them): weights come from memory once, rows stay in the L2 cache.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>
#include <string.h>

#include "rows.h"
#include "threads.h"
#include "tiles.h"

static const isa_t *const ISAS[] = {
#if defined(__x86_64__)
    &isa_avx512bf16,
    &isa_avx2,
#endif
    &isa_scalar,
};
enum { N_ISAS = sizeof ISAS / sizeof *ISAS };

/* Beyond the instruction sets come the same in fp32. */
const isa_t *isa_of(int index) { return index < N_ISAS ? ISAS[index] : ISAS[index - N_ISAS]->f32; }

/* ---- packing ------------------------------------------------------------------------------------------------------------ */

int smo_isa_count(void) { return N_ISAS; }
const char *smo_isa_name(int i) { return ISAS[i]->name; }
int smo_isa_supported(int i) { return ISAS[i]->supported(); }

/* Of bf16. An fp32 is packed as two bf16 are: in what follows a dimension that is summed over counts 16-bit halves. */
size_t smo_packed_linear_bytes(int n_out, int n_in) { return (size_t)strips(n_out) * strip_elements(n_in) * 2; }

/* weight (n_out, n_in) row-major -> strips [n_out / 64][n_in / 2][64][2], missing columns zero. */
void smo_pack_linear(const uint16_t *weight, int n_out, int n_in, uint16_t *out)
{
    memset(out, 0, smo_packed_linear_bytes(n_out, n_in));
    for (int o = 0; o < n_out; o++) {
        const uint16_t *row = weight + (size_t)o * n_in;
        uint16_t *column = out + (size_t)(o / COLUMNS) * strip_elements(n_in) + (size_t)(o % COLUMNS) * 2;
        for (int i = 0; i < n_in; i += 2) {
            column[(size_t)i * COLUMNS] = row[i];
            column[(size_t)i * COLUMNS + 1] = row[i + 1];
        }
    }
}

/* Expert: for every 64 intermediate columns the gate strip and the up strip, then the strips of down. */
static size_t down_offset(int hidden, int intermediate) { return 2 * (size_t)strips(intermediate) * strip_elements(hidden); }
static int padded(int n) { return strips(n) * COLUMNS; }

size_t smo_packed_expert_bytes(int hidden, int intermediate)
{
    return 2 * (down_offset(hidden, intermediate) + (size_t)strips(hidden) * strip_elements(padded(intermediate)));
}

void smo_pack_expert(const uint16_t *gate, const uint16_t *up, const uint16_t *down, int hidden, int intermediate, int halves,
                     uint16_t *out)
{
    const int n_in = hidden * halves, down_in = intermediate * halves;
    memset(out, 0, (size_t)halves * smo_packed_expert_bytes(hidden, intermediate));
    for (int s = 0; s < strips(intermediate); s++) {
        const int first = s * COLUMNS, n = intermediate - first < COLUMNS ? intermediate - first : COLUMNS;
        smo_pack_linear(gate + (size_t)first * n_in, n, n_in, out + (size_t)(2 * s) * strip_elements(n_in));
        smo_pack_linear(up + (size_t)first * n_in, n, n_in, out + (size_t)(2 * s + 1) * strip_elements(n_in));
    }
    uint16_t *packed = out + down_offset(n_in, intermediate);
    for (int s = 0; s < strips(hidden); s++) {
        const int first = s * COLUMNS, n = hidden - first < COLUMNS ? hidden - first : COLUMNS;
        smo_pack_linear(down + (size_t)first * down_in, n, down_in, packed + (size_t)s * strip_elements(padded(intermediate) * halves));
    }
}

void linear_rows(const isa_t *isa, const uint16_t *x, int m, int n_in, const uint16_t *w, int n_out, target_t target)
{
    const int n_strips = strips(n_out), groups = (m + GROUP_ROWS - 1) / GROUP_ROWS, n_halves = n_in * isa->halves;
#pragma omp for schedule(dynamic, 1)
    for (int item = 0; item < n_strips * groups; item++) {
        const int s = item / groups, first = item % groups * GROUP_ROWS, n = m - first < GROUP_ROWS ? m - first : GROUP_ROWS;
        const int columns = n_out - s * COLUMNS < COLUMNS ? n_out - s * COLUMNS : COLUMNS;
        const uint16_t *rows[GROUP_ROWS], *strip = w + (size_t)s * strip_elements(n_halves);
        float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
        for (int r = 0; r < n; r++) rows[r] = x + (size_t)(first + r) * n_halves;
        strip_rows(isa, rows, n, strip, n_halves, columns, result, COLUMNS, strip + (size_t)omp_get_num_threads() * strip_elements(n_halves));
        for (int r = 0; r < n; r++) {
            float *row = result + r * COLUMNS, *out = target.out + (size_t)(first + r) * target.stride + s * COLUMNS;
            if (target.bias)
                for (int i = 0; i < columns; i++) row[i] += target.bias[s * COLUMNS + i];
            if (target.scale)
                for (int i = 0; i < columns; i++) row[i] *= target.scale[first + r];
            if (!target.add) memcpy(out, row, sizeof(float) * (size_t)columns);
            else for (int i = 0; i < columns; i++) out[i] += row[i];
        }
    }
}

void smo_linear(int isa, int threads, const uint16_t *x, int m, int n_in, const uint16_t *w, int n_out, float *out)
{
    EACH_THREAD(threads, linear_rows(isa_of(isa), x, m, n_in, w, n_out, (target_t){.out = out, .stride = (size_t)n_out}));
}

void rmsnorm_rows(const isa_t *isa, const float *x, size_t x_stride, int m, int n, const float *weight, float eps, uint16_t *out)
{
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++) isa->rmsnorm(x + (size_t)r * x_stride, weight, eps, n, out + (size_t)r * n * isa->halves);
}

void smo_rmsnorm(int isa, int threads, const float *x, int m, int n, const float *weight, float eps, uint16_t *out)
{
    EACH_THREAD(threads, rmsnorm_rows(isa_of(isa), x, (size_t)n, m, n, weight, eps, out));
}

/* ---- experts ------------------------------------------------------------------------------------------------------------ */

size_t smo_experts_scratch_bytes(int intermediate, int n_slots) { return (size_t)n_slots * (size_t)padded(intermediate) * 2; }

void expert_rows(const isa_t *isa, int hidden, int intermediate, int n_active, const uint16_t *normed, int n_experts,
                 const uint16_t *const *experts, const int32_t *slots, const int32_t *start, float *out, unsigned char *scratch)
{
    const int up_strips = strips(intermediate), down_strips = strips(hidden);
    const int n_in = hidden * isa->halves, wide = padded(intermediate) * isa->halves;
    const size_t strip = strip_elements(n_in), down_strip = strip_elements(wide);
    uint16_t *activations = (uint16_t *)scratch;

    for (int e = 0; e < n_experts; e++) {
        const int m = start[e + 1] - start[e], groups = (m + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < up_strips * groups; item++) {
            const int s = item / groups, first = start[e] + item % groups * GROUP_ROWS, left = start[e + 1] - first;
            const int n = left < GROUP_ROWS ? left : GROUP_ROWS;
            const uint16_t *rows[GROUP_ROWS], *weights = experts[e] + 2 * (size_t)s * strip;
            float gate[GROUP_ROWS * COLUMNS] __attribute__((aligned(64))), up[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
            for (int r = 0; r < n; r++) rows[r] = normed + (size_t)((slots ? slots[first + r] : first + r) / n_active) * n_in;
            strip_rows(isa, rows, n, weights, n_in, COLUMNS, gate, COLUMNS, weights + strip);
            strip_rows(isa, rows, n, weights + strip, n_in, COLUMNS, up, COLUMNS, weights + 2 * (size_t)omp_get_num_threads() * strip);
            for (int r = 0; r < n; r++)
                isa->silu_mul(gate + r * COLUMNS, up + r * COLUMNS, COLUMNS, activations + (size_t)(first + r) * wide + s * COLUMNS * isa->halves);
        }
    }
#pragma omp barrier
    for (int e = 0; e < n_experts; e++) {
        const int m = start[e + 1] - start[e], groups = (m + GROUP_ROWS - 1) / GROUP_ROWS;
        const uint16_t *down = experts[e] + down_offset(n_in, intermediate);
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < down_strips * groups; item++) {
            const int s = item / groups, first = start[e] + item % groups * GROUP_ROWS, left = start[e + 1] - first;
            const int n = left < GROUP_ROWS ? left : GROUP_ROWS, columns = hidden - s * COLUMNS < COLUMNS ? hidden - s * COLUMNS : COLUMNS;
            const uint16_t *rows[GROUP_ROWS];
            float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
            for (int r = 0; r < n; r++) rows[r] = activations + (size_t)(first + r) * wide;
            strip_rows(isa, rows, n, down + (size_t)s * down_strip, wide, columns, result, COLUMNS,
                       down + (size_t)(s + omp_get_num_threads()) * down_strip);
            for (int r = 0; r < n; r++)
                memcpy(out + (size_t)(slots ? slots[first + r] : first + r) * hidden + s * COLUMNS, result + r * COLUMNS,
                       sizeof(float) * (size_t)columns);
        }
    }
#pragma omp barrier
}

void smo_experts(int isa, int threads, int hidden, int intermediate, int n_active, const uint16_t *normed, int n_experts,
                 const uint16_t *const *experts, const int32_t *slots, const int32_t *start, float *out, unsigned char *scratch)
{
    EACH_THREAD(threads,
                expert_rows(isa_of(isa), hidden, intermediate, n_active, normed, n_experts, experts, slots, start, out, scratch));
}

void combine_rows(const isa_t *isa, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight)
{
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++)
        for (int rank = 0; rank < n_active; rank++) {
            const size_t slot = (size_t)r * n_active + rank;
            isa->add_scaled(x + (size_t)r * hidden, weight[slot], expert_out + slot * hidden, hidden);
        }
}

void smo_combine(int isa, int threads, float *x, int m, int hidden, int n_active, const float *expert_out, const float *weight)
{
    EACH_THREAD(m > 16 ? threads : 1, combine_rows(isa_of(isa), x, m, hidden, n_active, expert_out, weight));
}
