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

inline unsigned bf16_half(float x)
{
    const unsigned bits = __float_as_uint(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return bf16_half(low) | bf16_half(high) << 16; }

// Copies happen as late as they may or, in every other order, at once.
inline void copy_async(void *shared, const void *global)
{
    if (at_once) memcpy(shared, global, 16);
    else current->open.push_back({shared, global});
}
inline void commit_copies()
{
    current->committed.push_back(current->open);
    current->open.clear();
}
template <int PENDING> inline void wait_copies()
{
    if (skip_waits & 1) return;
    while ((int)current->committed.size() > PENDING) {
        for (const Copy &copy : current->committed.front()) memcpy(copy.to, copy.from, 16);
        current->committed.pop_front();
    }
}

inline unsigned shared_address(const void *p) { return (unsigned)((const unsigned char *)p - (const unsigned char *)shared_memory); }

inline uint4 load_matrices(const void *row)
{
    const void *const *rows = collective(row);
    const int g = current->lane / 4, q = current->lane % 4;
    unsigned words[4];
    for (int i = 0; i < 4; i++) memcpy(&words[i], (const unsigned char *)rows[8 * i + g] + 4 * q, 4);
    return {words[0], words[1], words[2], words[3]};
}

inline void fence_copies() {}
inline void fence_products() {}
inline void pin(float &) {}

// Products happen as late as they may or, in every other order, at once; a warp's 16 rows apart from the other three's.
inline void multiply_now(const Product &p)
{
    const uint4 *of = collective(*p.a);
    const int g = current->lane / 4, q = current->lane % 4;
    unsigned a[32][4];
    memcpy(a, of, sizeof a);
    const unsigned start = (unsigned)(p.b & 0x3fff) << 4, eight_rows = (unsigned)(p.b >> 32 & 0x3fff) << 4;
    const bool swizzled = p.b >> 62 == 1;
    for (int t = 0; t < p.tiles; t++)
        for (int i = 0; i < 4; i++) {
            const int row = g + i / 2 * 8, column = 2 * q + i % 2;
            float sum = p.d[t * 4 + i];
            for (int k = 0; k < 16; k++) {
                unsigned at = start + t * eight_rows + column * 128 + k * 2;
                if (swizzled) at ^= (at >> 7 & 7) << 4;
                unsigned short b;
                memcpy(&b, (const unsigned char *)shared_memory + at, 2);
                sum = fmaf(bf16_value(a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k % 2), bf16_value(b, 0), sum);
            }
            p.d[t * 4 + i] = sum;
        }
}
template <int TILES> inline void wgmma(float (&d)[TILES][4], const uint4 &a, unsigned long long b)
{
    const Product product = {&d[0][0], &a, b, TILES};
    if (at_once) multiply_now(product);
    else current->open_products.push_back(product);
}
inline void commit_products()
{
    current->committed_products.push_back(current->open_products);
    current->open_products.clear();
}
template <int PENDING> inline void wait_products()
{
    if (skip_waits & 2) return;
    while ((int)current->committed_products.size() > PENDING) {
        for (const Product &product : current->committed_products.front()) multiply_now(product);
        current->committed_products.pop_front();
    }
}

inline uint4 load_once(const uint4 *p) { return *p; }
inline unsigned long long nanoseconds() { return ++clock_ns; }
