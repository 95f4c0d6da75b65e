// LoRA beside a frozen linear layer in training, in bfloat16 on matrix tiles: t = x A^T, y += t B^T, and the gradients of A, B and x.
// T rows, I inputs, O outputs (multiples of 32), R rank. Each thread takes a run of rows, in blocks that stay in its cache between the
// products that read them: x, y and dy come from memory once. Sums over rows are added up in the order of the threads.

#include "lanes.h"

#ifdef TILES
#include <omp.h>

namespace {

const int64_t BLOCK = 128;

// Memory of the calling thread. use: a number for each.
template <class X> X* kept(int use, int64_t count) {
    static thread_local Scratch memory[3];
    memory[use].reserve(count * sizeof(X));
    return memory[use].take<X>(count);
}

// Tiles 0 and 1: sums, `rows` by 16; 4: a left side, `rows` by `depth`; 6 and 7: right sides, `depth` by 16, two rows in one.
struct Tiles {
    TileConfig config;
    int64_t rows = 0, depth = 0;

    void shape(int64_t rows_, int64_t depth_) {
        if (rows == rows_ && depth == depth_) return;
        rows = rows_, depth = depth_;
        for (int i : {0, 1}) config.shape(i, rows, 64);
        config.shape(4, rows, 2 * depth);
        for (int i : {6, 7}) config.shape(i, depth / 2, 64);
        config.load();
    }
    ~Tiles() { _tile_release(); }
};

// A factor of K rows and N columns as right sides: [N / 16][K / depth][depth / 2][16][2], zeros around it.
struct Right {
    int64_t K, N, depth, steps = (K + depth - 1) / depth, columns = (N + 15) / 16;
    bf16* at;

    Right(int use, int64_t K, int64_t N, int64_t depth) : K(K), N(N), depth(depth), at(kept<bf16>(use, columns * steps * depth * 16)) {}
    const bf16* tile(int64_t column, int64_t step) const { return at + (column * steps + step) * depth * 16; }
    void fill(const bf16* w, int64_t by_k, int64_t by_n) const {  // from w[k * by_k + n * by_n], by all threads; they meet behind it
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < columns * steps; tile++) {
            const int64_t n0 = tile / steps * 16, k0 = tile % steps * depth, n = std::min<int64_t>(16, N - n0), k = std::min(depth, K - k0);
            bf16* to = at + tile * depth * 16;
            if (n < 16 || k < depth) std::memset(to, 0, depth * 16 * sizeof(bf16));
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = 0; j < n; j++) to[i / 2 * 32 + 2 * j + i % 2] = w[(k0 + i) * by_k + (n0 + j) * by_n];
        }
    }
};

// A block of rows of rank R: as rows [BLOCK, wide], and turned [wide, BLOCK]. Columns from R on are zeros; behind the last row of a block
// stand those of the one before, which `outer` multiplies by zeros.
struct Thin {
    int64_t R, depth = R <= 16 ? 16 : 32, wide = (R + depth - 1) / depth * depth;
    std::unique_ptr<bf16[]> rows{new bf16[BLOCK * wide]()}, turned{new bf16[BLOCK * wide]()};

    explicit Thin(int64_t R) : R(R) {}
    void turn(int64_t n) {
        for (int64_t r = 0; r < R; r++)
            for (int64_t i = 0; i < n; i++) turned[r * BLOCK + i] = rows[i * wide + r];
    }
    void read(const bf16* t, int64_t n) {
        for (int64_t i = 0; i < n; i++) std::memcpy(&rows[i * wide], t + i * R, R * sizeof(bf16));
    }
    void write(bf16* t, int64_t n) const {
        for (int64_t i = 0; i < n; i++) std::memcpy(t + i * R, &rows[i * wide], R * sizeof(bf16));
    }
};

// to = m W for n rows of m. Even and odd steps have sums of their own, so that one need not wait for the other.
void shrink(Tiles& tiles, const bf16* m, int64_t stride, const Right& W, int64_t n, Thin& to) {
    alignas(64) float even[16 * 16], odd[16 * 16];
    for (int64_t from = 0; from < n; from += 16) {
        const int64_t rows = std::min<int64_t>(16, n - from);
        tiles.shape(rows, 32);
        for (int64_t c = 0; c < W.columns; c++) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t k = 0; k < W.steps; k += 2) {
                _tile_loadd(4, m + from * stride + k * 32, stride * 2);
                _tile_loadd(6, W.tile(c, k), 64);
                _tile_dpbf16ps(0, 4, 6);
                if (k + 1 == W.steps) break;
                _tile_loadd(4, m + from * stride + k * 32 + 32, stride * 2);
                _tile_loadd(7, W.tile(c, k + 1), 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, even, 64);
            _tile_stored(1, odd, 64);
            for (int64_t i = 0; i < rows; i++) store(&to.rows[(from + i) * to.wide + c * 16], load(even + i * 16) + load(odd + i * 16));
        }
    }
}

// y += t W for n rows of y
void expand(Tiles& tiles, const Thin& t, const Right& W, int64_t n, bf16* y, int64_t stride) {
    alignas(64) float low[16 * 16], high[16 * 16];
    written();
    for (int64_t from = 0; from < n; from += 16) {
        const int64_t rows = std::min<int64_t>(16, n - from);
        tiles.shape(rows, W.depth);
        for (int64_t c = 0; c < W.columns; c += 2) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t k = 0; k < W.steps; k++) {
                _tile_loadd(4, &t.rows[from * t.wide + k * W.depth], t.wide * 2);
                _tile_loadd(6, W.tile(c, k), 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, W.tile(c + 1, k), 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, low, 64);
            _tile_stored(1, high, 64);
            for (int64_t i = 0; i < rows; i++) {
                bf16* to = y + (from + i) * stride + c * 16;
                const Lanes a = load(to) + load(low + i * 16), b = load(to + 16) + load(high + i * 16);
                _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
            }
        }
    }
}

// sums += t^T m for n rows and N columns of m. sums: [N / 32][wide / 16][2][16][16]; of 32 columns the first half has 0-3, 8-11, 16-19 and
// 24-27, as the unpacking instructions leave them.
void outer(Tiles& tiles, const Thin& t, const bf16* m, int64_t stride, int64_t n, int64_t N, float* sums) {
    alignas(64) bf16 first[BLOCK * 16], second[BLOCK * 16];
    tiles.shape(16, 32);
    for (int64_t c = 0; c < N; c += 32) {
        for (int64_t i = 0; i < (n + 31) / 32 * 32; i += 2) {
            const __m512i a = i < n ? _mm512_loadu_si512(m + i * stride + c) : _mm512_setzero_si512();
            const __m512i b = i + 1 < n ? _mm512_loadu_si512(m + (i + 1) * stride + c) : _mm512_setzero_si512();
            _mm512_store_si512(first + i * 16, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(second + i * 16, _mm512_unpackhi_epi16(a, b));
        }
        written();
        for (int64_t r = 0; r < t.wide; r += 16, sums += 512) {
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, sums + 256, 64);
            for (int64_t k = 0; k < n; k += 32) {
                _tile_loadd(4, &t.turned[r * BLOCK + k], BLOCK * 2);
                _tile_loadd(6, first + k * 16, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, second + k * 16, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + 256, 64);
        }
    }
}

// to[r * by_r + n * by_n] = what the threads left in their `sums`, each `size` behind the one before, added up in order; by all threads.
void add_up(const float* sums, int64_t size, int64_t wide, int64_t R, int64_t N, bf16* to, int64_t by_r, int64_t by_n) {
    const int64_t threads = omp_get_num_threads();
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < N / 32; c++)
        for (int64_t r = 0; r < R; r++)
            for (int64_t n = 0; n < 32; n++) {
                const float* from = sums + ((c * wide / 16 + r / 16) * 2 + n / 4 % 2) * 256 + r % 16 * 16 + n / 8 * 4 + n % 4;
                float sum = 0;
                for (int64_t i = 0; i < threads; i++) sum += from[i * size];
                down(sum, to + r * by_r + (c * 32 + n) * by_n);
            }
}

// step(from, n) for each block of the calling thread's run of rows.
template <class Step> void in_blocks(int64_t T, Step step) {
    const int64_t threads = omp_get_num_threads(), each = (T + 16 * threads - 1) / (16 * threads) * 16;
    const int64_t start = omp_get_thread_num() * each, stop = std::min(T, start + each);
    for (int64_t from = start; from < stop; from += BLOCK) step(from, std::min(BLOCK, stop - from));
}

}  // namespace

extern "C" {

// t = x A^T, y += t B^T
void lora_forward_bf16(const bf16* x, int64_t x_stride, const bf16* A, const bf16* B, bf16* t, bf16* y, int64_t y_stride, int64_t T,
                       int64_t I, int64_t O, int64_t R) {
    const Right right_A(0, I, R, 32), right_B(1, R, O, Thin(R).depth);
#pragma omp parallel
    {
        Tiles tiles;
        Thin thin(R);
        right_A.fill(A, 1, I);
        right_B.fill(B, 1, R);
#pragma omp barrier
        in_blocks(T, [&](int64_t from, int64_t n) {
            shrink(tiles, x + from * x_stride, x_stride, right_A, n, thin);
            thin.write(t + from * R, n);
            expand(tiles, thin, right_B, n, y + from * y_stride, y_stride);
        });
    }
}

// dt = dy B; dA = dt^T x and dB = dy^T t, dx += dt A, each where it is given
void lora_backward_bf16(const bf16* dy, int64_t dy_stride, const bf16* x, int64_t x_stride, const bf16* t, const bf16* A, const bf16* B,
                        bf16* dA, bf16* dB, bf16* dx, int64_t dx_stride, int64_t T, int64_t I, int64_t O, int64_t R) {
    const Thin shape(R);
    const Right right_B(0, O, R, 32), right_A(1, R, dx ? I : 0, shape.depth);
    const int64_t wide = shape.wide, size = dA ? wide * (I + O) : 0;
    float* sums = kept<float>(2, omp_get_max_threads() * size);
#pragma omp parallel
    {
        Tiles tiles;
        Thin thin(R), dthin(R);
        float *sums_A = sums + omp_get_thread_num() * size, *sums_B = sums_A + wide * I;
        std::memset(sums_A, 0, size * sizeof(float));
        right_B.fill(B, R, 1);
        right_A.fill(A, I, 1);
#pragma omp barrier
        in_blocks(T, [&](int64_t from, int64_t n) {
            shrink(tiles, dy + from * dy_stride, dy_stride, right_B, n, dthin);
            if (dA) {
                thin.read(t + from * R, n);
                thin.turn(n);
                outer(tiles, thin, dy + from * dy_stride, dy_stride, n, O, sums_B);
            }
            if (dx) expand(tiles, dthin, right_A, n, dx + from * dx_stride, dx_stride);
            if (dA) {
                dthin.turn(n);
                outer(tiles, dthin, x + from * x_stride, x_stride, n, I, sums_A);
            }
        });
        if (dA) {
#pragma omp barrier
            add_up(sums, size, wide, R, I, dA, I, 1);
            add_up(sums + wide * I, size, wide, R, O, dB, 1, R);
        }
    }
}
}
#endif
