// Low-rank edits of bfloat16 rows on matrix tiles: x A^T and t B for up to 16 rows of one adapter at a time.
//
// What a row gives is the same to the last bit however many rows are computed beside it: sums run in one order, and where tiles do not pay
// the registers add as tiles do, even and odd terms of 32 apart.

#pragma once

#include "inference.h"

#ifdef TILES
// One thread's rows of one adapter. I is a multiple of 32; R at most `ranks`.
class TiledRows {
  public:
    static const int64_t most = 16;

    TiledRows(int64_t I, int64_t ranks)
        : I(I), padded((ranks + 31) / 32 * 32), pairs(new (std::align_val_t(64)) bf16[16 * I]), f(new float[16 * padded]),
          t(new (std::align_val_t(64)) bf16[16 * padded]) {}
    ~TiledRows() {
        _tile_release();
        operator delete[](pairs, std::align_val_t(64)), delete[] f, operator delete[](t, std::align_val_t(64));
    }

    // Take up n <= 16 rows of x.
    void take(const bf16* x, int64_t stride, int64_t count) {
        n = count;
        operand = x;
        if (n == 1) return;  // tiles read one row as it lies
        operand = pairs;
        for (int64_t i = 0; i < I; i += 32) {
            __m512i r[16];
            for (int64_t m = 0; m < 16; m++) r[m] = m < n ? _mm512_loadu_si512(x + m * stride + i) : _mm512_setzero_si512();
            transpose(r);
            for (int64_t m = 0; m < 16; m++) _mm512_store_si512(pairs + 16 * i + 32 * m, r[m]);
        }
    }

    // Row m's x A^T is then at shrunk(m). ahead: an A of this rank that is wanted next, or null.
    void shrink(const bf16* A, int64_t R, const bf16* ahead) {
        alignas(64) float sums[4][256];
        const int64_t width = n == 1 ? 4 : 64, step = n == 1 ? 32 : 512, steps = I / 32, words = n == 1 ? 1 : 16;
        for (int64_t r = 0; r < R; r += 16) {
            const int64_t rows = std::min<int64_t>(16, R - r);
            configure(rows * 64 + width, [&](TileConfig& c) {
                for (int i = 0; i < 4; i++) c.shape(i, rows, width);
                for (int i = 4; i < 6; i++) c.shape(i, rows, 64), c.shape(i + 2, 16, width);
            });
            const bf16* a = A + r * I;
            const char* next = ahead ? (const char*)(ahead + r * I) : nullptr;
            const int64_t part = rows * 64;  // bytes of each step
#define STEP(SUM, LEFT, RIGHT, K)                               \
    if (next) fetch(next + (K) * part, part);                   \
    _tile_loadd(RIGHT, operand + (K) * step, width);            \
    _tile_loadd(LEFT, a + (K) * 32, I * 2);                     \
    _tile_dpbf16ps(SUM, LEFT, RIGHT)
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            int64_t k = 0;
            for (; k + 4 <= steps; k += 4) {
                STEP(0, 4, 6, k);
                STEP(1, 5, 7, k + 1);
                STEP(2, 4, 6, k + 2);
                STEP(3, 5, 7, k + 3);
            }
            if (k < steps) { STEP(0, 4, 6, k); }
            if (k + 1 < steps) { STEP(1, 5, 7, k + 1); }
            if (k + 2 < steps) { STEP(2, 4, 6, k + 2); }
#undef STEP
            _tile_stored(0, sums[0], width);
            _tile_stored(1, sums[1], width);
            _tile_stored(2, sums[2], width);
            _tile_stored(3, sums[3], width);
            __m512 total[16];
            for (int64_t i = 0; i < words; i++) {
                const __m512 a = _mm512_add_ps(_mm512_load_ps(sums[0] + 16 * i), _mm512_load_ps(sums[1] + 16 * i));
                total[i] = _mm512_add_ps(a, _mm512_add_ps(_mm512_load_ps(sums[2] + 16 * i), _mm512_load_ps(sums[3] + 16 * i)));
            }
            if (n > 1) {
                for (int64_t i = rows; i < 16; i++) total[i] = _mm512_setzero_ps();
                transpose((__m512i*)total);
            }
            for (int64_t m = 0; m < n; m++) _mm512_storeu_ps(f + m * padded + r, total[m]);
        }
    }
    float* shrunk(int64_t m) { return f + m * padded; }

    // y[m] += shrunk(m) B, rounded to bfloat16 first as the result of a matmul would be; B [R, O]. ahead: a B that is wanted next, or null.
    void expand(const bf16* B, int64_t R, int64_t O, bf16* y, int64_t y_stride, const bf16* ahead) {
        for (int64_t m = 0; m < n; m++) {
            float* row = shrunk(m);
            for (int64_t r = R; r < padded; r++) row[r] = 0;
            for (int64_t r = 0; r < padded; r += 32)
                store(t + m * padded + r, _mm512_loadu_ps(row + r), _mm512_loadu_ps(row + r + 16));
        }
        if (n < 4)
            for (int64_t m = 0; m < n; m++) expand_row(t + m * padded, shrunk(m), B, R, O, y + m * y_stride, m ? nullptr : ahead);
        else
            expand_rows(B, R, O, y, y_stride);
    }

  private:
    const int64_t I, padded;
    bf16 *const pairs;  // [I / 2][16 rows][2]
    float *const f;
    bf16 *const t;
    int64_t n = 0, configured = -1;
    const bf16* operand = nullptr;
    TileConfig config;

    template <class Shapes> void configure(int64_t key, Shapes shapes) {
        if (key == configured) return;
        shapes(config);
        config.load();
        configured = key;
    }

    static void expand_row(const bf16* rounded, float* f, const bf16* B, int64_t R, int64_t O, bf16* y, const bf16* ahead) {
        for (int64_t r = 0; r < R; r++) f[r] = up(rounded[r]);
        const __m512i upper = _mm512_set1_epi32(0xffff0000);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                               3, 18, 2, 17, 1, 16, 0);
        for (int64_t o = 0; o < O; o += 32) {
            const __mmask32 mask = first_lanes(O - o);
            if (ahead) fetch(ahead + R * o, R * 64);
            __m512 even = _mm512_setzero_ps(), odd = even;  // outputs of even and of odd number
            for (int64_t block = 0; block < R; block += 32) {
                __m512 e[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, d[2] = {e[0], e[0]};
                const int64_t end = std::min(R, block + 32);
                for (int64_t r = block; r < end; r++) {
                    const __m512i b = _mm512_maskz_loadu_epi16(mask, B + r * O + o);
                    const __m512 by = _mm512_set1_ps(f[r]);
                    e[r & 1] = _mm512_fmadd_ps(by, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), e[r & 1]);
                    d[r & 1] = _mm512_fmadd_ps(by, _mm512_castsi512_ps(_mm512_and_si512(b, upper)), d[r & 1]);
                }
                even = _mm512_add_ps(even, _mm512_add_ps(e[0], e[1]));
                odd = _mm512_add_ps(odd, _mm512_add_ps(d[0], d[1]));
            }
            const __m512i to = _mm512_maskz_loadu_epi16(mask, y + o);
            even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(to, 16)));
            odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(to, upper)));
            _mm512_mask_storeu_epi16(y + o, mask, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
        }
    }

    void expand_rows(const bf16* B, int64_t R, int64_t O, bf16* y, int64_t y_stride) {
        const int64_t height = R <= 32 ? (R + 1) / 2 : 16;
        configure(4096 + n * 64 + height, [&](TileConfig& c) {
            for (int i = 0; i < 2; i++) c.shape(i, n, 64), c.shape(i + 3, height, 64);
            c.shape(2, n, 4 * height);
        });
        alignas(64) bf16 left[512], right[512];
        alignas(64) float sums[16 * 32];
        for (int64_t o = 0; o < O; o += 32) {
            const __mmask32 mask = first_lanes(O - o);
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t block = 0; block < R; block += 32) {
                for (int64_t p = 0; p < height; p++) {
                    const int64_t r = block + 2 * p;
                    const __m512i a = r < R ? _mm512_maskz_loadu_epi16(mask, B + r * O + o) : _mm512_setzero_si512();
                    const __m512i b = r + 1 < R ? _mm512_maskz_loadu_epi16(mask, B + (r + 1) * O + o) : _mm512_setzero_si512();
                    _mm512_store_si512(left + 32 * p, interleaved(a, b, 0));
                    _mm512_store_si512(right + 32 * p, interleaved(a, b, 1));
                }
                _tile_loadd(2, t + block, padded * 2);
                _tile_loadd(3, left, 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, right, 64);
                _tile_dpbf16ps(1, 2, 4);
            }
            _tile_stored(0, sums, 128);
            _tile_stored(1, sums + 16, 128);
            for (int64_t m = 0; m < n; m++) {
                bf16* to = y + m * y_stride + o;
                const __m512i v = _mm512_maskz_loadu_epi16(mask, to);
                const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + 32 * m), widened(_mm512_castsi512_si256(v)));
                const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + 32 * m + 16), widened(_mm512_extracti64x4_epi64(v, 1)));
                _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
        }
    }
};
#endif
