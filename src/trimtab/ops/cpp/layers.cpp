// All layers of a forward in one call: Llama and its kin, bfloat16 on matrix tiles, few rows, LoRA and nothing else beside the base.
// A step of few rows otherwise spends as long between kernels as in the small ones. H hidden, I inside the MLP.

#include <vector>

#include "inference.h"

#ifdef TILES
// As ops/stack.py lays them out.
struct Layer {
    const bf16 *input_norm, *mlp_norm, *q_norm, *k_norm, *qkv, *qkv_bias, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias;
    double scaling;
    int64_t window;
};
struct Shape {
    int64_t layers, hidden, heads, kv_heads, head_dim, inside;
    double eps;
};
// x [T, hidden] holds the embeddings, then what is added up. pool: numbers from one layer's keys to the next one's. lora: for each layer the
// factors at q|k|v, o, gate|up and down, null where there are none; slot: each row's adapter, -1 for none.
struct Step {
    bf16* x;
    const bf16 *norm, *cos, *sin;
    bf16 *out, *keys, *values;
    int64_t pool;
    const int64_t* write;
    Paging paging;
    const int32_t* slot;
    const Lora* const* lora;
    int64_t T;
};

static void edit(const Step& s, int64_t site, const bf16* x, bf16* y, int64_t inputs, int64_t outputs) {
    if (s.lora && s.lora[site]) lora(x, inputs, y, outputs, s.slot, *s.lora[site], s.T, inputs);
}

static void run(const Layer* layers, const Shape& f, const Step& s) {
    const int64_t T = s.T, H = f.hidden, I = f.inside, attended = f.heads * f.head_dim, qkv_width = attended + 2 * f.kv_heads * f.head_dim;
    static thread_local std::vector<bf16> scratch;
    scratch.resize(T * (2 * H + qkv_width + attended + 3 * I));
    bf16 *h = scratch.data(), *y = h + T * H, *qkv = y + T * H, *a = qkv + T * qkv_width, *gate_up = a + T * attended, *inner = gate_up + 2 * T * I;
    as_team(true, [=] {
        for (int64_t i = 0; i < f.layers; i++) {
            const Layer& l = layers[i];
            bf16 *keys = s.keys + i * s.pool, *values = s.values + i * s.pool;
            add_rms_norm(s.x, i ? y : nullptr, l.input_norm, h, T, H, float(f.eps));
            matmul(h, H, l.qkv, l.qkv_bias, qkv, qkv_width, T, H, qkv_width);
            edit(s, 4 * i, h, qkv, H, qkv_width);
            rotate_and_write(qkv, qkv_width, s.cos, s.sin, l.q_norm, l.k_norm, float(f.eps), keys, values, s.write, T, f.heads, f.kv_heads,
                             f.head_dim);
            attend(qkv, qkv_width, keys, values, a, s.paging, T, f.heads, f.kv_heads, f.head_dim, float(l.scaling), l.window);
            matmul(a, attended, l.o, l.o_bias, y, H, T, attended, H);
            edit(s, 4 * i + 1, a, y, attended, H);
            add_rms_norm(s.x, y, l.mlp_norm, h, T, H, float(f.eps));
            matmul(h, H, l.gate_up, l.gate_up_bias, gate_up, 2 * I, T, H, 2 * I);
            edit(s, 4 * i + 2, h, gate_up, H, 2 * I);
            swiglu(gate_up, inner, T, I);
            matmul(inner, I, l.down, l.down_bias, y, H, T, I, H);
            edit(s, 4 * i + 3, inner, y, I, H);
        }
        add_rms_norm(s.x, y, s.norm, s.out, T, H, float(f.eps));
    });
}

extern "C" {
void layers_bf16(void* layers, void* shape, void* step) { run((const Layer*)layers, *(const Shape*)shape, *(const Step*)step); }
}
#endif
