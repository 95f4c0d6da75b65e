// Products with quantised matrices for few rows, and tiles of such matrices for products of many rows.

#include "quantized_formats.h"
#ifdef TILES
#include "attention_tiles.h"
#elif defined(__AVX512BF16__)
#include "attention_chunks.h"
#endif

#ifdef __AVX512BF16__
namespace {

constexpr int64_t PANEL = 32;  // outputs whose numbers are decoded for several rows

// Whether this process may use the instructions that the products of bfloat16 are made of.
inline bool multiplies() {
#ifdef TILES
    return may_tile();
#else
    return true;
#endif
}

// Call f with the matrix in its format; false where it has none.
template <class Use> bool with_format(const Quantized& W, Use use) {
    const auto as = [&](auto&& format) { return use(format), true; };
    switch (W.kind) {
        case CODE4: return W.I % W.block || W.block % 64 ? false : as(FormatCode4(W));
        case INT8: return as(FormatInt8(W));
        case FP8: return W.block % 32 ? false : as(FormatFp8(W));
        case INT4: return W.block % 32 ? false : W.block % 64 ? as(FormatInt4<true>(W)) : as(FormatInt4<false>(W));
        case MXFP4: return as(FormatMxfp4(W));
        case INT8_GROUPS: return W.block % 32 ? false : as(FormatInt8Groups(W));
        case Q4_0: return as(FormatQ4_0(W));
        case Q8_0: return as(FormatQ8_0(W));
        case Q4_K: return as(FormatQ4_K(W));
        case Q6_K: return as(FormatQ6_K(W));
        case DENSE: return as(FormatRows{(const bf16*)W.part[0], W.I, (const char*)W.part[0], 0});
    }
    return false;
}

template <class F> inline int64_t whole_runs(int64_t K) { return (K + F::RUN - 1) / F::RUN * F::RUN; }

// Rows of x as the format's numbers come out, and zeros up to a whole run.
template <class F> void arrange(const bf16* x, int64_t stride, int64_t T, int64_t K, bf16* to) {
    const int64_t padded = whole_runs<F>(K);
    for (int64_t t = 0; t < T; t++, to += padded) {
        std::memcpy(to, x + t * stride, K * sizeof(bf16));
        std::memset(to + K, 0, (padded - K) * sizeof(bf16));
        if (F::QUADS)
            for (int64_t k = 0; k < padded; k += 128) into_quads(to + k, to + k);
    }
}

// Row o decoded to `to`, whole runs, in the format's order.
template <class F> inline void decode_row(F& f, int64_t o, int64_t slot, int64_t K, bf16* to) {
    const auto row = f.row(o, slot);
    for (int64_t k = 0; k < K; k += F::RUN) {
        __m512i w[F::RUN / 32];
        f.decode(row, k, K - k, w);
#pragma GCC unroll 8
        for (int i = 0; i < F::RUN / 32; i++) _mm512_storeu_si512(to + k + 32 * i, w[i]);
    }
}

thread_local Scratch quantized_scratch;

#ifdef TILES
// The numbers of 32 outputs are decoded and multiplied with rows of x on matrix tiles, as `tiles.cpp` does with its blocks.
template <class L, class F>
INLINE void products_by(F& f, const Quantized& W, const bf16* x, int64_t x_stride, const bf16* bias, bf16* y, int64_t y_stride, int64_t T) {
    const int64_t padded = whole_runs<F>(W.I), steps = padded / 32, blocks = (T + 31) / 32, panels = (W.O + PANEL - 1) / PANEL;
    Scratch& memory = quantized_scratch;
    memory.reserve((2 * blocks * 32 + PANEL) * padded * sizeof(bf16) + 32 * 32 * 4 + 512);
    bf16 *rows = memory.take<bf16>(blocks * 32 * padded), *right = memory.take<bf16>(blocks * 32 * padded), *panel = memory.take<bf16>(PANEL * padded);
    float* sums = memory.take<float>(32 * 32);
    Multiplying multiplying;
    L loop(panels, 8 * W.I * std::min<int64_t>(T, 32));
    int64_t from, to;
    bool more = loop.next(from, to);
    if (more) {
        arrange<F>(x, x_stride, T, W.I, rows);
        std::memset(rows + T * padded, 0, (blocks * 32 - T) * padded * sizeof(bf16));
        for (int64_t m = 0; m < blocks; m++) columns(rows + m * 32 * padded, padded, right + m * 32 * padded);
    }
    for (; more; more = loop.next(from, to))
        for (int64_t p = from; p < to; p++) {
            const int64_t first = p * PANEL, count = std::min(PANEL, W.O - first);
            for (int64_t i = 0; i < PANEL; i++) decode_row(f, first + std::min(i, count - 1), 0, W.I, panel + i * padded);
            for (int64_t m = 0; m < blocks; m++) {
                const bf16* b = right + m * 32 * padded;
                multiply<false>(panel, panel + 16 * padded, padded, 32, b, b + 16 * padded, WHOLE, steps, sums, 32);
                written();
                for (int64_t t = m * 32; t < std::min(T, m * 32 + 32); t++)
                    for (int64_t i = 0; i < count; i++)
                        down(sums[i * 32 + t % 32] + (bias ? up(bias[first + i]) : 0.0f), y + t * y_stride + first + i);
            }
        }
}
#else
// y of R rows of x, 1, 2 or 4, for the next `count` outputs of 16 / R. x is arranged.
template <int R, class F>
INLINE void dots(F& f, int64_t o, int64_t count, int64_t K, const bf16* x, int64_t x_stride, const bf16* bias, bf16* y, int64_t y_stride) {
    constexpr int64_t OUTPUTS = 16 / R;
    __m512 sums[16];  // [R][OUTPUTS]
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t first = 0; first < count; first += 4) {
        __m512 sum[4][R];
        decltype(f.row(o, 0)) row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            row[i] = f.row(o + std::min(first + i, count - 1), first + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[i][r] = _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < K; k += F::RUN)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i w[F::RUN / 32];
                f.decode(row[i], k, K - k, w);
#pragma GCC unroll 8
                for (int j = 0; j < F::RUN / 32; j++)
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], (__m512bh)w[j], bits(x + r * x_stride + k + 32 * j));
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r * OUTPUTS + first + i] = sum[i][r];
    }
    __m512 ordered[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) ordered[i] = sums[SUMMED[i]];
    __m512 found = sums_of(ordered);
    if (bias) {
        bf16 added[16] = {};
        for (int r = 0; r < R; r++) std::memcpy(added + r * OUTPUTS, bias + o, count * sizeof(bf16));
        found = _mm512_add_ps(found, widened(_mm256_loadu_si256((const __m256i*)added)));
    }
    bf16 made[16];
    _mm256_storeu_si256((__m256i*)made, (__m256i)_mm512_cvtneps_pbh(found));
    for (int r = 0; r < R; r++)
        if (count == OUTPUTS)
            std::memcpy(y + r * y_stride + o, made + r * OUTPUTS, OUTPUTS * sizeof(bf16));
        else
            std::memcpy(y + r * y_stride + o, made + r * OUTPUTS, count * sizeof(bf16));
}

// One row of x is multiplied with numbers as they come out of the registers; for several, those of four outputs are decoded to memory first.
template <class L, class F>
INLINE void products_by(F& f, const Quantized& W, const bf16* x, int64_t x_stride, const bf16* bias, bf16* y, int64_t y_stride, int64_t T) {
    const int64_t K = W.I, padded = whole_runs<F>(K), passes = std::max<int64_t>(1, (T + 3) / 4), stride = F::DECODED ? K : padded;
    Scratch& memory = quantized_scratch;
    memory.reserve((T + 4) * padded * sizeof(bf16) + 256);
    bf16 *rows = memory.take<bf16>(T * padded), *panel = memory.take<bf16>(4 * padded);
    int64_t from, to;
    if constexpr (F::RUN <= 128 && !F::DECODED)
        if (T == 1) {
            L loop((W.O + 15) / 16, 16 * 4 * K);
            bool more = loop.next(from, to);
            if (more) arrange<F>(x, x_stride, T, K, rows);
            for (; more; more = loop.next(from, to)) {
                const int64_t end = std::min(W.O, 16 * to);
                for (int64_t o = 16 * from; o < end; o += 16) dots<1>(f, o, std::min<int64_t>(16, end - o), K, rows, padded, bias, y, y_stride);
            }
            return;
        }
    L loop((W.O + 3) / 4, 4 * (T + 3) * K);
    bool more = loop.next(from, to);
    if (more) arrange<F>(x, x_stride, T, K, rows);
    for (; more; more = loop.next(from, to))
        for (int64_t o = 4 * from; o < 4 * to; o += 4) {
            const int64_t count = std::min<int64_t>(4, W.O - o);
            const bf16 *four = panel, *b = bias ? bias + o : nullptr;
            if constexpr (F::DECODED)
                four = f.row(o, 0);
            else
                for (int64_t i = 0; i < count; i++) decode_row(f, o + i, 0, K, panel + i * padded);
            FormatRows all{four, stride, (const char*)(four + (F::DECODED ? 4 * K : 0)), F::DECODED ? 64 / passes : 0};
            int64_t t = 0;
            for (; t + 4 <= T; t += 4) dots<4>(all, 0, count, stride, rows + t * padded, padded, b, y + t * y_stride + o, y_stride);
            if (t + 2 <= T) dots<2>(all, 0, count, stride, rows + t * padded, padded, b, y + t * y_stride + o, y_stride), t += 2;
            if (t < T) dots<1>(all, 0, count, stride, rows + t * padded, padded, b, y + t * y_stride + o, y_stride);
        }
}
#endif

template <class F>
__attribute__((noinline)) void crew_products(F& f, const Quantized& W, const bf16* x, int64_t x_stride, const bf16* bias, bf16* y, int64_t y_stride,
                                             int64_t T) {
    products_by<Takings>(f, W, x, x_stride, bias, y, y_stride, T);
}

template <class F>
__attribute__((noinline)) void products(F& f, const Quantized& W, const bf16* x, int64_t x_stride, const bf16* bias, bf16* y, int64_t y_stride, int64_t T) {
    if (in_crew()) return crew_products(f, W, x, x_stride, bias, y, y_stride, T);
    products_by<Part>(f, W, x, x_stride, bias, y, y_stride, T);
}

// Rows of a tile, their numbers in order.
template <class F>
void decode_tile(F& f, const Quantized& W, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* to, int64_t stride) {
    share(rows, 4 * columns, [&](int64_t i) {
        const auto from = f.row(row + i, 0);
        bf16* line = to + i * stride;
        for (int64_t k = 0; k < columns; k += F::RUN) {
            __m512i w[F::RUN / 32];
            f.decode(from, column + k, W.I - column - k, w);
            if constexpr (F::QUADS) out_of_quads(w);
#pragma GCC unroll 8
            for (int j = 0; j < F::RUN / 32; j++)
                if (k + 32 * j < columns) _mm512_mask_storeu_epi16(line + k + 32 * j, first_lanes(columns - k - 32 * j), w[j]);
        }
    });
}

}  // namespace
#endif

namespace {

// Not inlined: in two places GCC might add in two orders, and a row's result would depend on who computes it and beside what.
__attribute__((noinline)) float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += a[k] * b[k];
    return sum;
}

template <class V> void plain_product(const Quantized& W, const V* x, int64_t x_stride, const V* bias, V* y, int64_t y_stride, int64_t T) {
    std::vector<float> row(W.I), wide;
    share(W.O, W.I * (T + 8), [&](int64_t o) {
        if (wide.empty()) {
            wide.resize(T * W.I);
            for (int64_t t = 0; t < T; t++)
                for (int64_t k = 0; k < W.I; k++) wide[t * W.I + k] = up(x[t * x_stride + k]);
        }
        plain_row(W, o, 0, W.I, row.data());
        for (int64_t k = 0; k < W.I; k++) row[k] = rounded<V>(row[k]);
        for (int64_t t = 0; t < T; t++) {
            const float sum = dot(wide.data() + t * W.I, row.data(), W.I);
            down(sum + (bias ? up(bias[o]) : 0.0f), y + t * y_stride + o);
        }
    });
}

template <class V>
void plain_dense(const Quantized& W, int64_t row, int64_t rows, int64_t column, int64_t columns, V* to, int64_t stride) {
    std::vector<float> line(columns);
    share(rows, 8 * columns, [&](int64_t i) {
        plain_row(W, row + i, column, columns, line.data());
        for (int64_t k = 0; k < columns; k++) down(line[k], to + i * stride + k);
    });
}

}  // namespace

template <class V>
void quantized_product(const Quantized& W, const V* x, int64_t x_stride, const V* bias, V* y, int64_t y_stride, int64_t T) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(V) == 2)
        if (multiplies() && with_format(W, [&](auto& f) { products(f, W, x, x_stride, bias, y, y_stride, T); })) return;
#endif
    plain_product(W, x, x_stride, bias, y, y_stride, T);
}

template <class V>
void quantized_dense(const Quantized& W, int64_t row, int64_t rows, int64_t column, int64_t columns, V* to, int64_t stride) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(V) == 2)
        if (with_format(W, [&](auto& f) { decode_tile(f, W, row, rows, column, columns, to, stride); })) return;
#endif
    plain_dense(W, row, rows, column, columns, to, stride);
}

void project(const Projection& p, const bf16* x, int64_t x_stride, bf16* y, int64_t y_stride, int64_t T) {
    const bf16* bias = p.bias;
    for (int64_t i = 0; i < p.count; i++) {
        const Quantized& W = p.each[i];
#ifdef TILES
        if (W.kind == TILED) matmul(x, x_stride, (const bf16*)W.part[0], bias, y, y_stride, T, W.I, W.O);
#endif
        if (W.kind != TILED) quantized_product(W, x, x_stride, bias, y, y_stride, T);
        y += W.O;
        if (bias) bias += W.O;
    }
}

extern "C" {

void project_bf16(void* p, void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t T) {
    as_team(true, [=] { project(*(const Projection*)p, (const bf16*)x, x_stride, (bf16*)y, y_stride, T); });
}

FOR_EACH(quantized_product, (void* W, void* x, int64_t x_stride, void* bias, void* y, int64_t y_stride, int64_t T),
         as_team(true, [=] { quantized_product(*(const Quantized*)W, (const V*)x, x_stride, (const V*)bias, (V*)y, y_stride, T); }))

FOR_EACH(quantized_dense, (void* W, int64_t row, int64_t rows, int64_t column, int64_t columns, void* to, int64_t stride),
         as_team(rows > 1, [=] { quantized_dense(*(const Quantized*)W, row, rows, column, columns, (V*)to, stride); }))
}
