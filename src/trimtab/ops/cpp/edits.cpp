// Edits at inference, row by row: LoRA, IA3 and bottleneck adapters, each row with the factors of its own slot.
// T rows, I inputs, O outputs, R rank, S adapters.

#include <omp.h>

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
static inline float dot(const bf16* a, const bf16* b, int64_t n) {
    __m512 x = _mm512_setzero_ps(), y = x;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        x = _mm512_dpbf16_ps(x, bits(a + i), bits(b + i));
        y = _mm512_dpbf16_ps(y, bits(a + i + 32), bits(b + i + 32));
    }
    for (; i < n; i += 32) {
        const __mmask32 m = first_lanes(n - i);
        x = _mm512_dpbf16_ps(x, (__m512bh)_mm512_maskz_loadu_epi16(m, a + i), (__m512bh)_mm512_maskz_loadu_epi16(m, b + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(x, y));
}
static inline void expand(const float* f, const bf16* B, const bf16* ahead, int64_t R, int64_t O, bf16* to, int64_t n) {
    for (int64_t o = 0; o < n; o += 32) {
        const __mmask32 m = first_lanes(n - o);
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t r = 0; r < R; r += 2) {
            const bool odd = r + 1 < R;
            const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(m, B + r * O + o);
            const __m512bh b = odd ? (__m512bh)_mm512_maskz_loadu_epi16(m, B + (r + 1) * O + o) : a;
            const __m512bh weights = pair(f[r], odd ? f[r + 1] : 0.0f);
            if (ahead) fetch(ahead + r * O + o, 64), fetch(ahead + (r + odd) * O + o, 64);
            low = _mm512_dpbf16_ps(low, lo(a, b), weights);
            high = _mm512_dpbf16_ps(high, hi(a, b), weights);
        }
        const __m512i y = _mm512_maskz_loadu_epi16(m, to + o);
        const __m512 y0 = widened(_mm512_castsi512_si256(y));
        const __m512 y1 = widened(_mm512_extracti64x4_epi64(y, 1));
        const __m512bh sum = _mm512_cvtne2ps_pbh(_mm512_add_ps(y1, second_half(low, high)), _mm512_add_ps(y0, first_half(low, high)));
        _mm512_mask_storeu_epi16(to + o, m, (__m512i)sum);
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

// For each part p: y[t, first[p]..] += (x[t] A^T) B^T with part p's A [R, I] and B^T [R, width[p]] of slot[t]; rows of slot -1 are left alone,
// and so are parts of rank 0. While a row is computed the factors of the thread's next row are fetched: each is read once a step, so that
// waiting for memory would be most of the time.
template <class V>
static void lora_by_row(const V* x, int64_t x_stride, V* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I) {
    std::unique_ptr<float[]> shrunk(new float[most_ranks(f.rank, f.parts * f.S)]);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const int32_t s = slot[t];
        if (s < 0) continue;
        const int32_t next = t + 1 < T && slot[t + 1] != s ? slot[t + 1] : -1;
        for (int64_t p = 0; p < f.parts; p++) {
            const int64_t i = p * f.S + s, j = p * f.S + next, R = f.rank[i];
            const bool ahead = next >= 0 && f.rank[j] >= R;
            for (int64_t r = 0; r < R; r++) {
                if (ahead) fetch((const V*)f.A[j] + r * I, I * sizeof(V));
                shrunk[r] = dot((const V*)f.A[i] + r * I, x + t * x_stride, I);
            }
            if (R) expand(shrunk.get(), (const V*)f.B[i], ahead ? (const V*)f.B[j] : nullptr, R, f.width[p], y + t * y_stride + f.first[p], f.width[p]);
        }
    }
}

#ifdef TILES
// Call f(first row, rows, slot, the slot that comes next or -1) for this thread's runs of rows that share a slot.
template <class F> static void each_run(const int32_t* slot, int64_t T, F f) {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), end = T * (me + 1) / team;
    for (int64_t t = T * me / team, n; t < end; t += n) {
        for (n = 1; n < TiledRows::most && t + n < end && slot[t + n] == slot[t];) n++;
        if (slot[t] >= 0) f(t, n, slot[t], t + n < end && slot[t + n] != slot[t] ? slot[t + n] : -1);
    }
#pragma omp barrier
}

static void lora_tiled(const bf16* x, int64_t x_stride, bf16* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I) {
    TiledRows rows(I, most_ranks(f.rank, f.parts * f.S));
    each_run(slot, T, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
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
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const float* by = slot[t] < 0 ? nullptr : (const float*)g[slot[t]];
        if (!by) continue;
        V* row = x + t * stride;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) down(up(row[i]) * (1.0f + by[i]), row + i);
    }
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
    std::unique_ptr<float[]> hidden(new float[most_ranks(f.rank, f.S)]);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const int32_t s = slot[t];
        if (s < 0 || !f.rank[s]) continue;
        const int32_t next = t + 1 < T && slot[t + 1] != s ? slot[t + 1] : -1;
        const int64_t R = f.rank[s];
        const bool ahead = next >= 0 && f.rank[next] >= R;
        for (int64_t r = 0; r < R; r++) {
            if (ahead) fetch((const V*)f.D[next] + r * I, I * sizeof(V));
            hidden[r] = dot((const V*)f.D[s] + r * I, h + t * h_stride, I);
        }
        f.inside<V>(s, hidden.get());
        V* row = y + t * y_stride;
        expand(hidden.get(), (const V*)f.U[s], ahead ? (const V*)f.U[next] : nullptr, R, O, row, O);
        f.bias(s, row, O);
    }
}

template <class V>
void bottleneck(const V* h, int64_t h_stride, V* y, int64_t y_stride, const int32_t* slot, const Bottleneck& f, int64_t T, int64_t I, int64_t O) {
#ifdef TILES
    if constexpr (sizeof(V) == 2)
        if (I % 32 == 0 && may_tile()) {
            TiledRows rows(I, most_ranks(f.rank, f.S));
            return each_run(slot, T, [&](int64_t t, int64_t n, int32_t s, int32_t next) {
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
