/* SwiGLU experts: packing, and all experts of a call in one parallel region.
 *
 * A strip is 64 output columns. In bf16 and fp32 it is as smo_pack_linear makes it. In the other formats a weight is
 * (code - offset) * scale, scale one bf16 for `group` inputs of a column. Groups follow one another: 64 scales, then rows of
 * 64 x 4 bytes. A byte is one code of int8, or two codes, the low half that of the input four before the high half's.
 * There rows are int8 too, a scale for each group: products and their sums within a group are exact.
 */
#define _GNU_SOURCE
#include "experts.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "rows.h"
#include "threads.h"
#include "tiles.h"

/* A strip is read in pieces that stay in the L2 cache, beside the rows, while every tile of rows uses them. */
enum { PIECE_BYTES = 128 << 10, SMALL_PIECE_BYTES = 16 << 10, FEW_ROWS = 24 };

static const float E2M1[8] = {0.f, 1.f, 2.f, 3.f, 4.f, 6.f, 8.f, 12.f}; /* twice: the scales are halves */

static int padded(int n) { return strips(n) * COLUMNS; }
static size_t group_bytes(int format)
{
    return 2 * COLUMNS + (size_t)FORMATS[format].group * COLUMNS * (size_t)FORMATS[format].bits / 8;
}
static size_t strip_bytes(int format, int halves, int n_in)
{
    return format == PLAIN ? 2 * strip_elements(n_in * halves) : (size_t)(padded(n_in) / FORMATS[format].group) * group_bytes(format);
}
/* Bytes of a row that gate and up, or down, multiply. */
static size_t row_bytes(int format, int halves, int n_in)
{
    return format == PLAIN ? (size_t)n_in * 2 * (size_t)halves : coded_row_bytes(padded(n_in), FORMATS[format].group);
}
/* Down reads what gate and up wrote, whole strips of it. */
static size_t down_strip_bytes(int format, int halves, int intermediate) { return strip_bytes(format, halves, padded(intermediate)); }
static size_t down_offset(int format, int halves, int hidden, int intermediate)
{
    return 2 * (size_t)strips(intermediate) * strip_bytes(format, halves, hidden);
}

/* ---- packing ------------------------------------------------------------------------------------------------------------ */

size_t smo_packed_expert_bytes(int hidden, int intermediate, int format, int halves)
{
    return down_offset(format, halves, hidden, intermediate) + (size_t)strips(hidden) * down_strip_bytes(format, halves, intermediate);
}

static float widen(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* bf16 nearest to x, or the next away from zero. */
static uint16_t narrow(float x, int away)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + (away ? 0xffff : 0x7fff + ((bits >> 16) & 1))) >> 16);
}

/* The bf16 scale of a group whose weight of largest magnitude is `extreme`. */
static uint16_t scale_of(int format, float extreme)
{
    const float most = fabsf(extreme);
    if (!(most > 1e-30f)) return 0;
    if (format == INT8) return narrow(most / 127.f, 1);
    if (format == INT4) return narrow(extreme / -8.f, 0); /* -8 has no positive twin: the extreme weight takes it */
    int exponent; /* OCP Microscaling 1.0, section 6.3: 6 is the largest number, its exponent 2 */
    frexpf(most, &exponent);
    return narrow(ldexpf(1.f, exponent - 4), 0);
}

/* What is stored, and in *value what it stands for. */
static unsigned code_of(int format, float weight, float scale, float *value)
{
    const float x = scale == 0.f ? 0.f : weight / scale;
    if (format != MXFP4) {
        const float most = format == INT8 ? 127.f : 7.f, least = format == INT8 ? -127.f : -8.f;
        const float whole = x > least ? (x < most ? rintf(x) : most) : least;
        *value = whole * scale;
        return (unsigned)((int)whole + FORMATS[format].offset);
    }
    const float size = fabsf(x);
    unsigned best = 0;
    for (unsigned i = 1; i < 8; i++) /* ties to even codes */
        if (fabsf(size - E2M1[i]) < fabsf(size - E2M1[best]) || (fabsf(size - E2M1[i]) == fabsf(size - E2M1[best]) && i % 2 == 0)) best = i;
    *value = (x < 0.f ? -E2M1[best] : E2M1[best]) * scale;
    return best | (x < 0.f ? 8u : 0u);
}

/* weight (n_out <= 64, n_in) bf16 -> one strip of `groups` groups; what is missing is zero. errors: sums of squared errors and weights. */
static void pack_strip(int format, const uint16_t *weight, int n_out, int n_in, int groups, unsigned char *out, double *errors)
{
    const int group = FORMATS[format].group, bits = FORMATS[format].bits;
    for (int g = 0; g < groups; g++, out += group_bytes(format))
        for (int c = 0; c < COLUMNS; c++) {
            float values[64] = {0}, extreme = 0.f;
            for (int i = 0; i < group && c < n_out && g * group + i < n_in; i++) {
                values[i] = widen(weight[(size_t)c * n_in + g * group + i]);
                if (fabsf(values[i]) > fabsf(extreme)) extreme = values[i];
            }
            const uint16_t scale = scale_of(format, extreme);
            memcpy(out + 2 * c, &scale, 2);
            for (int i = 0; i < group; i++) {
                float value;
                const unsigned code = code_of(format, values[i], widen(scale), &value);
                errors[0] += ((double)values[i] - value) * ((double)values[i] - value);
                errors[1] += (double)values[i] * values[i];
                const int row = i * bits / 32, high = bits == 4 && i / 4 % 2;
                out[2 * COLUMNS + row * 4 * COLUMNS + 4 * c + i % 4] |= (unsigned char)(code << (high ? 4 : 0));
            }
        }
}

/* Expert: for every 64 intermediate columns the gate strip and the up strip, then the strips of down. */
void smo_pack_expert(int format, const uint16_t *gate, const uint16_t *up, const uint16_t *down, int hidden, int intermediate,
                     int halves, unsigned char *out, double *errors)
{
    const size_t strip = strip_bytes(format, halves, hidden), down_strip = down_strip_bytes(format, halves, intermediate);
    const int n_strips[2] = {2 * strips(intermediate), strips(hidden)}, wide = padded(intermediate);
    memset(out, 0, smo_packed_expert_bytes(hidden, intermediate, format, halves));
    for (int s = 0; s < n_strips[0] + n_strips[1]; s++, out += s <= n_strips[0] ? strip : down_strip) {
        const int is_down = s >= n_strips[0], first = (is_down ? s - n_strips[0] : s / 2) * COLUMNS;
        const int left = (is_down ? hidden : intermediate) - first, n = left < COLUMNS ? left : COLUMNS;
        const int n_in = (is_down ? intermediate : hidden) * halves;
        const uint16_t *weight = (is_down ? down : s % 2 ? up : gate) + (size_t)first * n_in;
        if (format == PLAIN) smo_pack_linear(weight, n, n_in, (uint16_t *)out);
        else pack_strip(format, weight, n, n_in, padded(is_down ? wide : hidden) / FORMATS[format].group, out, errors);
    }
}

/* ---- products ----------------------------------------------------------------------------------------------------------- */

size_t smo_experts_scratch_bytes(int hidden, int intermediate, int format, int halves, int n_slots)
{
    return (size_t)n_slots * (row_bytes(format, halves, padded(intermediate)) + (format == PLAIN ? 0 : row_bytes(format, halves, hidden)));
}

/* out (n, 64) = n rows . a strip of n_in inputs. `next`: the strip after it. */
static void strip_product(const isa_t *isa, int format, const unsigned char *const *x, int n, const unsigned char *w, int n_in,
                          float *out, const unsigned char *next)
{
    const int is_plain = format == PLAIN, steps = is_plain ? n_in * isa->halves / 2 : padded(n_in) / FORMATS[format].group;
    const size_t step_bytes = is_plain ? 4 * COLUMNS : group_bytes(format);
    const int piece = (int)((is_plain && n <= FEW_ROWS ? SMALL_PIECE_BYTES : PIECE_BYTES) / step_bytes);
    for (int first = 0; first < steps; first += piece) {
        const int last = steps - first < piece ? steps : first + piece;
        const unsigned char *weights = w + (size_t)first * step_bytes, *after = last < steps ? w + (size_t)last * step_bytes : next;
        const int next_steps = last < steps ? (steps - last < piece ? steps - last : piece) : (steps < piece ? steps : piece);
        if (is_plain) {
            const uint16_t *rows[GROUP_ROWS];
            /* Of several tiles the first reads a piece sooner than they all fetch one: two before it is due, and once more one before. */
            const int then = first + 2 * piece;
            const unsigned char *far = n <= TILE_ROWS || n > FEW_ROWS ? after : then < steps ? w + (size_t)then * step_bytes : next + (size_t)(then - steps) % (size_t)steps * step_bytes;
            for (int r = 0; r < n; r++) rows[r] = (const uint16_t *)x[r] + 2 * first;
            tile_rows(isa, rows, n, weights, last - first, COLUMNS, first > 0, out, COLUMNS, far, after, (size_t)next_steps * step_bytes);
        } else {
            const int n_tiles = (n + TILE_ROWS - 1) / TILE_ROWS, lines = (int)(group_bytes(format) / (4 * COLUMNS));
            const size_t stride = (size_t)next_steps * step_bytes / (size_t)(n_tiles * (last - first) * lines) + 1;
            for (int r = 0, t = 0; t < n_tiles; t++) {
                const int rows = n / n_tiles + (t < n % n_tiles);
                isa->tile_codes(format, rows, x + r, padded(n_in), first, last, weights, out + r * COLUMNS,
                                (const char *)after + (size_t)t * (size_t)((last - first) * lines) * stride, stride);
                r += rows;
            }
        }
    }
}

static void add_bias(float *x, const float *bias, int n)
{
    for (int i = 0; i < n; i++) x[i] += bias[i];
}

static int next_in_use(const experts_t *x, int e)
{
    do e++;
    while (e < x->n_experts && x->start[e] == x->start[e + 1]);
    return e;
}

/* Strip s of expert e's downs, or its pairs of gate and up, counted on over the experts after it and from the last to the downs
 * of the first: what memory brings is always what some thread reads next. */
static const unsigned char *strip_of(const isa_t *isa, const experts_t *x, int e, int s, int is_down)
{
    const int counts[2] = {strips(x->intermediate), strips(x->hidden)};
    const int here = e;
    for (; s >= counts[is_down]; e = next_in_use(x, e)) {
        s -= counts[is_down];
        if (next_in_use(x, e) == x->n_experts) {
            if (is_down) return x->weights[here];
            is_down = 1;
            e = -1;
        }
    }
    return x->weights[e] + (is_down ? down_offset(x->format, isa->halves, x->hidden, x->intermediate) + (size_t)s * down_strip_bytes(x->format, isa->halves, x->intermediate)
                                    : 2 * (size_t)s * strip_bytes(x->format, isa->halves, x->hidden));
}

/* One item: 64 intermediate columns of up to GROUP_ROWS rows. `rows`: of what gate and up multiply, `inner` what down will. */
static void up_item(const isa_t *isa, const experts_t *x, int e, int s, const unsigned char *next, const unsigned char *const *rows,
                    int n, unsigned char *inner)
{
    const size_t strip = strip_bytes(x->format, isa->halves, x->hidden), row = row_bytes(x->format, isa->halves, padded(x->intermediate));
    const unsigned char *weights = strip_of(isa, x, e, s, 0);
    const int first = s * COLUMNS, columns = x->intermediate - first < COLUMNS ? x->intermediate - first : COLUMNS;
    float gate[GROUP_ROWS * COLUMNS] __attribute__((aligned(64))), up[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
    strip_product(isa, x->format, rows, n, weights, x->hidden, gate, weights + strip);
    strip_product(isa, x->format, rows, n, weights + strip, x->hidden, up, next);
    for (int r = 0; r < n; r++) {
        if (x->biases) {
            add_bias(gate + r * COLUMNS, x->biases[e] + first, columns);
            add_bias(up + r * COLUMNS, x->biases[e] + x->intermediate + first, columns);
        }
        if (x->format == PLAIN) {
            isa->swiglu(gate + r * COLUMNS, up + r * COLUMNS, x->swiglu, COLUMNS, (uint16_t *)(inner + (size_t)r * row) + first * isa->halves);
        } else {
            uint16_t rounded[COLUMNS];
            isa->swiglu(gate + r * COLUMNS, up + r * COLUMNS, x->swiglu, COLUMNS, rounded);
            isa->quantise(x->format, rounded, COLUMNS, first, padded(x->intermediate), inner + (size_t)r * row);
        }
    }
}

void expert_rows(const isa_t *isa, const experts_t *x, const uint16_t *normed, float *out, unsigned char *scratch)
{
    const int format = x->format, up_strips = strips(x->intermediate), down_strips = strips(x->hidden), wide = padded(x->intermediate);
    const int n_slots = x->start[x->n_experts], ahead = omp_get_num_threads();
    const size_t row = row_bytes(format, isa->halves, x->hidden), inner_row = row_bytes(format, isa->halves, wide);
    unsigned char *inner = scratch, *coded = scratch + (size_t)n_slots * inner_row;
#define SLOT(i) (x->slots ? x->slots[i] : (i))
#define ROW(i) (normed + (size_t)(SLOT(i) / x->n_active) * (size_t)(x->hidden * isa->halves))
/* item -> strip s, rows first .. first + n of expert e */
#define ITEM                                                                                                            \
    const int s = item / groups, first = x->start[e] + item % groups * GROUP_ROWS, left = x->start[e + 1] - first;      \
    const int n = left < GROUP_ROWS ? left : GROUP_ROWS;                                                                \
    const unsigned char *rows[GROUP_ROWS]

    if (format != PLAIN) {
#pragma omp for schedule(static)
        for (int i = 0; i < n_slots; i++) isa->quantise(format, ROW(i), x->hidden, 0, padded(x->hidden), coded + (size_t)i * row);
    }
    for (int e = 0; e < x->n_experts; e++) {
        const int groups = (x->start[e + 1] - x->start[e] + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < up_strips * groups; item++) {
            ITEM;
            for (int r = 0; r < n; r++)
                rows[r] = format == PLAIN ? (const unsigned char *)ROW(first + r) : coded + (size_t)(first + r) * row;
            up_item(isa, x, e, s, strip_of(isa, x, e, (item + ahead) / groups, 0), rows, n, inner + (size_t)first * inner_row);
        }
    }
#pragma omp barrier
    for (int e = 0; e < x->n_experts; e++) {
        const int groups = (x->start[e + 1] - x->start[e] + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < down_strips * groups; item++) {
            ITEM;
            const int columns = x->hidden - s * COLUMNS < COLUMNS ? x->hidden - s * COLUMNS : COLUMNS;
            float result[GROUP_ROWS * COLUMNS] __attribute__((aligned(64)));
            for (int r = 0; r < n; r++) rows[r] = inner + (size_t)(first + r) * inner_row;
            strip_product(isa, format, rows, n, strip_of(isa, x, e, s, 1), wide, result, strip_of(isa, x, e, (item + ahead) / groups, 1));
            for (int r = 0; r < n; r++) {
                if (x->biases) add_bias(result + r * COLUMNS, x->biases[e] + 2 * x->intermediate + s * COLUMNS, columns);
                memcpy(out + (size_t)SLOT(first + r) * x->hidden + s * COLUMNS, result + r * COLUMNS, sizeof(float) * (size_t)columns);
            }
        }
    }
#pragma omp barrier
}

/* The lists one after the other, and where each begins in `start` (n_lists + 1). `seen`: n_slots bytes. Returns 0; or 1 if a slot is
 * not in 0 .. n_slots - 1, 2 if one occurs twice. */
int smo_join_slots(const int32_t *const *lists, const int32_t *counts, int n_lists, int n_slots, int32_t *slots, int32_t *start, unsigned char *seen)
{
    memset(seen, 0, (size_t)n_slots);
    start[0] = 0;
    for (int e = 0; e < n_lists; e++) {
        for (int i = 0; i < counts[e]; i++) {
            const int32_t slot = lists[e][i];
            if (slot < 0 || slot >= n_slots) return 1;
            if (seen[slot]++) return 2;
            slots[start[e] + i] = slot;
        }
        start[e + 1] = start[e] + counts[e];
    }
    return 0;
}

void smo_experts(int isa, int threads, const experts_t *experts, const uint16_t *normed, float *out, unsigned char *scratch)
{
    EACH_THREAD(threads, expert_rows(isa_of(isa), experts, normed, out, scratch));
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

int sort_slots(const experts_t *table, const int32_t *index, int n_slots, int32_t *slots, routes_t *routes)
{
    int32_t counts[MAX_EXPERTS] = {0}, place[MAX_EXPERTS], at = 0;
    for (int i = 0; i < n_slots; i++) {
        if (index[i] < 0 || index[i] >= table->n_experts) return 0;
        counts[index[i]]++;
    }
    routes->n_used = 0;
    for (int missing = 0; missing < 2; missing++) {
        for (int e = 0; e < table->n_experts; e++) {
            if (!counts[e] || (table->weights[e] == NULL) != missing) continue;
            const int i = routes->n_used++;
            routes->experts[i] = e;
            routes->weights[i] = table->weights[e];
            routes->biases[i] = table->biases ? table->biases[e] : NULL;
            routes->start[i] = place[e] = at;
            at += counts[e];
        }
        if (!missing) routes->n_present = routes->n_used;
    }
    routes->start[routes->n_used] = at;
    for (int i = 0; i < n_slots; i++) slots[place[index[i]]++] = i;
    return 1;
}

void feed_forward_rows(const isa_t *isa, const experts_t *table, const routes_t *routes, const int32_t *slots, int m, const uint16_t *normed,
                       float *x, float *out, const float *weight, unsigned char *scratch)
{
    experts_t present = *table;
    present.n_experts = routes->n_present;
    present.weights = routes->weights;
    if (table->biases) present.biases = routes->biases;
    present.slots = slots;
    present.start = routes->start;
    expert_rows(isa, &present, normed, out, scratch);
    if (routes->n_present == routes->n_used) combine_rows(isa, x, m, table->hidden, table->n_active, out, weight);
}

int smo_feed_forward(int isa, int threads, const experts_t *table, int m, const uint16_t *normed, const int32_t *index, const float *weight,
                     float *x, float *out, int32_t *slots, int32_t *used, int32_t *start, unsigned char *scratch)
{
    routes_t routes;
    if (!sort_slots(table, index, m * table->n_active, slots, &routes)) return 0;
    if (routes.n_present) EACH_THREAD(threads, feed_forward_rows(isa_of(isa), table, &routes, slots, m, normed, x, out, weight, scratch));
    memcpy(used, routes.experts, sizeof *used * (size_t)routes.n_used);
    memcpy(start, routes.start, sizeof *start * (size_t)(routes.n_used + 1));
    return routes.n_used;
}
