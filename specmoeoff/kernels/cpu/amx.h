/* The tiles' configuration, the same for all that use them: eight of 16 rows of 64 bytes. */
#ifndef SPECMOEOFF_AMX_H
#define SPECMOEOFF_AMX_H

#include <immintrin.h>
#include <stdint.h>

#include "threads.h"

enum { AMX_ROWS = 16 };

/* Whether the CPU has them and the operating system hands them out, which it does on request, once a process. */
int smo_has_amx_bf16(void);

/* Once a thread and region: what ran before may have left another. */
__attribute__((target("amx-tile"))) static inline void amx_configure(void)
{
    if (smo_tiles_configured) return;
    /* Constant: GCC 12's intrinsic tells the compiler of its first eight bytes only, and what is stored to others just before is lost. */
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {AMX_ROWS, AMX_ROWS, AMX_ROWS, AMX_ROWS, AMX_ROWS, AMX_ROWS, AMX_ROWS, AMX_ROWS},
    };
    _tile_loadconfig(&config);
    smo_tiles_configured = 1;
}

#endif
