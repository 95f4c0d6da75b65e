// Kernels of inference on a CPU, for batches of few rows, where one call of a large library costs more than the work itself.
// T rows, H query heads, G key heads, D head size, I inputs, O outputs, R rank, S adapters.

#include "inference.h"

// x += y (where y is given), out = w * (x / sqrt(mean x^2 + eps)), x / … rounded before w as Llama does.
template <class V>
void add_rms_norm(V* x, const V* y, const V* w, V* out, int64_t T, int64_t width, float eps) {
#pragma omp for schedule(static)
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
void rotate_and_write(V* qkv, int64_t stride, const V* cos, const V* sin, const V* q_norm, const V* k_norm, float eps,
                             V* k_pool, V* v_pool, const int64_t* write, int64_t T, int64_t H, int64_t G, int64_t D) {
#pragma omp for schedule(static)
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
static void attend_sized(const V* q, int64_t q_stride, const V* k_pool, const V* v_pool, V* out, const Paging& paging, int64_t T, int64_t H,
                         int64_t G, int64_t D_, float scaling, int64_t window) {
    const auto [sequence, length, table, table_stride, block, longest] = paging;
    const int64_t D = Size ? Size : D_, rep = H / G;
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

template <class V>
void attend(const V* q, int64_t q_stride, const V* k_pool, const V* v_pool, V* out, const Paging& at, int64_t T, int64_t H, int64_t G, int64_t D,
            float scaling, int64_t window) {
    (D == 64 ? attend_sized<V, 64> : D == 128 ? attend_sized<V, 128> : attend_sized<V, 0>)(q, q_stride, k_pool, v_pool, out, at, T, H, G, D,
                                                                                        scaling, window);
}

// out = silu(gate) * up of rows [gate | up].
template <class V> void swiglu(const V* gate_up, V* out, int64_t T, int64_t I) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *gate = gate_up + t * 2 * I, *value = gate + I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            float g = up(gate[i]);
            down(g / (1.0f + fast_exp(-g)) * up(value[i]), out + t * I + i);
        }
    }
}

// Each row's largest value and the first place where it stands; NaN where the row holds one.
template <class V> static void largest(const V* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width) {
#pragma omp for schedule(static)
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

template void add_rms_norm(bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, float);
template void rotate_and_write(bf16*, int64_t, const bf16*, const bf16*, const bf16*, const bf16*, float, bf16*, bf16*, const int64_t*, int64_t,
                               int64_t, int64_t, int64_t);
template void attend(const bf16*, int64_t, const bf16*, const bf16*, bf16*, const Paging&, int64_t, int64_t, int64_t, int64_t, float, int64_t);
template void swiglu(const bf16*, bf16*, int64_t, int64_t);

extern "C" {

int64_t trimtab_native() { return 1; }

FOR_EACH(add_rms_norm, (void* x, void* y, void* w, void* out, int64_t T, int64_t width, double eps),
         as_team(T > 1, [=] { add_rms_norm((V*)x, (const V*)y, (const V*)w, (V*)out, T, width, float(eps)); }))

FOR_EACH(rotate_and_write,
         (void* qkv, int64_t stride, void* cos, void* sin, void* q_norm, void* k_norm, double eps, void* k_pool, void* v_pool, int64_t* write,
          int64_t T, int64_t H, int64_t G, int64_t D),
         as_team(T > 1, [=] {
             rotate_and_write((V*)qkv, stride, (const V*)cos, (const V*)sin, (const V*)q_norm, (const V*)k_norm, float(eps), (V*)k_pool,
                              (V*)v_pool, write, T, H, G, D);
         }))

FOR_EACH(attend,
         (void* q, int64_t q_stride, void* k_pool, void* v_pool, void* out, int32_t* sequence, int32_t* length, int32_t* table,
          int64_t table_stride, int64_t block, int64_t T, int64_t H, int64_t G, int64_t D, double scaling, int64_t window, int64_t longest),
         as_team(T * G > 1, [=] {
             attend((const V*)q, q_stride, (const V*)k_pool, (const V*)v_pool, (V*)out,
                    Paging{sequence, length, table, table_stride, block, longest}, T, H, G, D, float(scaling), window);
         }))

FOR_EACH(swiglu, (void* gate_up, void* out, int64_t T, int64_t I),
         as_team(T > 1, [=] { swiglu((const V*)gate_up, (V*)out, T, I); }))

FOR_EACH(largest, (void* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width),
         as_team(T > 1, [=] { largest((const V*)x, stride, value, place, T, width); }))
}
