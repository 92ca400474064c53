/* Packing and products, for whichever instruction set was chosen. No intrinsics here.
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
    &isa_amxbf16,
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

/* Without a weight, x as it is. */
void rmsnorm_rows(const isa_t *isa, const float *x, size_t x_stride, int m, int n, const float *weight, float eps, uint16_t *out)
{
#pragma omp for schedule(static)
    for (int r = 0; r < m; r++) {
        const float *row = x + (size_t)r * x_stride;
        uint16_t *to = out + (size_t)r * n * isa->halves;
        if (weight) isa->rmsnorm(row, weight, eps, n, to);
        else if (isa->halves == 2) memcpy(to, row, sizeof(float) * (size_t)n);
        else isa->to_bf16(row, 1.f, n, to);
    }
}

void smo_rmsnorm(int isa, int threads, const float *x, int m, int n, const float *weight, float eps, uint16_t *out)
{
    EACH_THREAD(threads, rmsnorm_rows(isa_of(isa), x, (size_t)n, m, n, weight, eps, out));
}
