// Matmuls by a frozen weight on the processor's matrix tiles (AMX).

#include "inference.h"

#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

bool may_tile() {
#ifdef TILES
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return granted;
#else
    return false;
#endif
}

#ifdef TILES

// sums [32, 32] = 16 rows at a, and 16 more at b where `both`, times a block of weights. ahead: fetch weights that are read soon.
template <bool both>
static void multiply(const bf16* a, const bf16* b, int64_t stride, const bf16* w, int64_t steps, bool ahead, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        if (ahead) fetch(w + (k + 8) * 1024, 2048);
        _tile_loadd(4, a + k * 32, stride * 2);
        _tile_loadd(6, w + k * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + k * 1024 + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, b + k * 32, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (both) {
        _tile_stored(2, sums + 16 * 32, 128);
        _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
}

// At its end, also where a thread leaves a crew in the middle.
struct Released {
    ~Released() { _tile_release(); }
};

// y = x W^T + bias on tiles: W is packed in blocks of 32 outputs, each block a run of [K / 32][2][16 pairs][16 outputs][2]. A row's result
// does not depend on how many rows there are.
void matmul(const bf16* x, int64_t x_stride, const bf16* W, const bf16* bias, bf16* y, int64_t y_stride, int64_t M, int64_t K, int64_t O) {
    const int64_t blocks = (O + 31) / 32, steps = K / 32;
    const Released released;
    TileConfig config;
    alignas(64) float sums[32 * 32];
    int64_t configured = -1;
    share(blocks, 8 * K * std::min<int64_t>(M, 32), [&](int64_t n) {
        const bf16* w = W + n * steps * 1024;
        for (int64_t m = 0; m < M; m += 32) {
            const int64_t rows = std::min<int64_t>(32, M - m), upper = std::min<int64_t>(16, rows), lower = rows - upper;
            if (rows != configured) {
                config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(upper);
                config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(std::max<int64_t>(1, lower));
                config.rows[6] = config.rows[7] = 16;
                config.load();
                configured = rows;
            }
            const bf16 *a = x + m * x_stride, *b = a + 16 * x_stride;
            if (lower)
                multiply<true>(a, b, x_stride, w, steps, m == 0, sums);
            else
                multiply<false>(a, b, x_stride, w, steps, m == 0, sums);
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
    });
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

extern "C" {

int64_t trimtab_tiles() { return may_tile(); }

// Whether products of bfloat16 run here: the attention of attention.cpp, the one call of layers.cpp.
int64_t trimtab_attends() {
#if defined(__AVX512BF16__) && !defined(TILES)
    return 1;
#else
    return may_tile();
#endif
}

#ifdef TILES
void pack_bf16(void* W, void* to, int64_t K, int64_t O) { pack((const bf16*)W, (bf16*)to, K, O); }
#endif
}
