// Kernels of inference on a CPU, for batches of few rows, where one call of a large library costs more than the work itself.
// T rows, H query heads, G key heads, D head size, I inputs, O outputs, R rank, S adapters.

#include "inference.h"

// x += y (where y is given), out = w * (x / sqrt(mean x^2 + eps)), x / … rounded before w as Llama does.
template <class V>
void add_rms_norm(V* x, const V* y, const V* w, V* out, int64_t T, int64_t width, float eps) {
    share(T, 4 * width, [=](int64_t t) {
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
    });
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
    share(T, 4 * (H + 2 * G) * D, [=](int64_t t) {
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
    });
}

// out = silu(gate) * up of rows [gate | up].
template <class V> void swiglu(const V* gate_up, V* out, int64_t T, int64_t I) {
    share(T, 8 * I, [=](int64_t t) {
        const V *gate = gate_up + t * 2 * I, *value = gate + I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            float g = up(gate[i]);
            down(g / (1.0f + fast_exp(-g)) * up(value[i]), out + t * I + i);
        }
    });
}

// Each row's largest value and the first place where it stands; NaN where the row holds one.
template <class V> static void largest(const V* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width) {
    share(T, 4 * width, [=](int64_t t) {
        const V* row = x + t * stride;
        float most = -std::numeric_limits<float>::infinity();
        int64_t bad = 0, at = 0;
#pragma omp simd reduction(max : most) reduction(+ : bad)
        for (int64_t i = 0; i < width; i++) most = std::max(most, up(row[i])), bad += up(row[i]) != up(row[i]);
        while (at < width - 1 && up(row[at]) != most) at++;
        value[t] = bad ? std::numeric_limits<float>::quiet_NaN() : most;
        place[t] = at;
    });
}

template void add_rms_norm(bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, float);
template void rotate_and_write(bf16*, int64_t, const bf16*, const bf16*, const bf16*, const bf16*, float, bf16*, bf16*, const int64_t*, int64_t,
                               int64_t, int64_t, int64_t);
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

FOR_EACH(swiglu, (void* gate_up, void* out, int64_t T, int64_t I),
         as_team(T > 1, [=] { swiglu((const V*)gate_up, (V*)out, T, I); }))

FOR_EACH(largest, (void* x, int64_t stride, float* value, int64_t* place, int64_t T, int64_t width),
         as_team(T > 1, [=] { largest((const V*)x, stride, value, place, T, width); }))
}
