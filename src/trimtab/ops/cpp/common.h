// What all kernels share. Plain C++ without headers of torch: built in seconds with whatever compiler there is, and called through ctypes
// with addresses of tensors. Values are float or bfloat16 (its bits), arithmetic is in float, loops are written for the compiler to
// vectorise.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
typedef uint16_t bf16;

static inline float up(float v) { return v; }
static inline float up(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline void down(float f, float* p) { *p = f; }
static inline void down(float f, bf16* p) {  // to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *p = (bits & 0x7fffffffu) > 0x7f800000u ? bf16(0x7fc0) : bf16(rounded);
}
template <class V> static inline float rounded(float f) {
    V v;
    down(f, &v);
    return up(v);
}

// A thread's memory, kept between calls: fresh pages would cost more than the arithmetic.
struct Scratch {
    std::unique_ptr<char[]> memory;
    size_t size = 0, used = 0;
    void reserve(size_t bytes) {
        if (bytes + 64 > size) memory.reset(new char[size = bytes + 64]);
        used = -size_t(memory.get()) % 64;
    }
    template <class X> X* take(int64_t count) {
        X* found = (X*)(memory.get() + used);
        used += (count * sizeof(X) + 63) / 64 * 64;
        return found;
    }
};

// Ask for memory that is read soon.
static inline void fetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.69314718055994531f;

// e^(x - k ln2) for the whole number k nearest to x / ln2, a polynomial on [-ln2/2, ln2/2]; F: a float, or several.
template <class F> static inline F exp_rest(F x, F k) {
    const F r = x - k * 0.693359375f + k * 2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// e^x to 2 ulp; below -87 it is 0, above 88 it stays.
static inline float fast_exp(float x) {
    const float clipped = std::min(std::max(x, -87.0f), 88.0f), k = std::nearbyint(clipped * LOG2_E);
    int32_t bits = (int32_t(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : exp_rest(clipped, k) * scale;
}

#ifdef __AVX512BF16__
// 2^x to 1e-7; 0 far below.
static inline __m512 power_of_two(__m512 x) {
    const __m512 k = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, k);
    __m512 p = _mm512_set1_ps(1.3266970e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6754597e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507426e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022122e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314695e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, k);
}

// Two rows of 32 as pairs (a[i], b[i]): `half` 0 the first 16, 1 the others.
static inline __m512i interleaved(__m512i a, __m512i b, int half) {
    alignas(64) static const int16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(order[half]), b);
}

// Rows and columns of 16 x 16 words change places.
static inline void transpose(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        r[c] = _mm512_shuffle_i32x4(a, b, 0x88), r[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88), r[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
}
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES 1
// Loads of tiles and of their shapes do not tell the compiler what they read: what was written must be in memory before.
static inline void written() { asm volatile("" ::: "memory"); }

// The shapes of the calling thread's tiles, 16 rows of 64 bytes by default. Whoever loads them ends with _tile_release.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    void shape(int tile, int64_t height, int64_t width) { rows[tile] = uint8_t(height), bytes[tile] = uint16_t(width); }
    void load() const {
        written();
        _tile_loadconfig(this);
    }
};
#endif

// An exported kernel for each type of value, under the names that native.py asks for.
#define FOR_EACH(NAME, PARAMETERS, ...)                                                   \
    void NAME##_f32 PARAMETERS { typedef float V; __VA_ARGS__; }                          \
    void NAME##_bf16 PARAMETERS { typedef bf16 V; __VA_ARGS__; }
