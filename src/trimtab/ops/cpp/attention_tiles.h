// What the attention of attention.cpp is made of: products of 32 x 32 on matrix tiles, or where the processor has none in its wide registers,
// and the layouts that both read.
//
// A tile holds 16 rows of 64 bytes. A product adds a left side, 16 rows of 32 bfloat16, times a right side, 32 rows of 16 that lie in pairs
// (two rows' values of a column side by side), to 16 x 16 floats. Nothing here knows of queries or keys.

#pragma once

#include "common.h"

#ifdef __AVX512BF16__
namespace {

constexpr int64_t BLOCK = 32, TILE = 16, WHOLE = TILE * BLOCK;  // a tile holds 16 x 16 floats, or 16 rows of 32 bfloat16

thread_local Scratch scratch;

inline int64_t whole_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline void save(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
inline __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void copy(const bf16* from, int64_t D, bf16* to) {
    for (int64_t d = 0; d < D; d += BLOCK) save(to + d, load(from + d));
}

inline __m512i pairs(__m512 a, __m512 b) {  // two rows of 16
    alignas(64) static const int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(load(order), narrow(a, b));
}

// What a multiplication reads, made of rows [32, D] that lie one after the other:
// their transpose in pairs, a right side whose columns are the rows: [2][D / 32][16 pairs][16 rows][2];
inline void columns(const bf16* rows, int64_t D, bf16* to) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t d = 0; d < D; d += BLOCK, to += WHOLE) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = load(rows + (half * TILE + i) * D + d);
            transpose(r);
            for (int i = 0; i < 16; i++) save(to + i * BLOCK, r[i]);
        }
}
// a right side of which they are the rows (`turned` false): [D / 16][16 pairs][16 columns][2];
// or their transpose as a left side (`turned`): [D / 16][16 columns][32 rows].
template <bool turned> inline void paired(const bf16* rows, int64_t D, bf16* to) {
    for (int64_t d = 0; d < D; d += BLOCK)
        for (int half = 0; half < 2; half++, to += WHOLE) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = interleaved(load(rows + 2 * i * D + d), load(rows + (2 * i + 1) * D + d), half);
            if (turned) transpose(r);
            for (int i = 0; i < 16; i++) save(to + i * BLOCK, r[i]);
        }
}

#ifdef TILES
// Products run while one of these lives, on its thread.
struct Multiplying {
    Multiplying() { TileConfig().load(); }
    ~Multiplying() { _tile_release(); }
};

// c [32 x 32 floats] = (c +) the sum over `steps` of (a0 over a1) (b0 | b1).
template <bool adds>
inline void multiply(const bf16* a0, const bf16* a1, int64_t a_row, int64_t a_step, const bf16* b0, const bf16* b1, int64_t b_step,
                     int64_t steps, float* c, int64_t c_row) {
    written();
    float* lower = c + TILE * c_row;
    if (adds) {
        _tile_loadd(0, c, c_row * 4);
        _tile_loadd(1, c + TILE, c_row * 4);
        _tile_loadd(2, lower, c_row * 4);
        _tile_loadd(3, lower + TILE, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++) {
        _tile_loadd(4, a0 + i * a_step, a_row * 2);
        _tile_loadd(6, b0 + i * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + i * b_step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1 + i * a_step, a_row * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    _tile_stored(1, c + TILE, c_row * 4);
    _tile_stored(2, lower, c_row * 4);
    _tile_stored(3, lower + TILE, c_row * 4);
}
#else
struct Multiplying {
    ~Multiplying() {}
};

// Eight of the rows: 16 sums stay in registers, which hides how long one of their additions takes.
template <bool adds>
inline void multiply_rows(const bf16* a, int64_t a_row, int64_t a_step, const bf16* b0, const bf16* b1, int64_t b_step, int64_t steps, float* c,
                          int64_t c_row) {
    __m512 sums[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) sums[i][j] = adds ? _mm512_loadu_ps(c + i * c_row + j * TILE) : _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; k++, a += a_step, b0 += b_step, b1 += b_step)
#pragma GCC unroll 16
        for (int p = 0; p < 16; p++) {
            const __m512bh low = (__m512bh)load(b0 + p * BLOCK), high = (__m512bh)load(b1 + p * BLOCK);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                int32_t two;
                std::memcpy(&two, a + i * a_row + 2 * p, 4);
                const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, low);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], left, high);
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(c + i * c_row + j * TILE, sums[i][j]);
}

template <bool adds>
inline void multiply(const bf16* a0, const bf16* a1, int64_t a_row, int64_t a_step, const bf16* b0, const bf16* b1, int64_t b_step,
                     int64_t steps, float* c, int64_t c_row) {
    for (int i = 0; i < 32; i += 8)
        multiply_rows<adds>((i < 16 ? a0 : a1) + i % 16 * a_row, a_row, a_step, b0, b1, b_step, steps, c + i * c_row, c_row);
}
#endif

}  // namespace
#endif
