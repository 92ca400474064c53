/* AVX-512 with the bf16 dot product (Zen 4, Cooper Lake, Sapphire Rapids and newer). */
#include "avx512.h"
#include "isa_body.h"
#include "codes_body.h"

static int supported(void) { return has_avx512bf16(); }

const isa_t isa_avx512bf16 = ISA("avx512bf16", TILE_ROWS, tile_bf16, , to_bf16, 1, isa_avx512bf16_f32);
const isa_t isa_avx512bf16_f32 = ISA("avx512bf16", TILE_ROWS, tile_bf16, _f32, to_f32, 2, isa_avx512bf16_f32);
