/* CPU kernels: shapes, and what an instruction set must provide. bf16 is uint16_t everywhere.
 *
 * Everything that multiplies goes through one primitive, `tile`: rows against a strip of at most 64 columns. A step of the
 * summed dimension is a pair of bf16 in both (VNNI layout), or one fp32 of the rows and one fp16, fp32 or int8 of the strip.
 * Each output element is one chain of accumulations in the order of the summed dimension, however many rows a tile has: that is
 * what makes a row's bits independent of its neighbours.
 */
#ifndef SPECMOEOFF_KERNELS_H
#define SPECMOEOFF_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { COLUMNS = 64, LANES = 16, PAGE_TOKENS = 128, TILE_ROWS = 6, MOST_TILE_ROWS = 16, MAX_EXPERTS = 1024 };
/* Formats of numbers in pages; packed weights are bf16 or fp32. */
enum { KV_BF16, KV_FP16, KV_FP32, KV_INT8, N_KV_FORMATS };
#define LOWEST (-1e30f)
/* A row's reference follows its highest score only when that exceeds it by more: what is above 1 is as exact as what is below. */
#define SLACK 8.f

/* Part of a strip; and what comes next, to be fetched meanwhile: a row of 64 columns at fetch + step * fetch_step, and at `again`, which may
 * be the same: where many fetches are under way others are dropped. */
typedef struct {
    const unsigned char *w;
    size_t w_stride; /* bytes from step to step */
    int steps;
    const char *fetch, *again;
    size_t fetch_step;
} part_t;

/* gate / (1 + e^(-alpha gate)) * (up + shift), gate at most `limit`, up within -limit .. limit. */
typedef struct {
    float alpha, limit, shift;
} swiglu_t;
static const swiglu_t SILU = {1.f, __builtin_inff(), 0.f};

/* Formats of packed experts: PLAIN is bf16 or fp32; of the others codes in groups, see experts.c. Offsets and groups are known
 * when tiles are compiled. */
enum { PLAIN, INT8, INT4, MXFP4, N_FORMATS };
typedef struct {
    int group, bits, offset;
} format_t;
static const format_t FORMATS[N_FORMATS] = {{0, 16, 0}, {64, 8, 128}, {64, 4, 8}, {32, 4, 12}};
/* A row of n numbers (a multiple of 64) that multiplies codes: n bytes, and of every group a float and an int. */
static inline size_t coded_row_bytes(int n, int group) { return (size_t)n + 8 * (size_t)(n / group); }

/* Rows against a strip: see isa_t. */
typedef void (*tile_t)(int rows, const void *const *x, const part_t *part, int vectors, int accumulate, float *out, size_t out_stride);

/* One instruction set and one precision of weights and activations. Where it is fp32, activations and packed weights are
 * floats behind the same uint16_t pointers, two halves an element. */
typedef struct isa {
    const char *name;
    int (*supported)(void);
    /* out[r][0 .. 16 * vectors) (+)= sum over steps of x[r] . w, for a strip of each format. rows in 1 .. tile_rows. */
    tile_t tile[N_KV_FORMATS];
    int tile_rows[N_KV_FORMATS], half_tiles[N_KV_FORMATS]; /* half_tiles: twice the rows where there are at most two vectors */
    /* out = bf16(x * rsqrt(mean(x^2) + eps) * weight); n a multiple of 16 */
    void (*rmsnorm)(const float *x, const float *weight, float eps, int n, uint16_t *out);
    /* out = bf16(scale * x); n a multiple of 16 */
    void (*to_bf16)(const float *x, float scale, int n, uint16_t *out);
    void (*to_fp16)(const float *x, int n, uint16_t *out);
    /* out = activations(swiglu); n a multiple of 16 */
    void (*swiglu)(const float *gate, const float *up, const swiglu_t *s, int n, uint16_t *out);
    /* x += y; n a multiple of 16 */
    void (*add)(float *x, const float *y, int n);
    /* x += a * y, product rounded before the sum; n a multiple of 16 */
    void (*add_scaled)(float *x, float a, const float *y, int n);
    /* One online-softmax step over the scores of a page: probabilities, e^(score - reference), become bf16 or (`wide`) fp32, and
     * exactly 0 where `mask` (16 bits a vector; NULL: all) has none; reference, sums (one a lane) and output (n floats) stay
     * consistent. `scales`: what a score and then a probability is to be multiplied with; or NULL. */
    void (*softmax)(const float *scores, const uint16_t *mask, const float *scales, float *reference, float *sums, float *output, int n,
                    int wide, void *probabilities);
    float (*sum_of)(const float *lanes);
    /* Adds what another range found; references, sums and outputs as softmax leaves them. */
    void (*merge)(float *reference, float *sums, float *output, float other, const float *other_sums, const float *other_output,
                  int n);
    int halves; /* 16-bit halves of an element of weights and activations: 1, or 2 for fp32 */
    /* out = activations(scale * x); n a multiple of 16 */
    void (*put)(const float *x, float scale, int n, uint16_t *out);
    const struct isa *f32; /* the same instruction set in fp32 */
    /* out (rows, 64) (+)= rows of n numbers . groups first .. last - 1 of a strip, the first at w; added but for group 0. Fetches
     * as tile does, 256 bytes a step. */
    void (*tile_codes)(int format, int rows, const unsigned char *const *x, int n, int first, int last, const unsigned char *w,
                       float *out, const char *next, size_t next_step);
    /* x (n) bf16 -> numbers `first` and on, a whole number of groups, of a row of `width`: round(127 x / largest of the group) */
    void (*quantise)(int format, const uint16_t *x, int n, int first, int width, unsigned char *row);
} isa_t;

extern const isa_t isa_scalar, isa_scalar_f32;
#if defined(__x86_64__)
extern const isa_t isa_avx2, isa_avx2_f32, isa_avx512bf16, isa_avx512bf16_f32, isa_amxbf16, isa_amxbf16_f32;
#endif

typedef struct {
    int32_t hidden, n_heads, n_kv_heads, head_dim, intermediate, n_experts, n_active;
    int32_t v_head_dim, rotary_dim;   /* the first rotary_dim numbers of a head are rotated */
    int32_t q_latent, kv_latent;      /* latent attention (DeepSeek-V2, section 2.1); q_latent 0: queries straight from hidden */
    int32_t shared_intermediate;      /* of the feed-forward that every row takes; 0: none */
    int32_t window;                   /* a row sees itself and window - 1 before it; 0: all */
    int32_t kv_format;                /* of keys and values */
    int32_t norm_heads;               /* q_norm and k_norm are of each head */
    int32_t sigmoid_router, renormalise, n_groups, n_active_groups, group_best; /* see route in layers.c */
    float rms_eps, attention_scale, routed_scale, clip_qkv;
} layer_shape_t;

/* Matrices are packed; biases, norms and rotary tables fp32. What a model has not is NULL. */
typedef struct {
    const float *input_norm;    /* (hidden); NULL: none */
    const uint16_t *qkv;        /* queries, keys, values of all heads; with latent attention latents and the rotary key */
    const uint16_t *o;          /* n_out = hidden */
    const float *post_norm;     /* (hidden) */
    const uint16_t *router;     /* n_out = n_experts; NULL for a dense layer */
    const float *cosines, *sines; /* (n_positions, rotary_dim / 2) */
    const float *qkv_bias, *o_bias;
    const float *router_bias;   /* (n_experts), added to the logits */
    const float *choice_bias;   /* (n_experts), added to the scores for the choice alone */
    const float *q_norm, *k_norm; /* (head_dim) of each head, or of all heads together where norm_heads is 0 */
    const float *sinks;         /* (n_heads), logits of a key without value */
    const float *q_latent_norm, *kv_latent_norm;
    const uint16_t *q_up;       /* n_out = n_heads * head_dim, from the latent or hidden */
    const uint16_t *kv_up;      /* n_out = n_heads * (head_dim + v_head_dim): keys (their rotary part zero), then values */
    const uint16_t *shared_gate_up, *shared_down; /* n_out = 2 * shared_intermediate, hidden */
    const uint16_t *shared_weight; /* n_out = 1: the sigmoid of it weighs the feed-forward */
} layer_t;

typedef struct {
    int32_t n_requests, n_rows, max_pages;
    const int32_t *row_start;      /* (n_requests + 1) */
    const int32_t *first_position; /* (n_requests) */
    const int32_t *page_table;     /* (n_requests, max_pages) */
} batch_t;

#endif
