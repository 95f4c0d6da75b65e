// Kernels of inference on a CPU, for batches of few rows, where one call of a large library costs more than the work itself.
// T rows, H query heads, G key heads, D head size, I inputs, O outputs, R rank, S adapters.

#include "common.h"

// x += y (where y is given), out = w * (x / sqrt(mean x^2 + eps)), x / … rounded before w as Llama does.
template <class V>
static void add_rms_norm(V* x, const V* y, const V* w, V* out, int64_t T, int64_t width, float eps) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        V* row = x + t * width;
        float sum = 0;
        if (y) {
            const V* add = y + t * width;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) {
                down(up(row[i]) + up(add[i]), row + i);
                float v = up(row[i]);
                sum += v * v;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) sum += up(row[i]) * up(row[i]);
        }
        float rstd = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) down(rounded<V>(up(row[i]) * rstd) * up(w[i]), out + t * width + i);
    }
}

template <class V> static void norm_head(V* head, const V* w, int64_t D, float eps) {
    float sum = 0;
    for (int64_t d = 0; d < D; d++) sum += up(head[d]) * up(head[d]);
    float rstd = 1.0f / std::sqrt(sum / D + eps);
    for (int64_t d = 0; d < D; d++) down(rounded<V>(up(head[d]) * rstd) * up(w[d]), head + d);
}

template <class V> static void rotate_head(const V* head, const V* cos, const V* sin, V* out, int64_t D) {
    int64_t half = D / 2;
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float a = up(head[d]), b = up(head[d + half]);
        down(a * up(cos[d]) - b * up(sin[d]), out + d);
        down(b * up(cos[d + half]) + a * up(sin[d + half]), out + d + half);
    }
}

// Rows of [q | k | v]: q is rotated in place; k rotated and v go to rows write[t] of the pools [rows, G, D]. q_norm, k_norm: per head, or null.
template <class V>
static void rotate_and_write(V* qkv, int64_t stride, const V* cos, const V* sin, const V* q_norm, const V* k_norm, float eps,
                             V* k_pool, V* v_pool, const int64_t* write, int64_t T, int64_t H, int64_t G, int64_t D) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        V* row = qkv + t * stride;
        const V *c = cos + t * D, *s = sin + t * D;
        V* k_out = k_pool + write[t] * G * D;
        V* v_out = v_pool + write[t] * G * D;
        for (int64_t h = 0; h < H; h++) {
            if (q_norm) norm_head(row + h * D, q_norm, D, eps);
            rotate_head(row + h * D, c, s, row + h * D, D);
        }
        V *k = row + H * D, *v = k + G * D;
        for (int64_t g = 0; g < G; g++) {
            if (k_norm) norm_head(k + g * D, k_norm, D, eps);
            rotate_head(k + g * D, c, s, k_out + g * D, D);
        }
        std::memcpy(v_out, v, sizeof(V) * G * D);
    }
}

// What one (row, key head) computes: scores of its rep query heads over n tokens, then their sums of values. at[j]: where token j's keys (or
// values) start in the pool.
template <class V, int Size> struct Head {
    static void scores(const V* queries, const V* k_pool, const int64_t* at, int64_t n, int64_t rep, int64_t D_, float scaling, float* out) {
        const int64_t D = Size ? Size : D_;
        for (int64_t j = 0; j < n; j++) {
            const V* k = k_pool + at[j];
            for (int64_t r = 0; r < rep; r++) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; d++) dot += up(queries[r * D + d]) * up(k[d]);
                out[r * n + j] = dot * scaling;
            }
        }
    }
    static void values(const float* p, const V* v_pool, const int64_t* at, int64_t n, int64_t rep, int64_t D_, float* sums, V* out) {
        const int64_t D = Size ? Size : D_;
        for (int64_t i = 0; i < rep * D; i++) sums[i] = 0;
        for (int64_t j = 0; j < n; j++) {
            const V* v = v_pool + at[j];
            for (int64_t r = 0; r < rep; r++) {
                const float f = p[r * n + j];
#pragma omp simd
                for (int64_t d = 0; d < D; d++) sums[r * D + d] += f * up(v[d]);
            }
        }
        for (int64_t i = 0; i < rep * D; i++) down(sums[i], out + i);
    }
};

#ifdef __AVX512BF16__
static inline __m512bh bits(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh pair(float a, float b) {  // (a, b) in every lane, as bfloat16
    bf16 two[2];
    down(a, two), down(b, two + 1);
    int32_t both;
    std::memcpy(&both, two, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
// Two rows of 32 become lanes of pairs (even, odd); `lo` and `hi` are the halves that the unpack instructions give.
static inline __m512bh lo(__m512bh a, __m512bh b) { return (__m512bh)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
static inline __m512bh hi(__m512bh a, __m512bh b) { return (__m512bh)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
static inline __m512 first_half(__m512 lo, __m512 hi) {
    return _mm512_permutex2var_ps(lo, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), hi);
}
static inline __m512 second_half(__m512 lo, __m512 hi) {
    return _mm512_permutex2var_ps(lo, _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31), hi);
}
static inline void store(bf16* p, __m512 a, __m512 b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
// Lane i: the sum over v[i].
static inline __m512 sums_of(__m512* v) {
    for (int width = 8; width >= 1; width /= 2)
        for (int i = 0; i < width; i++) {
            __m512 a = v[i], b = v[i + width];
            if (width == 8) {
                v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
            } else if (width == 4) {
                v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
            } else if (width == 2) {
                v[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
            } else {
                v[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
            }
        }
    return v[0];
}

template <int Size> struct WideHead {
    static void scores(const bf16* queries, const bf16* k_pool, const int64_t* at, int64_t n, int64_t rep, int64_t, float scaling, float* out) {
        for (int64_t from = 0; from < n; from += 16) {
            const int64_t count = std::min<int64_t>(16, n - from);
            const bf16* keys[16];
            for (int64_t i = 0; i < 16; i++) keys[i] = k_pool + at[from + std::min(i, count - 1)];
            for (int64_t r = 0; r < rep; r++) {
                __m512 v[16];
                // the order in which `sums_of` leaves its lanes
                static const int order[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
                for (int i = 0; i < 16; i++) {
                    __m512 acc = _mm512_setzero_ps();
                    for (int d = 0; d < Size; d += 32) acc = _mm512_dpbf16_ps(acc, bits(queries + r * Size + d), bits(keys[order[i]] + d));
                    v[i] = acc;
                }
                _mm512_mask_storeu_ps(out + r * n + from, __mmask16((1u << count) - 1), _mm512_mul_ps(sums_of(v), _mm512_set1_ps(scaling)));
            }
        }
    }
    static void values(const float* p, const bf16* v_pool, const int64_t* at, int64_t n, int64_t rep, int64_t, float*, bf16* out) {
        for (int64_t r = 0; r < rep; r++) {
            __m512 low[Size / 32], high[Size / 32];
            for (int c = 0; c < Size / 32; c++) low[c] = high[c] = _mm512_setzero_ps();
            for (int64_t j = 0; j < n; j += 2) {
                const bool odd = j + 1 < n;
                const bf16 *a = v_pool + at[j], *b = odd ? v_pool + at[j + 1] : a;
                const __m512bh weights = pair(p[r * n + j], odd ? p[r * n + j + 1] : 0.0f);
                for (int c = 0; c < Size / 32; c++) {
                    const __m512bh x = bits(a + 32 * c), y = bits(b + 32 * c);
                    low[c] = _mm512_dpbf16_ps(low[c], lo(x, y), weights);
                    high[c] = _mm512_dpbf16_ps(high[c], hi(x, y), weights);
                }
            }
            for (int c = 0; c < Size / 32; c++) store(out + r * Size + 32 * c, first_half(low[c], high[c]), second_half(low[c], high[c]));
        }
    }
};
template <> struct Head<bf16, 64> : WideHead<64> {};
template <> struct Head<bf16, 128> : WideHead<128> {};
#endif

// Attention of each row over the first length[t] tokens of its sequence, whose token j lies in row table[seq][j / block] * block + j % block
// of the pools [rows, G, D]. window 0: none; else tokens at distance >= window are not read. Size: D if known when compiling, else 0.
template <class V, int Size>
static void attend(const V* q, int64_t q_stride, const V* k_pool, const V* v_pool, V* out, const int32_t* sequence, const int32_t* length,
                   const int32_t* table, int64_t table_stride, int64_t block, int64_t T, int64_t H, int64_t G, int64_t D_, float scaling,
                   int64_t window, int64_t longest) {
    const int64_t D = Size ? Size : D_, rep = H / G;
#pragma omp parallel if (T * G > 1)
    {
        std::unique_ptr<float[]> scores(new float[rep * longest]), sums(new float[rep * D]);
        std::unique_ptr<int64_t[]> at(new int64_t[longest]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < T * G; item++) {
            const int64_t t = item / G, g = item % G, first = window && length[t] > window ? length[t] - window : 0, n = length[t] - first;
            if (n <= 0) continue;  // a row of a long sequence, which runs elsewhere
            const int32_t* blocks = table + sequence[t] * table_stride;
            for (int64_t j = 0, b = first / block, in = first % block; j < n; b++, in = 0)
                for (; in < block && j < n; in++, j++) at[j] = ((blocks[b] * block + in) * G + g) * D;
            for (int64_t j = 0; j < n; j++) fetch(k_pool + at[j], D * sizeof(V));
            for (int64_t j = 0; j < n; j++) fetch(v_pool + at[j], D * sizeof(V));
            Head<V, Size>::scores(q + t * q_stride + g * rep * D, k_pool, at.get(), n, rep, D, scaling, scores.get());
            for (int64_t r = 0; r < rep; r++) {
                float* s = scores.get() + r * n;
                float most = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : most)
                for (int64_t j = 0; j < n; j++) most = std::max(most, s[j]);
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < n; j++) s[j] = fast_exp(s[j] - most), total += s[j];
                const float scale = 1.0f / total;
#pragma omp simd
                for (int64_t j = 0; j < n; j++) s[j] *= scale;
            }
            Head<V, Size>::values(scores.get(), v_pool, at.get(), n, rep, D, sums.get(), out + (t * H + g * rep) * D);
        }
    }
}

// out = silu(gate) * up of rows [gate | up].
template <class V> static void swiglu(const V* gate_up, V* out, int64_t T, int64_t I) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *gate = gate_up + t * 2 * I, *value = gate + I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            float g = up(gate[i]);
            down(g / (1.0f + fast_exp(-g)) * up(value[i]), out + t * I + i);
        }
    }
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
        const __mmask32 m = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
        x = _mm512_dpbf16_ps(x, (__m512bh)_mm512_maskz_loadu_epi16(m, a + i), (__m512bh)_mm512_maskz_loadu_epi16(m, b + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(x, y));
}
static inline void expand(const float* f, const bf16* B, const bf16* ahead, int64_t R, int64_t O, bf16* to, int64_t n) {
    for (int64_t o = 0; o < n; o += 32) {
        const __mmask32 m = n - o >= 32 ? ~0u : (1u << (n - o)) - 1;
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
        const __m512 y0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(y)), 16));
        const __m512 y1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1)), 16));
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

// For each part p: y[t, first[p]..] += (x[t] A^T) B^T with part p's A [R, I] and B^T [R, width[p]] of slot[t]; rows of slot -1 are left
// alone. The tables are [parts, S]. While a row is computed the factors of the thread's next row are fetched, and at the end those that the
// next call will want first: each is read once a step, so that waiting for memory would be most of the time.
template <class V>
static void lora(const V* x, int64_t x_stride, V* y, int64_t y_stride, const int32_t* slot, int64_t parts, const int64_t* first,
                 const int64_t* width, const int64_t* A, const int64_t* B, const int32_t* rank, int64_t S, int64_t T, int64_t I) {
#pragma omp parallel if (T > 1)
    {
        int64_t begun = -1;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++) {
            const int32_t s = slot[t];
            if (s < 0) continue;
            if (begun < 0) begun = s;
            const int32_t next = t + 1 < T && slot[t + 1] != s ? slot[t + 1] : -1;
            for (int64_t p = 0; p < parts; p++) {
                const int64_t R = rank[p * S + s], O = width[p];
                const V *a = (const V*)A[p * S + s], *b = (const V*)B[p * S + s];
                const bool ahead = next >= 0 && rank[p * S + next] >= R;
                float shrunk[R];
                for (int64_t r = 0; r < R; r++) {
                    if (ahead) fetch((const V*)A[p * S + next] + r * I, I * sizeof(V));
                    shrunk[r] = dot(a + r * I, x + t * x_stride, I);
                }
                expand(shrunk, b, ahead ? (const V*)B[p * S + next] : nullptr, R, O, y + t * y_stride + first[p], O);
            }
        }
        if (begun >= 0) {  // an adapter's factors lie in memory in the order in which a forward reads them
            const int64_t last = (parts - 1) * S + begun;
            fetch((const V*)B[last] + rank[last] * width[parts - 1], rank[last] * I * sizeof(V));
        }
    }
}

// x[t] *= 1 + g of slot[t]; rows of slot -1 are left alone.
template <class V>
static void scale(V* x, int64_t stride, const int32_t* slot, const int64_t* g, int64_t T, int64_t width) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        if (slot[t] < 0) continue;
        const float* by = (const float*)g[slot[t]];
        V* row = x + t * stride;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) down(up(row[i]) * (1.0f + by[i]), row + i);
    }
}

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

// y[t] += U f(D h[t] + d) + u with the D [R, I], d [R], U^T [R, O], u [O] of slot[t]; rows of slot -1 are left alone.
template <class V>
static void bottleneck(const V* h, int64_t h_stride, V* y, int64_t y_stride, const int32_t* slot, const int64_t* D, const int64_t* d,
                       const int64_t* U, const int64_t* u, const int32_t* rank, int64_t kind, int64_t T, int64_t I, int64_t O) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const int32_t s = slot[t];
        if (s < 0) continue;
        const int32_t next = t + 1 < T && slot[t + 1] != s ? slot[t + 1] : -1;
        const int64_t R = rank[s];
        const bool ahead = next >= 0 && rank[next] >= R;
        const V *down_w = (const V*)D[s], *down_b = (const V*)d[s], *up_b = (const V*)u[s];
        float hidden[R];
        for (int64_t r = 0; r < R; r++) {
            if (ahead) fetch((const V*)D[next] + r * I, I * sizeof(V));
            hidden[r] = activate(kind, rounded<V>(dot(down_w + r * I, h + t * h_stride, I) + up(down_b[r])));
        }
        V* row = y + t * y_stride;
        expand(hidden, (const V*)U[s], ahead ? (const V*)U[next] : nullptr, R, O, row, O);
        for (int64_t o = 0; o < O; o++) down(up(row[o]) + up(up_b[o]), row + o);
    }
}

#if defined(__AMX_BF16__) && defined(__linux__)
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// y = x W^T + bias on tiles: W is packed in blocks of 32 outputs, each block a run of [K / 32][2][16 pairs][16 outputs][2]. A row's result
// does not depend on how many rows there are.
static void matmul(const bf16* x, int64_t x_stride, const bf16* W, const bf16* bias, bf16* y, int64_t y_stride, int64_t M, int64_t K, int64_t O) {
    const int64_t blocks = (O + 31) / 32, steps = K / 32;
#pragma omp parallel
    {
        TileConfig config;
        alignas(64) float sums[32 * 32];
        int64_t configured = -1;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < blocks; n++) {
            const bf16* w = W + n * steps * 1024;
            for (int64_t m = 0; m < M; m += 32) {
                const int64_t rows = std::min<int64_t>(32, M - m), upper = std::min<int64_t>(16, rows), lower = rows - upper;
                if (rows != configured) {
                    for (int i = 0; i < 8; i++) config.bytes[i] = 64;
                    config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(upper);
                    config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(std::max<int64_t>(1, lower));
                    config.rows[6] = config.rows[7] = 16;
                    _tile_loadconfig(&config);
                    configured = rows;
                }
                const bf16 *a = x + m * x_stride, *b = a + 16 * x_stride;
                _tile_zero(0);
                _tile_zero(1);
                if (lower) {
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int64_t k = 0; k < steps; k++) {
                        if (m == 0) fetch(w + (k + 8) * 1024, 2048);
                        _tile_loadd(4, a + k * 32, x_stride * 2);
                        _tile_loadd(6, w + k * 1024, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, w + k * 1024 + 512, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, b + k * 32, x_stride * 2);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    _tile_stored(2, sums + 16 * 32, 128);
                    _tile_stored(3, sums + 16 * 32 + 16, 128);
                } else {
                    for (int64_t k = 0; k < steps; k++) {
                        if (m == 0) fetch(w + (k + 8) * 1024, 2048);
                        _tile_loadd(4, a + k * 32, x_stride * 2);
                        _tile_loadd(6, w + k * 1024, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, w + k * 1024 + 512, 64);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                }
                _tile_stored(0, sums, 128);
                _tile_stored(1, sums + 16, 128);
                const int64_t width = std::min<int64_t>(32, O - n * 32);
                for (int64_t i = 0; i < rows; i++) {
                    bf16* to = y + (m + i) * y_stride + n * 32;
                    if (bias)
                        for (int64_t o = 0; o < width; o++) sums[i * 32 + o] += up(bias[n * 32 + o]);
                    if (width == 32)
                        store(to, _mm512_load_ps(sums + i * 32), _mm512_load_ps(sums + i * 32 + 16));
                    else
                        for (int64_t o = 0; o < width; o++) down(sums[i * 32 + o], to + o);
                }
            }
        }
        _tile_release();
    }
}

static void pack(const bf16* W, bf16* to, int64_t K, int64_t O) {
    const int64_t blocks = (O + 31) / 32, steps = K / 32;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < blocks; n++)
        for (int64_t k = 0; k < steps; k++)
            for (int64_t half = 0; half < 2; half++)
                for (int64_t p = 0; p < 16; p++)
                    for (int64_t o = 0; o < 16; o++)
                        for (int64_t i = 0; i < 2; i++) {
                            const int64_t output = n * 32 + half * 16 + o;
                            to[((((n * steps + k) * 2 + half) * 16 + p) * 16 + o) * 2 + i] =
                                output < O ? W[output * K + k * 32 + 2 * p + i] : bf16(0);
                        }
}
#endif

// Each row's largest value and the first place where it stands; NaN where the row holds one.
template <class V> static void largest(const V* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V* row = x + t * stride;
        float most = -std::numeric_limits<float>::infinity();
        int64_t bad = 0, at = 0;
#pragma omp simd reduction(max : most) reduction(+ : bad)
        for (int64_t i = 0; i < width; i++) most = std::max(most, up(row[i])), bad += up(row[i]) != up(row[i]);
        while (at < width - 1 && up(row[at]) != most) at++;
        value[t] = bad ? std::numeric_limits<float>::quiet_NaN() : most;
        place[t] = at;
    }
}

extern "C" {

int64_t trimtab_native() { return 1; }

// Whether this process may use the matrix tiles of its processor (asked of the kernel once).
int64_t trimtab_tiles() {
#if defined(__AMX_BF16__) && defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return 0;
#endif
}
#if defined(__AMX_BF16__) && defined(__linux__)
void matmul_bf16(void* x, int64_t x_stride, void* W, void* bias, void* y, int64_t y_stride, int64_t M, int64_t K, int64_t O) {
    matmul((const bf16*)x, x_stride, (const bf16*)W, (const bf16*)bias, (bf16*)y, y_stride, M, K, O);
}
void pack_bf16(void* W, void* to, int64_t K, int64_t O) { pack((const bf16*)W, (bf16*)to, K, O); }
#endif

FOR_EACH(add_rms_norm, (void* x, void* y, void* w, void* out, int64_t T, int64_t width, double eps),
         add_rms_norm((V*)x, (const V*)y, (const V*)w, (V*)out, T, width, float(eps)))

FOR_EACH(rotate_and_write,
         (void* qkv, int64_t stride, void* cos, void* sin, void* q_norm, void* k_norm, double eps, void* k_pool, void* v_pool, int64_t* write,
          int64_t T, int64_t H, int64_t G, int64_t D),
         rotate_and_write((V*)qkv, stride, (const V*)cos, (const V*)sin, (const V*)q_norm, (const V*)k_norm, float(eps), (V*)k_pool,
                          (V*)v_pool, write, T, H, G, D))

FOR_EACH(attend,
         (void* q, int64_t q_stride, void* k_pool, void* v_pool, void* out, int32_t* sequence, int32_t* length, int32_t* table,
          int64_t table_stride, int64_t block, int64_t T, int64_t H, int64_t G, int64_t D, double scaling, int64_t window, int64_t longest),
         (D == 64 ? attend<V, 64> : D == 128 ? attend<V, 128> : attend<V, 0>)((const V*)q, q_stride, (const V*)k_pool, (const V*)v_pool,
                                                                              (V*)out, sequence, length, table, table_stride, block, T, H,
                                                                              G, D, float(scaling), window, longest))

FOR_EACH(swiglu, (void* gate_up, void* out, int64_t T, int64_t I), swiglu((const V*)gate_up, (V*)out, T, I))

FOR_EACH(lora,
         (void* x, int64_t x_stride, void* y, int64_t y_stride, int32_t* slot, int64_t parts, int64_t* first, int64_t* width, int64_t* A,
          int64_t* B, int32_t* rank, int64_t S, int64_t T, int64_t I),
         lora((const V*)x, x_stride, (V*)y, y_stride, slot, parts, first, width, A, B, rank, S, T, I))

FOR_EACH(scale, (void* x, int64_t stride, int32_t* slot, int64_t* g, int64_t T, int64_t width),
         scale((V*)x, stride, slot, g, T, width))

FOR_EACH(bottleneck,
         (void* h, int64_t h_stride, void* y, int64_t y_stride, int32_t* slot, int64_t* D, int64_t* d, int64_t* U, int64_t* u, int32_t* rank,
          int64_t kind, int64_t T, int64_t I, int64_t O),
         bottleneck((const V*)h, h_stride, (V*)y, y_stride, slot, D, d, U, u, rank, kind, T, I, O))

FOR_EACH(largest, (void* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width),
         largest((const V*)x, stride, value, place, T, width))
}
