// How numbers of each format come out of wide registers as bfloat16, rounded once from their product in float.
//
// A format hands over RUN numbers of a row at a time, as registers of 32. Formats of 4 bits look each number up in a table of 16 products
// that is made for each block. Numbers whose codes lie in one word come out four apart (`QUADS`); then x is laid out alike, which costs less
// than putting them in order. Past a row's end comes whatever is finite.

#pragma once

#include "quantized_plain.h"

#ifdef __AVX512BF16__
namespace {

#define INLINE inline __attribute__((always_inline))

// Rows are short, and so the processor would see too late where the next ones are: ask for what lies some rows further on.
template <int64_t bytes> INLINE const uint8_t* ask(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + ahead + i, _MM_HINT_T0);
    return p;
}

INLINE __m512i narrow_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __m512i bytes_or_none(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p); }
INLINE float half_number(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(h))));
}
inline __m512 counted() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// 128 numbers of 4 bits, their codes 4 in a word. `wide` (blocks of 32): numbers 32 i of the 128 have tables[i / 2] at 16 (i % 2); else the
// first 64 numbers have the first half of tables[0].
template <bool high_first, bool wide> struct Nibbles {
    static constexpr int64_t RUN = 128;
    static constexpr bool QUADS = true, DECODED = false;
    __m512i block, nibble = _mm512_set1_epi16(15);  // of each lane, where an index has it
    Nibbles() {
        alignas(64) int16_t lanes[32];
        for (int i = 0; i < 32; i++) lanes[i] = wide ? i / 8 * 16 : i / 16 * 16;
        block = _mm512_load_si512(lanes);
    }
    INLINE void look_up(__m512i codes, const __m512i* tables, __m512i* to) const {
        const __m512i shifted[4] = {codes, _mm512_srli_epi16(codes, 4), _mm512_srli_epi16(codes, 8), _mm512_srli_epi16(codes, 12)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i index = _mm512_ternarylogic_epi32(shifted[high_first ? i ^ 1 : i], nibble, block, 0xea);  // (a & b) | c
            to[i] = wide ? _mm512_permutex2var_epi16(tables[0], index, tables[1]) : _mm512_permutexvar_epi16(index, tables[0]);
        }
    }
};

// i / block for i * block below 2^40.
struct Divisor {
    uint64_t inverse;
    explicit Divisor(int64_t block) : inverse(((1ull << 40) + block - 1) / block) {}
    INLINE int64_t operator()(int64_t i) const { return int64_t(uint64_t(i) * inverse >> 40); }
};

struct FormatCode4 : Nibbles<true, false> {
    const Quantized& W;
    const __m512 table;
    const int64_t blocks;
    const Divisor block_of;
    std::vector<float> expanded;  // absmax of the rows at hand, where it is quantised
    struct Row {
        const uint8_t* codes;
        const float* scale;
    };
    explicit FormatCode4(const Quantized& W)
        : W(W), table(_mm512_loadu_ps(W.part[1])), blocks(W.I / W.block), block_of(W.block), expanded(W.part[3] ? 16 * blocks : 0) {}
    Row row(int64_t o, int64_t slot) {
        const uint8_t* codes = (const uint8_t*)W.part[0] + o * W.I / 2;
        if (!W.part[3]) return {codes, (const float*)W.part[2] + o * blocks};
        float* to = expanded.data() + slot * blocks;
        const uint8_t* stored = (const uint8_t*)W.part[2] + o * blocks;
        const float *nested = (const float*)W.part[3], *scales = (const float*)W.part[4], offset = float(W.nested_offset);
        for (int64_t i = 0; i < blocks;) {
            const int64_t at = (o * blocks + i) / W.nested_block, stop = std::min(blocks, (at + 1) * W.nested_block - o * blocks);
            for (; i < stop; i++) to[i] = alone(nested[stored[i]] * scales[at]) + offset;
        }
        return {codes, to};
    }
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {
        const float a = r.scale[block_of(k)], b = r.scale[block_of(k + (left > 64 ? 64 : 0))];
        const __m512i tables = narrow_pair(_mm512_mul_ps(table, _mm512_set1_ps(a)), _mm512_mul_ps(table, _mm512_set1_ps(b)));
        look_up(bytes_or_none(ask<64>(r.codes + k / 2, 2 * W.I), left / 2), &tables, to);
    }
};

template <bool wide> struct FormatInt4 : Nibbles<true, wide> {
    const Quantized& W;
    const int64_t groups;
    const Divisor group_of;
    struct Row {
        const uint8_t *codes, *zero;
        const float* scale;
    };
    explicit FormatInt4(const Quantized& W) : W(W), groups(W.I / W.block), group_of(W.block) {}
    Row row(int64_t o, int64_t) {
        return {(const uint8_t*)W.part[0] + o * W.I / 2, (const uint8_t*)W.part[2] + o * groups, (const float*)W.part[1] + o * groups};
    }
    INLINE __m512 table(const Row& r, int64_t g) const {
        return _mm512_mul_ps(_mm512_sub_ps(counted(), _mm512_set1_ps(float(r.zero[g]))), _mm512_set1_ps(r.scale[g]));
    }
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {
        constexpr int64_t each = wide ? 32 : 64, count = 128 / each;
        __m512i tables[2];
#pragma GCC unroll 2
        for (int64_t i = 0; i < count; i += 2)
            tables[i / 2] = narrow_pair(table(r, group_of(k + (left > i * each ? i * each : 0))),
                                        table(r, group_of(k + (left > (i + 1) * each ? (i + 1) * each : 0))));
        this->look_up(bytes_or_none(ask<64>(r.codes + k / 2, 2 * W.I), left / 2), tables, to);
    }
};

struct FormatMxfp4 : Nibbles<false, true> {
    const Quantized& W;
    const __m512 table;
    struct Row {
        const uint8_t *codes, *scale;
    };
    explicit FormatMxfp4(const Quantized& W) : W(W), table(_mm512_loadu_ps(W.part[1])) {}
    Row row(int64_t o, int64_t) { return {(const uint8_t*)W.part[0] + o * W.I / 2, (const uint8_t*)W.part[2] + o * W.I / 32}; }
    INLINE __m512 scaled(uint8_t e) const {
        return _mm512_mul_ps(table, (__m512)_mm512_set1_epi32(e ? uint32_t(e) << 23 : 1u << 22));
    }
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {
        const uint8_t* s = r.scale + k / 32;
        const int64_t last = std::min<int64_t>(4, left / 32) - 1;
        const __m512i tables[2] = {narrow_pair(scaled(s[0]), scaled(s[std::min<int64_t>(1, last)])),
                                   narrow_pair(scaled(s[std::min<int64_t>(2, last)]), scaled(s[last]))};
        look_up(bytes_or_none(ask<64>(r.codes + k / 2, 2 * W.I), left / 2), tables, to);
    }
};

// Codes of a byte, in order.
struct InOrder {
    static constexpr int64_t RUN = 32;
    static constexpr bool QUADS = false, DECODED = false;
};
INLINE __m512 float_of(__m128i signed_bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(signed_bytes)); }
INLINE __m512i scaled_bytes(__m256i b, __m512 low, __m512 high) {
    return narrow_pair(_mm512_mul_ps(float_of(_mm256_castsi256_si128(b)), low), _mm512_mul_ps(float_of(_mm256_extracti128_si256(b, 1)), high));
}
INLINE __m256i some_bytes(const uint8_t* p, int64_t n) { return _mm256_maskz_loadu_epi8(n >= 32 ? ~0u : (1u << n) - 1, p); }

struct FormatInt8 : InOrder {
    const Quantized& W;
    struct Row {
        const uint8_t* codes;
        float scale;
    };
    explicit FormatInt8(const Quantized& W) : W(W) {}
    Row row(int64_t o, int64_t) { return {(const uint8_t*)W.part[0] + o * W.I, ((const float*)W.part[1])[o]}; }
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {
        const __m512 scale = _mm512_set1_ps(r.scale);
        to[0] = scaled_bytes(some_bytes(ask<32>(r.codes + k, 4 * W.I), left), scale, scale);
    }
};

struct FormatInt8Groups : InOrder {
    const Quantized& W;
    const int64_t groups;
    const Divisor group_of;
    struct Row {
        const uint8_t* codes;
        const int8_t* zero;
        const float* scale;
    };
    explicit FormatInt8Groups(const Quantized& W) : W(W), groups(W.I / W.block), group_of(W.block) {}
    Row row(int64_t o, int64_t) {
        return {(const uint8_t*)W.part[0] + o * W.I, (const int8_t*)W.part[2] + o * groups, (const float*)W.part[1] + o * groups};
    }
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {  // groups are multiples of 32
        const int64_t g = group_of(k);
        const __m512 zero = _mm512_set1_ps(float(r.zero[g])), scale = _mm512_set1_ps(r.scale[g]);
        const __m256i b = some_bytes(ask<32>(r.codes + k, 4 * W.I), left);
        to[0] = narrow_pair(_mm512_mul_ps(_mm512_sub_ps(float_of(_mm256_castsi256_si128(b)), zero), scale),
                            _mm512_mul_ps(_mm512_sub_ps(float_of(_mm256_extracti128_si256(b, 1)), zero), scale));
    }
};

struct FormatFp8 : InOrder {
    const Quantized& W;
    const int64_t across;
    const Divisor block_of;
    struct Row {
        const uint8_t* codes;
        const float* scale;
    };
    explicit FormatFp8(const Quantized& W) : W(W), across((W.I + W.block - 1) / W.block), block_of(W.block) {}
    Row row(int64_t o, int64_t) { return {(const uint8_t*)W.part[0] + o * W.I, (const float*)W.part[1] + o / W.block_rows * across}; }
    // As half precision, whose exponents begin 8 lower, the numbers are 2^-8 of what they are.
    INLINE void decode(const Row& r, int64_t k, int64_t left, __m512i* to) const {  // blocks are multiples of 32
        const __m512i words = _mm512_cvtepu8_epi16(some_bytes(ask<32>(r.codes + k, 4 * W.I), left)), size = _mm512_and_si512(words, _mm512_set1_epi16(127));
        const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(127), words), 8);
        const __mmask32 none = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(127));
        const __m512i half = _mm512_or_si512(sign, _mm512_mask_mov_epi16(_mm512_slli_epi16(size, 7), none, _mm512_set1_epi16(0x7e00)));
        const __m512 scale = _mm512_set1_ps(256 * r.scale[block_of(k)]);
        to[0] = narrow_pair(_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), scale),
                            _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), scale));
    }
};

// GGUF's blocks.
template <int64_t numbers, int64_t size> struct Blocks {
    static constexpr int64_t RUN = numbers;
    static constexpr bool QUADS = false, DECODED = false;
    const Quantized& W;
    typedef const uint8_t* Row;
    explicit Blocks(const Quantized& W) : W(W) {}
    Row row(int64_t o, int64_t) { return (const uint8_t*)W.part[0] + o * (W.I / numbers) * size; }
    INLINE Row block(Row r, int64_t k) const { return ask<size>(r + k / numbers * size, 4 * (W.I / numbers) * size); }
};

struct FormatQ4_0 : Blocks<32, 18> {
    using Blocks::Blocks;
    INLINE void decode(Row r, int64_t k, int64_t, __m512i* to) const {
        const uint8_t* b = block(r, k);
        const __m512 table = _mm512_mul_ps(_mm512_sub_ps(counted(), _mm512_set1_ps(8)), _mm512_set1_ps(half_number(b)));
        const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(b + 2)));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
        to[0] = _mm512_permutexvar_epi16(_mm512_and_si512(both, _mm512_set1_epi16(15)), narrow_pair(table, table));
    }
};

struct FormatQ8_0 : Blocks<32, 34> {
    using Blocks::Blocks;
    INLINE void decode(Row r, int64_t k, int64_t, __m512i* to) const {
        const uint8_t* b = block(r, k);
        const __m512 scale = _mm512_set1_ps(half_number(b));
        to[0] = scaled_bytes(_mm256_loadu_si256((const __m256i*)(b + 2)), scale, scale);
    }
};

struct FormatQ4_K : Blocks<256, 144> {
    using Blocks::Blocks;
    INLINE void decode(Row r, int64_t k, int64_t, __m512i* to) const {
        const uint8_t* b = block(r, k);
        const float d = half_number(b), dmin = half_number(b + 2);
        const auto table = [&](int64_t run) {
            int scale, least;
            scale_of_run(b + 4, run, &scale, &least);
            __m512 product = _mm512_mul_ps(counted(), _mm512_set1_ps(d * float(scale)));
            asm("" : "+v"(product));  // as `alone`
            return _mm512_sub_ps(product, _mm512_set1_ps(dmin * float(least)));
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(b + 16 + 32 * i)));
            const __m512i tables = narrow_pair(table(2 * i), table(2 * i + 1));
            to[2 * i] = _mm512_permutexvar_epi16(_mm512_and_si512(words, _mm512_set1_epi16(15)), tables);
            to[2 * i + 1] = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(16)), tables);
        }
    }
};

struct FormatQ6_K : Blocks<256, 210> {
    using Blocks::Blocks;
    INLINE void decode(Row r, int64_t k, int64_t, __m512i* to) const {
        const uint8_t* b = block(r, k);
        const __m512 scales = _mm512_mul_ps(float_of(_mm_loadu_si128((const __m128i*)(b + 192))), _mm512_set1_ps(half_number(b + 208)));
        alignas(64) float scale[16];
        _mm512_store_ps(scale, scales);
        const __m256i nibble = _mm256_set1_epi8(15), bits = _mm256_set1_epi8(48), middle = _mm256_set1_epi8(32);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const int side = i / 4, quarter = i % 4;
            __m256i low = _mm256_loadu_si256((const __m256i*)(b + side * 64 + quarter % 2 * 32));
            if (quarter / 2) low = _mm256_srli_epi16(low, 4);
            __m256i high = _mm256_loadu_si256((const __m256i*)(b + 128 + side * 32));
            high = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
            const __m256i code = _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(high, bits));
            to[i] = scaled_bytes(_mm256_sub_epi8(code, middle), _mm512_set1_ps(scale[2 * i]), _mm512_set1_ps(scale[2 * i + 1]));
        }
    }
};

// A matrix that is laid out as bfloat16, rows `stride` apart. next: what is read after it, of which each step asks for `pace` bytes.
struct FormatRows {
    static constexpr int64_t RUN = 32;
    static constexpr bool QUADS = false, DECODED = true;
    const bf16* rows;
    const int64_t stride;
    const char* next;
    int64_t pace;
    typedef const bf16* Row;
    Row row(int64_t o, int64_t) { return rows + o * stride; }
    INLINE void decode(Row r, int64_t k, int64_t left, __m512i* to) {
        to[0] = _mm512_maskz_loadu_epi16(first_lanes(left), r + k);
        _mm_prefetch(next, _MM_HINT_T0);
        next += pace;
    }
};

// 128 numbers in order <-> four apart: register i, lane j is number 4 j + i.
INLINE void into_quads(const bf16* from, bf16* to) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32), c = _mm512_loadu_si512(from + 64), d = _mm512_loadu_si512(from + 96);
    alignas(64) static const int16_t order[4][32] = {
#define FOURTH(I) {I, I + 4, I + 8, I + 12, I + 16, I + 20, I + 24, I + 28, I + 32, I + 36, I + 40, I + 44, I + 48, I + 52, I + 56, I + 60}
        FOURTH(0), FOURTH(1), FOURTH(2), FOURTH(3)};
#undef FOURTH
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i by = _mm512_load_si512(order[i]);
        const __m512i low = _mm512_permutex2var_epi16(a, by, b), high = _mm512_permutex2var_epi16(c, by, d);
        _mm512_storeu_si512(to + 32 * i, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
}
INLINE void out_of_quads(__m512i* r) {
    alignas(64) static const int32_t order[2][16] = {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
                                                     {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
    const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    __m512i made[4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {  // lane i of both: numbers 4 i, 4 i + 1 and 4 i + 2, 4 i + 3
        const __m512i a = interleaved(r[0], r[1], half), b = interleaved(r[2], r[3], half);
        made[2 * half] = _mm512_permutex2var_epi32(a, first, b), made[2 * half + 1] = _mm512_permutex2var_epi32(a, second, b);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = made[i];
}

}  // namespace
#endif
