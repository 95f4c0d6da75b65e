// Kernels of training on a CPU: the row-wise parts of a layer, forward and backward. Arithmetic is in float; results are rounded once.
// T rows, H heads, I intermediate size, D head size.

#include "lanes.h"

// 1 / (1 + e^-x), e^ as in common.h; 0 below -88.
static inline Lanes sigmoid(Lanes x) {
    Lanes y = -x;
    y = y < -87.0f ? Lanes{} - 87.0f : y;
    y = y > 88.0f ? Lanes{} + 88.0f : y;
    const Lanes k = (y * LOG2_E + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const Bits power = (Bits)(k + 12583039.0f) << 23;  // 2^k: the low bits of that sum are k + 127
    const Lanes d = 1.0f + exp_rest(y, k) * (Lanes)power;
#ifdef __AVX512BF16__
    const Lanes near = (Lanes)_mm512_rcp14_ps((__m512)d), s = near * (2.0f - d * near);
#else
    const Lanes s = 1.0f / d;
#endif
    return x < -88.0f ? Lanes{} : s;  // so that -inf times it is NaN, as in torch
}

// out = w * (x / sqrt(mean x^2 + eps)), x / … rounded before w as Llama does; rstd: 1 / sqrt(…) of each row, for the backward.
template <class V>
static void rms_norm_forward(const V* x, const V* w, V* out, float* rstd, int64_t T, int64_t width, float eps) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V* row = x + t * width;
        V* to = out + t * width;
        Lanes sum = {};
        in_lanes(width, [&](int64_t i, int64_t n) {
            const Lanes v = load(row + i, n);
            sum += v * v;
        });
        const float by = rstd[t] = 1.0f / std::sqrt(total(sum) / width + eps);
        in_lanes(width, [&](int64_t i, int64_t n) { store(to + i, rounded<V>(load(row + i, n) * by) * load(w + i, n), n); });
    }
}

// dx = rstd * g - x * rstd^3 * mean(g * x) with g = dy * w.
template <class V>
static void rms_norm_backward(const V* dy, const V* x, const V* w, const float* rstd, V* dx, int64_t T, int64_t width) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *g = dy + t * width, *row = x + t * width;
        V* to = dx + t * width;
        Lanes sum = {};
        in_lanes(width, [&](int64_t i, int64_t n) { sum += load(g + i, n) * load(w + i, n) * load(row + i, n); });
        const float by = rstd[t], along = -total(sum) / width * by * by * by;
        in_lanes(width, [&](int64_t i, int64_t n) {
            store(to + i, load(g + i, n) * load(w + i, n) * by + load(row + i, n) * along, n);
        });
    }
}

// out = silu(gate) * value
template <class V>
static void swiglu_forward(const V* gate, int64_t gate_stride, const V* value, int64_t value_stride, V* out, int64_t T, int64_t I) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *a = gate + t * gate_stride, *b = value + t * value_stride;
        V* to = out + t * I;
        in_lanes(I, [&](int64_t i, int64_t n) {
            const Lanes g = load(a + i, n);
            store(to + i, g * sigmoid(g) * load(b + i, n), n);
        });
    }
}

// dgate = dy * value * s * (1 + gate * (1 - s)) with s = sigmoid(gate), dvalue = dy * gate * s
template <class V>
static void swiglu_backward(const V* dy, const V* gate, int64_t gate_stride, const V* value, int64_t value_stride, V* dgate, V* dvalue,
                            int64_t T, int64_t I) {
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *d = dy + t * I, *a = gate + t * gate_stride, *b = value + t * value_stride;
        V *to_a = dgate + t * I, *to_b = dvalue + t * I;
        in_lanes(I, [&](int64_t i, int64_t n) {
            const Lanes g = load(a + i, n), s = sigmoid(g), slope = load(d + i, n) * s;
            store(to_a + i, slope * load(b + i, n) * (1.0f + g * (1.0f - s)), n);
            store(to_b + i, slope * g, n);
        });
    }
}

// Each head's halves (a, b) become (a cos - b sin, b cos + a sin), cos and sin [T, D] with halves of their own. back: the transpose.
template <class V>
static void rotate(const V* x, int64_t row_stride, int64_t head_stride, const V* cos, const V* sin, V* out, int64_t T, int64_t H, int64_t D,
                   bool back) {
    const int64_t half = D / 2;
    const float sign = back ? -1.0f : 1.0f;
#pragma omp parallel for if (T > 1) schedule(static)
    for (int64_t t = 0; t < T; t++) {
        const V *cos_a = cos + t * D, *cos_b = cos_a + half;
        const V *sin_a = sin + t * D + (back ? half : 0), *sin_b = sin + t * D + (back ? 0 : half);
        for (int64_t h = 0; h < H; h++) {
            const V *a = x + t * row_stride + h * head_stride, *b = a + half;
            V* to = out + (t * H + h) * D;
            in_lanes(half, [&](int64_t d, int64_t n) {
                const Lanes p = load(a + d, n), q = load(b + d, n);
                store(to + d, p * load(cos_a + d, n) - q * (sign * load(sin_a + d, n)), n);
                store(to + half + d, q * load(cos_b + d, n) + p * (sign * load(sin_b + d, n)), n);
            });
        }
    }
}

extern "C" {

FOR_EACH(rms_norm_forward, (void* x, void* w, void* out, float* rstd, int64_t T, int64_t width, double eps),
         rms_norm_forward((const V*)x, (const V*)w, (V*)out, rstd, T, width, float(eps)))

FOR_EACH(rms_norm_backward, (void* dy, void* x, void* w, float* rstd, void* dx, int64_t T, int64_t width),
         rms_norm_backward((const V*)dy, (const V*)x, (const V*)w, rstd, (V*)dx, T, width))

FOR_EACH(swiglu_forward, (void* gate, int64_t gate_stride, void* value, int64_t value_stride, void* out, int64_t T, int64_t I),
         swiglu_forward((const V*)gate, gate_stride, (const V*)value, value_stride, (V*)out, T, I))

FOR_EACH(swiglu_backward,
         (void* dy, void* gate, int64_t gate_stride, void* value, int64_t value_stride, void* dgate, void* dvalue, int64_t T, int64_t I),
         swiglu_backward((const V*)dy, (const V*)gate, gate_stride, (const V*)value, value_stride, (V*)dgate, (V*)dvalue, T, I))

FOR_EACH(rotate,
         (void* x, int64_t row_stride, int64_t head_stride, void* cos, void* sin, void* out, int64_t T, int64_t H, int64_t D, int64_t back),
         rotate((const V*)x, row_stride, head_stride, (const V*)cos, (const V*)sin, (V*)out, T, H, D, back != 0))
}
