// Numbers of quantised matrices in float, for processors and types without a way of their own.

#pragma once

#include "quantized.h"

namespace {

inline float float_of_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float half_up(const uint8_t* p) {  // IEEE half precision
    const uint32_t h = p[0] | p[1] << 8, rest = h & 0x7fff;
    const float size = rest >= 0x7c00  ? float_of_bits(rest << 13 | 0x7f800000)
                       : rest < 0x0400 ? float(rest) * 0x1p-24f
                                       : float_of_bits((rest << 13) + (112u << 23));
    return h >> 15 ? -size : size;
}
inline float eight_up(uint8_t b) {  // float8 e4m3fn
    const uint32_t rest = b & 127;
    const float size = rest == 127 ? NAN : rest < 8 ? float(rest) * 0x1p-9f : float_of_bits((rest << 20) + (120u << 23));
    return b >> 7 ? -size : size;
}
inline float power_up(uint8_t e) { return e ? float_of_bits(uint32_t(e) << 23) : 0x1p-127f; }

// A product that is rounded before something is added to it, as whoever wrote the format does: compilers make one operation of both.
inline float alone(float product) {
    asm("" : "+m"(product));
    return product;
}

inline float absmax_of(const Quantized& W, int64_t block) {
    if (!W.part[3]) return ((const float*)W.part[2])[block];
    const float nested = ((const float*)W.part[3])[((const uint8_t*)W.part[2])[block]];
    return alone(nested * ((const float*)W.part[4])[block / W.nested_block]) + float(W.nested_offset);
}

// Scale and minimum of run j of a block of Q4_K.
inline void scale_of_run(const uint8_t* s, int64_t j, int* scale, int* least) {
    *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    *least = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

// part(block, i, stop, out) for each block of `size` of which numbers are among n from `first` on: its numbers i .. stop, and where to write them.
template <class Part> inline void by_block(int64_t first, int64_t n, int64_t size, float* to, Part part) {
    while (n > 0) {
        const int64_t i = first % size, count = std::min(n, size - i);
        part(first / size, i, i + count, to);
        first += count, n -= count, to += count;
    }
}

// Numbers from `first` on, two in a byte, from a table of what each code is.
template <bool high_first> inline void look_up(const uint8_t* codes, int64_t first, int64_t count, const float* table, float* to) {
    for (int64_t i = 0; i < count; i++) to[i] = table[codes[(first + i) / 2] >> ((first + i) % 2 != high_first ? 4 : 0) & 15];
}

// W[o][k .. k + n). What numbers of a block share is computed once; the loops over them are for the compiler to vectorise.
inline void plain_row(const Quantized& W, int64_t o, int64_t k, int64_t n, float* to) {
    const uint8_t *codes = (const uint8_t*)W.part[0], *part2 = (const uint8_t*)W.part[2];
    const float* part1 = (const float*)W.part[1];
    const int64_t first = o * W.I + k;
    float table[16];
    const auto fill = [&](auto number) {
        for (int c = 0; c < 16; c++) table[c] = number(c);
    };
    switch (W.kind) {
        case CODE4:
            return by_block(first, n, W.block, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const float absmax = absmax_of(W, block);
                fill([&](int c) { return part1[c] * absmax; });
                look_up<true>(codes, block * W.block + i, stop - i, table, out);
            });
        case DENSE:
            for (int64_t i = 0; i < n; i++) to[i] = up(((const bf16*)codes)[first + i]);
            return;
        case INT8:
            for (int64_t i = 0; i < n; i++) to[i] = float(int8_t(codes[first + i])) * part1[o];
            return;
        case INT8_GROUPS:
            return by_block(first, n, W.block, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const float scale = part1[block];
                const int zero = int8_t(part2[block]);
                for (const uint8_t* p = codes + block * W.block; i < stop; i++) *out++ = float(int8_t(p[i]) - zero) * scale;
            });
        case FP8:
            return by_block(k, n, W.block, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const float scale = part1[o / W.block_rows * ((W.I + W.block - 1) / W.block) + block];
                for (const uint8_t* p = codes + o * W.I + block * W.block; i < stop; i++) *out++ = eight_up(p[i]) * scale;
            });
        case INT4:
            return by_block(first, n, W.block, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                fill([&](int c) { return float(c - part2[block]) * part1[block]; });
                look_up<true>(codes, block * W.block + i, stop - i, table, out);
            });
        case MXFP4:
            return by_block(first, n, 32, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const float scale = power_up(part2[block]);
                fill([&](int c) { return part1[c] * scale; });
                look_up<false>(codes, block * 32 + i, stop - i, table, out);
            });
        case Q4_0:
            return by_block(first, n, 32, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const uint8_t* p = codes + block * 18;
                const float d = half_up(p);
                for (; i < stop; i++) *out++ = d * float((p[2 + i % 16] >> (i < 16 ? 0 : 4) & 15) - 8);
            });
        case Q8_0:
            return by_block(first, n, 32, to, [&](int64_t block, int64_t i, int64_t stop, float* out) {
                const uint8_t* p = codes + block * 34;
                const float d = half_up(p);
                for (; i < stop; i++) *out++ = d * float(int8_t(p[2 + i]));
            });
        case Q4_K:
            return by_block(first, n, 32, to, [&](int64_t run, int64_t i, int64_t stop, float* out) {
                const uint8_t *p = codes + run / 8 * 144, *mine = p + 16 + run % 8 / 2 * 32;
                int scale, least;
                scale_of_run(p + 4, run % 8, &scale, &least);
                const float d = half_up(p) * float(scale), below = alone(half_up(p + 2) * float(least));
                fill([&](int c) { return alone(d * float(c)) - below; });
                for (; i < stop; i++) *out++ = table[mine[i] >> (run % 2 * 4) & 15];
            });
        case Q6_K:
            return by_block(first, n, 16, to, [&](int64_t run, int64_t i, int64_t stop, float* out) {
                const uint8_t* p = codes + run / 16 * 210;
                const int64_t side = run % 16 / 8, quarter = run % 8 / 2, at = run % 2 * 16;
                const uint8_t *low = p + side * 64 + quarter % 2 * 32 + at, *high = p + 128 + side * 32 + at;
                const float d = half_up(p + 208) * float(int8_t(p[192 + run % 16]));
                for (; i < stop; i++) *out++ = d * float((low[i] >> (quarter / 2 * 4) & 15 | (high[i] >> 2 * quarter & 3) << 4) - 32);
            });
    }
}

}  // namespace
