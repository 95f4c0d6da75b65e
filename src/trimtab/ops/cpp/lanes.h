// Floats in registers as wide as the processor's, for loops that convert: left to itself GCC uses half of AVX-512, and rounds to bfloat16
// in seven instructions where there is one (which takes denormal numbers for zero).

#pragma once

#include "common.h"

namespace {

#if defined(__AVX512BF16__)
#define REGISTER 64
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16
#endif
typedef float Lanes __attribute__((vector_size(REGISTER)));
typedef uint32_t Bits __attribute__((vector_size(REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));
constexpr int64_t WIDE = REGISTER / 4;

inline Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
#ifdef __AVX512BF16__
inline Lanes widened(__m256i half) { return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }
inline __m256i halved(Lanes v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
inline Lanes load(const bf16* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, Lanes v) { _mm256_storeu_si256((__m256i*)p, halved(v)); }
#else
inline Lanes widened(Halves half) { return (Lanes)(__builtin_convertvector(half, Bits) << 16); }
inline Halves halved(Lanes v) {
    const Bits bits = (Bits)v, even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : even, Halves);
}
inline Lanes load(const bf16* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return widened(v);
}
inline void store(bf16* p, Lanes v) {
    const Halves half = halved(v);
    std::memcpy(p, &half, sizeof half);
}
#endif
// The first n lanes; the rest are zeros, and are not written.
template <class V> inline Lanes load(const V* p, int64_t n) {
    if (n == WIDE) return load(p);
    V all[WIDE] = {};
    std::memcpy(all, p, n * sizeof(V));
    return load(all);
}
template <class V> inline void store(V* p, Lanes v, int64_t n) {
    if (n == WIDE) return store(p, v);
    V all[WIDE];
    store(all, v);
    std::memcpy(p, all, n * sizeof(V));
}
template <class V> inline Lanes rounded(Lanes v) { return sizeof(V) == 2 ? widened(halved(v)) : v; }
inline float total(Lanes v) {
    float sum = 0;
    for (int i = 0; i < WIDE; i++) sum += v[i];
    return sum;
}
// step(i, n) for each run of n <= WIDE places.
template <class Step> inline __attribute__((always_inline)) void in_lanes(int64_t width, Step step) {
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE) step(i, WIDE);
    if (i < width) step(i, width - i);
}

}  // namespace
