// ptx.cuh for the host, in plain C++.
#pragma once

inline float bf16_value(unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

inline void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1)
{
    struct Fragment { unsigned a[4], b[2]; };
    const Fragment *of = collective(Fragment{{a.x, a.y, a.z, a.w}, {b0, b1}});
    const int lane = current->lane, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = 2 * q + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; k++) {
            const int at = k % 8 / 2, high = k / 8;
            sum = fmaf(bf16_value(of[row % 8 * 4 + at].a[high * 2 + row / 8], k % 2), bf16_value(of[column * 4 + at].b[high], k % 2), sum);
        }
        d[i] = sum;
    }
}

// Copies happen as late as they may or, in every other order, at once.
inline void copy_async(void *shared, const void *global)
{
    if (copies_at_once) memcpy(shared, global, 16);
    else current->open.push_back({shared, global});
}
inline void commit_copies()
{
    current->committed.push_back(current->open);
    current->open.clear();
}
template <int PENDING> inline void wait_copies()
{
    if (skip_waits) return;
    while ((int)current->committed.size() > PENDING) {
        for (const Copy &copy : current->committed.front()) memcpy(copy.to, copy.from, 16);
        current->committed.pop_front();
    }
}

inline uint4 load_once(const uint4 *p) { return *p; }
inline unsigned long long nanoseconds() { return ++clock_ns; }
