// A chunk of decode_attention.cpp: from the keys and values of some tokens each query head's largest score, sum of weights and weighted values,
// and what these of all chunks of a row give. H query heads, G key heads, D head size, rep = H / G.

#pragma once

#include "inference.h"

namespace {

constexpr int64_t CHUNK = 512, TILE = 16, AHEAD = 2 * TILE, ROWS = 8;  // tokens; rows that read a chunk together
constexpr float NOTHING = -1e30f;  // what a score that is none counts as

// Numbers of a part [most, total, sums], whose sums are as many as fill registers.
inline int64_t part_size(int64_t D) { return 2 + (D + 31) / 32 * 32; }

// out [D] = the values of `count` chunks over their weights, all brought to the largest score. A chunk's part is [most, total, sums [D]];
// scores are powers of two.
template <class V> void combine(const float* parts, int64_t count, int64_t stride, V* out, int64_t D) {
    float most = NOTHING, total = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, parts[i * stride]);
    float sums[D];
    for (int64_t d = 0; d < D; d++) sums[d] = 0;
    for (int64_t i = 0; i < count; i++) {
        const float *part = parts + i * stride, scale = fast_exp((part[0] - most) * LN_2);
        total += scale * part[1];
#pragma omp simd
        for (int64_t d = 0; d < D; d++) sums[d] += scale * part[2 + d];
    }
    const float scale = 1.0f / total;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) down(sums[d] * scale, out + d);
}

#ifdef __AVX512BF16__
// Lane i: the sum over v[i], for v in the order `SUMMED`.
constexpr int SUMMED[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
inline __m512 sums_of(__m512* v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) v[i] = _mm512_add_ps(_mm512_shuffle_ps(v[i], v[i + 2], 0x44), _mm512_shuffle_ps(v[i], v[i + 2], 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
}

// Quarter r, lane i: the sum over quarter r of v[i].
inline __m512 sums_of_quarters(const __m512* v) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}

inline __m512 quarters(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline __m512bh quarters(const bf16* p) { return (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
inline __m512 whole(const float* p) { return _mm512_loadu_ps(p); }
inline __m512bh whole(const bf16* p) { return bits(p); }
// The first n numbers, and zeros.
inline __m512 some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(n < 16 ? (1u << std::max<int64_t>(n, 0)) - 1 : 0xffff, p); }
inline __m512bh some(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(n < 32 ? (1u << std::max<int64_t>(n, 0)) - 1 : 0xffffffffu, p);
}
inline __m512 added(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
inline __m512 added(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }

// SIDE query heads of one key head stand side by side: four, each in a quarter of a register beside the same part of a key, or one.
// Scores of 16 tokens are then SIDE registers, [4 tokens of four][4 heads][token] or [token].
template <class V, int SIDE> struct Wide {
    static constexpr int64_t LANES = 64 / sizeof(V), PART = LANES / SIDE;  // numbers of a register, and of a head's share of it
    static int64_t laid(int64_t D) { return (D + PART - 1) / PART * LANES; }

    // The query heads of one key head: [set of SIDE heads][D / PART][SIDE][PART]; what is none is zeros.
    static void lay_out(const V* q, int64_t rep, int64_t D, V* to) {
        for (int64_t r = 0; r < rep; r += SIDE)
            for (int64_t d = 0; d < D; d += PART)
                for (int64_t s = 0; s < SIDE; s++, to += PART) {
                    const int64_t n = r + s < rep ? std::min(PART, D - d) : 0;
                    std::memcpy(to, q + (r + s) * D + d, n * sizeof(V));
                    std::memset(to + n, 0, (PART - n) * sizeof(V));
                }
    }

    // Scores of 16 tokens, of which `count` are any, and the largest so far.
    static void scores(const V* q, const V* const* tokens, int64_t offset, int64_t count, int64_t D, float scaling_, float* out, float* most) {
        const V* keys[16];
        for (int64_t i = 0; i < 16; i++) keys[i] = tokens[std::min(i, count - 1)] + offset;
        const __m512 scaling = _mm512_set1_ps(scaling_);
        __m512 largest = _mm512_load_ps(most);
        if (SIDE == 1) {
            __m512 v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) v[i] = _mm512_setzero_ps();
            int64_t d = 0;
            for (; d + LANES <= D; d += LANES) {
                const auto part = whole(q + d);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) v[i] = added(v[i], part, whole(keys[SUMMED[i]] + d));
            }
            if (d < D)
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) v[i] = added(v[i], whole(q + d), some(keys[SUMMED[i]] + d, D - d));
            const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(NOTHING), __mmask16((1u << count) - 1), sums_of(v), scaling);
            _mm512_store_ps(out, s);
            largest = _mm512_max_ps(largest, s);
        } else {
            for (int64_t first = 0; first < 16; first += 8) {
                __m512 v[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) v[i] = _mm512_setzero_ps();
                for (int64_t d = 0; d < D; d += PART) {
                    const auto part = whole(q + d * SIDE);
#pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) v[i] = added(v[i], part, quarters(keys[first + i] + d));
                }
                for (int64_t four = 0; four < 2; four++) {
                    const int64_t left = std::min<int64_t>(4, std::max<int64_t>(0, count - first - 4 * four));
                    const __mmask16 real = ((1u << left) - 1) * 0x1111u;
                    const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(NOTHING), real, sums_of_quarters(v + 4 * four), scaling);
                    _mm512_store_ps(out + 4 * first + 16 * four, s);
                    largest = _mm512_max_ps(largest, s);
                }
            }
        }
        _mm512_store_ps(most, largest);
    }

    // Scores become weights 2^(score - most), in the values' type; `most` and `total` of each head.
    static void weights(float* scores, int64_t tiles, const float* most_lanes, float* most, float* total) {
        __m512 m = _mm512_load_ps(most_lanes), sum = _mm512_setzero_ps();
        m = _mm512_max_ps(m, _mm512_permute_ps(m, 0x4e));
        m = _mm512_max_ps(m, _mm512_permute_ps(m, 0xb1));
        if (SIDE == 1) {
            m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4e));
            m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
        }
        V* to = (V*)scores;  // behind what is read, or at the same place
        for (int64_t i = 0; i < tiles * SIDE; i++) {
            const __m512 p = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores + 16 * i), m));
            sum = _mm512_add_ps(sum, p);
            keep(to + 16 * i, p);
        }
        alignas(64) float mosts[16], totals[16];
        _mm512_store_ps(mosts, m);
        _mm512_store_ps(totals, sum);
        for (int64_t s = 0; s < SIDE; s++) {
            most[s] = mosts[16 / SIDE * s], total[s] = 0;
            for (int64_t i = 0; i < 16 / SIDE; i++) total[s] += totals[16 / SIDE * s + i];
        }
    }
    static void keep(float* to, __m512 p) { _mm512_storeu_ps(to, p); }
    static void keep(bf16* to, __m512 p) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(p)); }

    // Where head s of a set has its weight of token j.
    static int64_t place(int64_t j, int64_t s) { return SIDE == 1 ? j : j / 4 * 16 + s * 4 + j % 4; }

    // sums [R heads, D] += weights x values of n tokens at 64 (N 4) or 32 (N 2) of D numbers, of which `left` are any. In bfloat16 a register
    // pair holds the two halves as `lo` and `hi` leave them; `in_order` undoes that at the end.
    template <int R, int N>
    static void values(const V* w, const V* const* tokens, int64_t offset, int64_t n, float* sums, int64_t stride, int64_t left) {
        __m512 s[R][N];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) s[r][c] = _mm512_loadu_ps(sums + r * stride + 16 * c);
        left < 16 * N ? add<R, N, false>(w, tokens, offset, n, s, left) : add<R, N, true>(w, tokens, offset, n, s, left);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) _mm512_storeu_ps(sums + r * stride + 16 * c, s[r][c]);
    }
    template <int R, int N, bool all>
    static void add(const float* w, const float* const* tokens, int64_t offset, int64_t n, __m512 (*s)[N], int64_t left) {
        for (int64_t j = 0; j < n; j++) {
            const float* v = tokens[j] + offset;
            __m512 x[N];
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) x[c] = all ? whole(v + 16 * c) : some(v + 16 * c, left - 16 * c);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m512 p = _mm512_set1_ps(w[place(j, r)]);
#pragma GCC unroll 4
                for (int c = 0; c < N; c++) s[r][c] = _mm512_fmadd_ps(p, x[c], s[r][c]);
            }
        }
    }
    template <int R, int N, bool all>
    static void add(const bf16* w, const bf16* const* tokens, int64_t offset, int64_t n, __m512 (*s)[N], int64_t left) {
        for (int64_t j = 0; j < n; j += 2) {
            const bf16 *a = tokens[j] + offset, *b = j + 1 < n ? tokens[j + 1] + offset : a;  // whose weight is 0
            __m512bh x[N];
#pragma GCC unroll 2
            for (int c = 0; c < N / 2; c++) {
                const __m512bh one = all ? whole(a + 32 * c) : some(a + 32 * c, left - 32 * c);
                const __m512bh two = all ? whole(b + 32 * c) : some(b + 32 * c, left - 32 * c);
                x[2 * c] = lo(one, two), x[2 * c + 1] = hi(one, two);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                int32_t both;
                std::memcpy(&both, w + place(j, r), 4);
                const __m512bh p = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
                for (int c = 0; c < N; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], x[c], p);
            }
        }
    }
    static void in_order(float* sums, int64_t D) {
        if (sizeof(V) == 4) return;
        for (int64_t d = 0; d < D; d += 32) {
            const __m512 a = _mm512_loadu_ps(sums + d), b = _mm512_loadu_ps(sums + d + 16);
            _mm512_storeu_ps(sums + d, first_half(a, b));
            _mm512_storeu_ps(sums + d + 16, second_half(a, b));
        }
    }

    template <int N>
    static void values(int64_t R, const V* w, const V* const* tokens, int64_t offset, int64_t n, float* sums, int64_t stride, int64_t left) {
        if (R == 1) return values<1, N>(w, tokens, offset, n, sums, stride, left);
        if (R == 2) return values<2, N>(w, tokens, offset, n, sums, stride, left);
        if (R == 3) return values<3, N>(w, tokens, offset, n, sums, stride, left);
        values<4, N>(w, tokens, offset, n, sums, stride, left);
    }
    // One set of heads at all of D.
    static void all_values(int64_t R, const V* w, const V* const* tokens, int64_t offset, int64_t n, float* sums, int64_t D) {
        int64_t d = 0;
        for (; d + 32 < D; d += 64) values<4>(R, w, tokens, offset + d, n, sums + d, part_size(D), D - d);
        if (d < D) values<2>(R, w, tokens, offset + d, n, sums + d, part_size(D), D - d);
    }

    // The parts of all heads of `heads` key heads, of n tokens' keys and values. ahead: how far behind these lies what is
    // asked for meanwhile, 0 for nothing.
    static void part(const V* q, const V* const* keys, const V* const* values, int64_t n, int64_t ahead, int64_t heads, int64_t rep, int64_t D,
                     float scaling, Scratch& memory, float* out) {
        const int64_t sets = (rep + SIDE - 1) / SIDE, tiles = (n + TILE - 1) / TILE, all = heads * sets, laid = Wide::laid(D);
        const int64_t line = D * sizeof(V), size = part_size(D);
        memory.reserve(all * (CHUNK * SIDE + 16) * sizeof(float) + all * laid * sizeof(V));
        float *scores_at = memory.take<float>(all * CHUNK * SIDE), *most = memory.take<float>(16 * all);
        V* queries = memory.take<V>(all * laid);
        for (int64_t g = 0; g < heads; g++) lay_out(q + g * rep * D, rep, D, queries + g * sets * laid);
        for (int64_t i = 0; i < 16 * all; i++) most[i] = NOTHING;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t j = tile * TILE, count = std::min(TILE, n - j);
            for (int64_t g = 0; g < heads; g++) {
                if (ahead)
                    for (int64_t i = 0; i < count; i++) fetch(keys[j + i + ahead] + g * D, line);
                for (int64_t set = g * sets; set < (g + 1) * sets; set++)
                    scores(queries + set * laid, keys + j, g * D, count, D, scaling, scores_at + (set * CHUNK + j) * SIDE, most + 16 * set);
            }
        }
        for (int64_t g = 0; g < heads; g++)
            for (int64_t set = 0; set < sets; set++) {
                float totals[SIDE], mosts[SIDE];
                weights(scores_at + (g * sets + set) * CHUNK * SIDE, tiles, most + 16 * (g * sets + set), mosts, totals);
                for (int64_t r = set * SIDE; r < std::min(rep, (set + 1) * SIDE); r++) {
                    float* to = out + (g * rep + r) * size;
                    to[0] = mosts[r - set * SIDE], to[1] = totals[r - set * SIDE];
                    for (int64_t d = 2; d < size; d++) to[d] = 0;
                }
            }
        for (int64_t j = 0; j < n; j += TILE) {
            const int64_t count = std::min(TILE, n - j);
            for (int64_t g = 0; g < heads; g++) {
                if (ahead)
                    for (int64_t i = 0; i < count; i++) fetch(values[j + i + ahead] + g * D, line);
                for (int64_t set = 0; set < sets; set++)
                    all_values(std::min<int64_t>(SIDE, rep - set * SIDE), (const V*)(scores_at + (g * sets + set) * CHUNK * SIDE) + j * SIDE,
                               values + j, g * D, count, out + (g * rep + set * SIDE) * size + 2, D);
            }
        }
        for (int64_t h = 0; h < heads * rep; h++) in_order(out + h * size + 2, D);
    }
};
#endif

// The same for any D and processor.
template <class V> struct Plain {
    static void part(const V* q, const V* const* keys, const V* const* values, int64_t n, int64_t, int64_t heads, int64_t rep, int64_t D,
                     float scaling, Scratch& memory, float* out) {
        memory.reserve(n * sizeof(float));
        float* scores = memory.take<float>(n);
        for (int64_t h = 0; h < heads * rep; h++) {
            const V* query = q + h * D;
            const int64_t offset = h / rep * D;
            float most = NOTHING, total = 0, *sums = out + h * part_size(D) + 2;
            for (int64_t j = 0; j < n; j++) {
                const V* k = keys[j] + offset;
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; d++) dot += up(query[d]) * up(k[d]);
                scores[j] = dot * scaling;
                most = std::max(most, scores[j]);
            }
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < n; j++) scores[j] = fast_exp((scores[j] - most) * LN_2), total += scores[j];
            for (int64_t d = 0; d < D; d++) sums[d] = 0;
            for (int64_t j = 0; j < n; j++) {
                const V* v = values[j] + offset;
                const float p = scores[j];
#pragma omp simd
                for (int64_t d = 0; d < D; d++) sums[d] += p * up(v[d]);
            }
            sums[-2] = most, sums[-1] = total;
        }
    }
};

// Not inlined, as `indices` is not.
template <class V>
__attribute__((noinline)) void part(const V* q, const V* const* keys, const V* const* values, int64_t n, int64_t ahead, int64_t heads, int64_t rep,
                                    int64_t D, float scaling, Scratch& memory, float* out) {
#ifdef __AVX512BF16__
    if (D % 8 == 0) {
        (rep == 1 ? Wide<V, 1>::part : Wide<V, 4>::part)(q, keys, values, n, ahead, heads, rep, D, scaling, memory, out);
        return;
    }
#endif
    Plain<V>::part(q, keys, values, n, ahead, heads, rep, D, scaling, memory, out);
}

}  // namespace
