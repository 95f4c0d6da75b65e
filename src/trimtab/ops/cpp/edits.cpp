// Edits at inference, row by row: LoRA, IA3 and bottleneck adapters, each row with the factors of its own slot.
// T rows, I inputs, O outputs, R rank, S adapters.

#include "edit_tiles.h"

static inline int64_t most_ranks(const int32_t* rank, int64_t count) {
    int64_t most = 1;
    for (int64_t i = 0; i < count; i++) most = std::max<int64_t>(most, rank[i]);
    return most;
}

static inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// to[o] += sum over r of f[r] * B[r][o], for n outputs; f is rounded to V first, as the result of a matmul would be. ahead: another B of
// the same shape that is wanted next, or null.
static inline void expand(const float* f, const float* B, const float* ahead, int64_t R, int64_t O, float* to, int64_t n) {
    for (int64_t r = 0; r < R; r++) {
        if (ahead) fetch(ahead + r * O, n * sizeof(float));
#pragma omp simd
        for (int64_t o = 0; o < n; o++) to[o] += f[r] * B[r * O + o];
    }
}

#ifdef __AVX512BF16__
// f[m * f_stride + r] = A[r] x[m] for N rows of x. ahead: another A that is wanted next, or null.
template <int N>
static void shrink(const bf16* x, int64_t x_stride, const bf16* A, const bf16* ahead, int64_t R, int64_t I, float* f, int64_t f_stride) {
    for (int64_t r = 0; r < R; r++) {
        const bf16* a = A + r * I;
        if (ahead) fetch(ahead + r * I, I * sizeof(bf16));
        __m512 even[N], odd[N];
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) even[m] = odd[m] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 64 <= I; i += 64) {
            const __m512bh first = bits(a + i), second = bits(a + i + 32);
#pragma GCC unroll 4
            for (int m = 0; m < N; m++) {
                even[m] = _mm512_dpbf16_ps(even[m], first, bits(x + m * x_stride + i));
                odd[m] = _mm512_dpbf16_ps(odd[m], second, bits(x + m * x_stride + i + 32));
            }
        }
        for (; i < I; i += 32) {
            const __mmask32 mask = first_lanes(I - i);
            const __m512bh first = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i);
#pragma GCC unroll 4
            for (int m = 0; m < N; m++)
                even[m] = _mm512_dpbf16_ps(even[m], first, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * x_stride + i));
        }
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) f[m * f_stride + r] = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
    }
}

// y[m] += f[m] B for N rows of y and of f, which is rounded to bfloat16 first as the result of a matmul would be. ahead: another B of the
// same shape that is wanted next, or null. pairs [N, (R + 1) / 2]: memory.
template <int N>
static void expand(const float* f, int64_t f_stride, const bf16* B, const bf16* ahead, int64_t R, int64_t O, bf16* y, int64_t y_stride,
                   int32_t* pairs) {
    const int64_t half = (R + 1) / 2;
    for (int m = 0; m < N; m++)
        for (int64_t r = 0; r < R; r += 2) {
            bf16 two[2];
            down(f[m * f_stride + r], two), down(r + 1 < R ? f[m * f_stride + r + 1] : 0.0f, two + 1);
            std::memcpy(pairs + m * half + r / 2, two, 4);
        }
    for (int64_t o = 0; o < O; o += 32) {
        const __mmask32 mask = first_lanes(O - o);
        __m512 low[N], high[N];
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) low[m] = high[m] = _mm512_setzero_ps();
        for (int64_t r = 0; r < R; r += 2) {
            const bool odd = r + 1 < R;
            const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(mask, B + r * O + o);
            const __m512bh b = odd ? (__m512bh)_mm512_maskz_loadu_epi16(mask, B + (r + 1) * O + o) : a;
            const __m512bh left = lo(a, b), right = hi(a, b);
            if (ahead) fetch(ahead + r * O + o, 64), fetch(ahead + (r + odd) * O + o, 64);
#pragma GCC unroll 4
            for (int m = 0; m < N; m++) {
                const __m512bh weights = (__m512bh)_mm512_set1_epi32(pairs[m * half + r / 2]);
                low[m] = _mm512_dpbf16_ps(low[m], left, weights);
                high[m] = _mm512_dpbf16_ps(high[m], right, weights);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) {
            bf16* to = y + m * y_stride + o;
            const __m512i was = _mm512_maskz_loadu_epi16(mask, to);
            const __m512 y0 = widened(_mm512_castsi512_si256(was)), y1 = widened(_mm512_extracti64x4_epi64(was, 1));
            const __m512bh sum = _mm512_cvtne2ps_pbh(_mm512_add_ps(y1, second_half(low[m], high[m])), _mm512_add_ps(y0, first_half(low[m], high[m])));
            _mm512_mask_storeu_epi16(to, mask, (__m512i)sum);
        }
    }
}

#else
static inline float dot(const bf16* a, const bf16* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += up(a[i]) * up(b[i]);
    return sum;
}
static inline void expand(const float* f, const bf16* B, const bf16* ahead, int64_t R, int64_t O, bf16* to, int64_t n) {
    if (ahead) fetch(ahead, R * O * sizeof(bf16));
    float sums[512];
    for (int64_t from = 0; from < n; from += 512) {
        const int64_t m = std::min<int64_t>(512, n - from);
        for (int64_t o = 0; o < m; o++) sums[o] = up(to[from + o]);
        for (int64_t r = 0; r < R; r++) {
            const float g = rounded<bf16>(f[r]);
#pragma omp simd
            for (int64_t o = 0; o < m; o++) sums[o] += g * up(B[r * O + from + o]);
        }
        for (int64_t o = 0; o < m; o++) down(sums[o], to + from + o);
    }
}
#endif

// So many rows of one adapter at a time, where no tiles take them up: each of its factors is then read once for all of them.
const int64_t TOGETHER = 4;

// f[m * f_stride + r] = A[r] x[m] for n <= TOGETHER rows of x.
template <class V>
static inline void shrink_rows(int64_t n, const V* x, int64_t x_stride, const V* A, const V* ahead, int64_t R, int64_t I, float* f, int64_t f_stride) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(V) == 2) {
        constexpr decltype(&shrink<1>) of[] = {shrink<1>, shrink<2>, shrink<3>, shrink<4>};
        return of[n - 1](x, x_stride, A, ahead, R, I, f, f_stride);
    } else
#endif
        for (int64_t r = 0; r < R; r++) {
            if (ahead) fetch(ahead + r * I, I * sizeof(V));
            for (int64_t m = 0; m < n; m++) f[m * f_stride + r] = dot(A + r * I, x + m * x_stride, I);
        }
}

// y[m] += f[m] B for n <= TOGETHER rows of y, f rounded first. pairs [TOGETHER, (R + 1) / 2]: memory.
template <class V>
static inline void expand_rows(int64_t n, const float* f, int64_t f_stride, const V* B, const V* ahead, int64_t R, int64_t O, V* y, int64_t y_stride,
                               int32_t* pairs) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(V) == 2) {
        constexpr decltype(&expand<1>) of[] = {expand<1>, expand<2>, expand<3>, expand<4>};
        return of[n - 1](f, f_stride, B, ahead, R, O, y, y_stride, pairs);
    } else
#endif
        for (int64_t m = 0; m < n; m++) expand(f + m * f_stride, B, m ? nullptr : ahead, R, O, y + m * y_stride, O);
}

// Call f(first row, rows, slot, the slot that comes next or -1) for this thread's runs of at most `most` rows that share a slot. A crew cuts
// the rows into more parts than it has threads.
template <class F> static void each_run(const int32_t* slot, int64_t T, int64_t most, F f) {
    const int64_t parts = in_crew() ? std::min<int64_t>(T, 8) : omp_get_num_threads();
    share(parts, WHOLE_TAKING, [&](int64_t part) {
        const int64_t end = T * (part + 1) / parts;
        for (int64_t t = T * part / parts, n; t < end; t += n) {
            for (n = 1; n < most && t + n < end && slot[t + n] == slot[t];) n++;
            if (slot[t] >= 0) f(t, n, slot[t], t + n < end && slot[t + n] != slot[t] ? slot[t + n] : -1);
        }
    });
}

// For each part p: y[t, first[p]..] += (x[t] A^T) B^T with part p's A [R, I] and B^T [R, width[p]] of slot[t]; rows of slot -1 are left alone,
// and so are parts of rank 0. While a row is computed the factors of the thread's next row are fetched: each is read once a step, so that
// waiting for memory would be most of the time.
template <class V>
static void lora_by_row(const V* x, int64_t x_stride, V* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I) {
    const int64_t most = most_ranks(f.rank, f.parts * f.S);
    std::unique_ptr<float[]> shrunk(new float[TOGETHER * most]);
    std::unique_ptr<int32_t[]> pairs(new int32_t[TOGETHER * ((most + 1) / 2)]);
    each_run(slot, T, TOGETHER, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
        for (int64_t p = 0; p < f.parts; p++) {
            const int64_t i = p * f.S + s, j = p * f.S + next, R = f.rank[i];
            const bool ahead = next >= 0 && f.rank[j] >= R;
            if (!R) continue;
            shrink_rows(n, x + t * x_stride, x_stride, (const V*)f.A[i], ahead ? (const V*)f.A[j] : nullptr, R, I, shrunk.get(), most);
            expand_rows(n, shrunk.get(), most, (const V*)f.B[i], ahead ? (const V*)f.B[j] : nullptr, R, f.width[p], y + t * y_stride + f.first[p],
                        y_stride, pairs.get());
        }
    });
}

#ifdef TILES
static void lora_tiled(const bf16* x, int64_t x_stride, bf16* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I) {
    TiledRows rows(I, most_ranks(f.rank, f.parts * f.S));
    each_run(slot, T, TiledRows::most, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
        rows.take(x + t * x_stride, x_stride, n);
        for (int64_t p = 0; p < f.parts; p++) {
            const int64_t i = p * f.S + s, j = p * f.S + next, R = f.rank[i];
            if (!R) continue;
            const bool ahead = next >= 0 && f.rank[j] >= R;
            rows.shrink((const bf16*)f.A[i], R, ahead ? (const bf16*)f.A[j] : nullptr);
            rows.expand((const bf16*)f.B[i], R, f.width[p], y + t * y_stride + f.first[p], y_stride, ahead ? (const bf16*)f.B[j] : nullptr);
        }
    });
}
#endif

template <class V>
void lora(const V* x, int64_t x_stride, V* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I) {
#ifdef TILES
    if constexpr (sizeof(V) == 2)
        if (I % 32 == 0 && may_tile()) return lora_tiled(x, x_stride, y, y_stride, slot, f, T, I);
#endif
    lora_by_row(x, x_stride, y, y_stride, slot, f, T, I);
}
template void lora(const bf16*, int64_t, bf16*, int64_t, const int32_t*, const Lora&, int64_t, int64_t);

// x[t] *= 1 + g of slot[t]; rows of slot -1 are left alone, and those whose g is null.
template <class V>
void scale(V* x, int64_t stride, const int32_t* slot, const int64_t* g, int64_t T, int64_t width) {
    share(T, 2 * width, [=](int64_t t) {
        const float* by = slot[t] < 0 ? nullptr : (const float*)g[slot[t]];
        if (!by) return;
        V* row = x + t * stride;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) down(up(row[i]) * (1.0f + by[i]), row + i);
    });
}

template void scale(bf16*, int64_t, const int32_t*, const int64_t*, int64_t, int64_t);

// The numbers are those of `ACTIVATIONS`.
static inline float activate(int64_t kind, float x) {
    switch (kind) {
        case 0: return std::max(x, 0.0f);
        case 1: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case 2: return x / (1.0f + std::exp(-x));
        case 3: return std::tanh(x);
        case 4: return x > 0 ? x : 0.01f * x;
        case 5: return 1.0f / (1.0f + std::exp(-x));
        default: return x;
    }
}

template <class V> void Bottleneck::inside(int32_t s, float* hidden) const {
    for (int64_t r = 0; r < rank[s]; r++) hidden[r] = activate(kind, rounded<V>(hidden[r] + up(((const V*)d[s])[r])));
}
template <class V> void Bottleneck::bias(int32_t s, V* row, int64_t O) const {
    const V* add = (const V*)u[s];
    for (int64_t o = 0; o < O; o++) down(up(row[o]) + up(add[o]), row + o);
}

// y[t] += U f(D h[t] + d) + u with the tensors of slot[t]; rows of slot -1 are left alone, and of rank 0.
template <class V>
static void bottleneck_by_row(const V* h, int64_t h_stride, V* y, int64_t y_stride, const int32_t* slot, const Bottleneck& f, int64_t T,
                              int64_t I, int64_t O) {
    const int64_t most = most_ranks(f.rank, f.S);
    std::unique_ptr<float[]> hidden(new float[TOGETHER * most]);
    std::unique_ptr<int32_t[]> pairs(new int32_t[TOGETHER * ((most + 1) / 2)]);
    each_run(slot, T, TOGETHER, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
        const int64_t R = f.rank[s];
        if (!R) return;
        const bool ahead = next >= 0 && f.rank[next] >= R;
        shrink_rows(n, h + t * h_stride, h_stride, (const V*)f.D[s], ahead ? (const V*)f.D[next] : nullptr, R, I, hidden.get(), most);
        for (int64_t m = 0; m < n; m++) f.inside<V>(s, hidden.get() + m * most);
        expand_rows(n, hidden.get(), most, (const V*)f.U[s], ahead ? (const V*)f.U[next] : nullptr, R, O, y + t * y_stride, y_stride, pairs.get());
        for (int64_t m = 0; m < n; m++) f.bias(s, y + (t + m) * y_stride, O);
    });
}

template <class V>
void bottleneck(const V* h, int64_t h_stride, V* y, int64_t y_stride, const int32_t* slot, const Bottleneck& f, int64_t T, int64_t I, int64_t O) {
#ifdef TILES
    if constexpr (sizeof(V) == 2)
        if (I % 32 == 0 && may_tile()) {
            TiledRows rows(I, most_ranks(f.rank, f.S));
            return each_run(slot, T, TiledRows::most, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
                const int64_t R = f.rank[s];
                if (!R) return;
                const bool ahead = next >= 0 && f.rank[next] >= R;
                rows.take(h + t * h_stride, h_stride, n);
                rows.shrink((const V*)f.D[s], R, ahead ? (const V*)f.D[next] : nullptr);
                for (int64_t m = 0; m < n; m++) f.inside<V>(s, rows.shrunk(m));
                rows.expand((const V*)f.U[s], R, O, y + t * y_stride, y_stride, ahead ? (const V*)f.U[next] : nullptr);
                for (int64_t m = 0; m < n; m++) f.bias(s, y + (t + m) * y_stride, O);
            });
        }
#endif
    bottleneck_by_row(h, h_stride, y, y_stride, slot, f, T, I, O);
}
template void bottleneck(const bf16*, int64_t, bf16*, int64_t, const int32_t*, const Bottleneck&, int64_t, int64_t, int64_t);

extern "C" {

FOR_EACH(lora, (void* x, int64_t x_stride, void* y, int64_t y_stride, int32_t* slot, void* factors, int64_t T, int64_t I),
         as_team(T > 1, [=] { lora((const V*)x, x_stride, (V*)y, y_stride, slot, *(const Lora*)factors, T, I); }))

FOR_EACH(scale, (void* x, int64_t stride, int32_t* slot, int64_t* g, int64_t T, int64_t width),
         as_team(T > 1, [=] { scale((V*)x, stride, slot, g, T, width); }))

FOR_EACH(bottleneck,
         (void* h, int64_t h_stride, void* y, int64_t y_stride, int32_t* slot, void* tables, int64_t T, int64_t I, int64_t O),
         as_team(T > 1, [=] { bottleneck((const V*)h, h_stride, (V*)y, y_stride, slot, *(const Bottleneck*)tables, T, I, O); }))
}
