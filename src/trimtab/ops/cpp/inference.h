// What the kernels of inference share: bfloat16 in wide registers, matrix tiles, and the loops over rows that also run inside a larger call.

#pragma once

#include <vector>

#include "common.h"
#include "crew.h"

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
static inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }
static inline void store(bf16* p, __m512 a, __m512 b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
static inline __m512 widened(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
#endif

// Whether this process may use the matrix tiles of its processor (asked of the kernel once).
bool may_tile();

// Factors of S adapters at sites that share an input: tables [parts, S] of the addresses of A [R, I] and B^T [R, width] and of R. The sites'
// outputs lie at first[p] of a row.
struct Lora {
    int64_t parts;
    const int64_t *first, *width, *A, *B;
    const int32_t* rank;
    int64_t S;
};

// Tables of S bottleneck adapters: addresses of D [R, I], d [R], U^T [R, O], u [O], and R. kind: the number of f.
struct Bottleneck {
    const int64_t *D, *d, *U, *u;
    const int32_t* rank;
    int64_t S, kind;

    template <class V> void inside(int32_t s, float* hidden) const;
    template <class V> void bias(int32_t s, V* row, int64_t O) const;
};

// Where the attention finds each row's keys; see `Paging` in forward/decode_path.py.
struct Paging {
    const int32_t *sequence, *length, *table;
    int64_t table_stride, block;
};

// The attention of T rows as the threads of a team share it, made before the team starts; see decode_attention.cpp.
struct AttentionWork {
    AttentionWork(const Paging& paging, int64_t T, int64_t H, int64_t G, int64_t D, int64_t window);

    // `rows` rows of one sequence, from `row` on, read tokens of one chunk, at `heads` key heads.
    struct Item {
        int32_t row, rows, chunk, head, heads;
    };
    const Paging paging;
    const int64_t T, H, G, D, window;
    std::vector<Item> items;
    std::vector<int64_t> first_part;  // a row's part of chunk c is parts[first_part + c], where it has several chunks
    std::vector<int32_t> count;       // a row's chunks
    int64_t share;                    // items that a thread takes at a time
    std::unique_ptr<float[]> parts;
    bool cut;  // whether any row has several chunks
};

// The kernels below are loops that the team which calls them shares: so a kernel is a call of its own, or a part of a larger one.
template <class V> void add_rms_norm(V* x, const V* y, const V* w, V* out, int64_t T, int64_t width, float eps);
template <class V>
void rotate_and_write(V* qkv, int64_t stride, const V* cos, const V* sin, const V* q_norm, const V* k_norm, float eps, V* k_pool, V* v_pool,
                      const int64_t* write, int64_t T, int64_t H, int64_t G, int64_t D);
template <class V>
void attend(const V* q, int64_t q_stride, const V* k_pool, const V* v_pool, V* out, float scaling, const AttentionWork& work);
template <class V>
void lora(const V* x, int64_t x_stride, V* y, int64_t y_stride, const int32_t* slot, const Lora& f, int64_t T, int64_t I);
template <class V> void scale(V* x, int64_t stride, const int32_t* slot, const int64_t* g, int64_t T, int64_t width);
template <class V>
void bottleneck(const V* h, int64_t h_stride, V* y, int64_t y_stride, const int32_t* slot, const Bottleneck& f, int64_t T, int64_t I, int64_t O);
template <class V> void swiglu(const V* gate_up, V* out, int64_t T, int64_t I);
#ifdef TILES
void matmul(const bf16* x, int64_t x_stride, const bf16* W, const bf16* bias, bf16* y, int64_t y_stride, int64_t M, int64_t K, int64_t O);
#endif
