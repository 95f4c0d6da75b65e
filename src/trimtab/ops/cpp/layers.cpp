// All layers of a forward in one call: Llama and its kin, bfloat16 on matrix tiles, few rows, LoRA, IA3 and bottleneck adapters beside the base.
// A step of few rows otherwise spends as long between kernels as in the small ones. H hidden, I inside the MLP.

#include <map>

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
// What adapters do at one place. kind: a number of `Kind`; first, width: the module's outputs in a row of the place's; tables: a Lora, the
// addresses of g, or a Bottleneck. As ops/stack.py lays them out.
enum Kind : int64_t { LORA, SCALE_INPUT, SCALE_OUTPUT, BEHIND, BESIDE };
struct Edit {
    int64_t kind, first, width;
    const void* tables;
};
struct Edits {
    int64_t count;
    const Edit* each;
};
// x [T, hidden] holds the embeddings, then what is added up. pool: numbers from one layer's keys to the next one's. edits: for each layer those
// at q|k|v, o, gate|up, down and the whole MLP, or null; slot: each row's adapter, -1 for none.
struct Step {
    bf16* x;
    const bf16 *norm, *cos, *sin;
    bf16 *out, *keys, *values;
    int64_t pool;
    const int64_t* write;
    Paging paging;
    const int32_t* slot;
    const Edits* edits;
    int64_t T;
};

const int64_t PLACES = 5;

static void edit_input(const Step& s, int64_t place, bf16* x, int64_t inputs) {
    for (int64_t i = 0; s.edits && i < s.edits[place].count; i++) {
        const Edit& e = s.edits[place].each[i];
        if (e.kind == SCALE_INPUT) scale(x, inputs, s.slot, (const int64_t*)e.tables, s.T, inputs);
    }
}

// y [T, outputs] is what the place's modules give for x [T, inputs].
static void edit(const Step& s, int64_t place, const bf16* x, bf16* y, int64_t inputs, int64_t outputs) {
    for (int64_t i = 0; s.edits && i < s.edits[place].count; i++) {
        const auto [kind, first, width, tables] = s.edits[place].each[i];
        bf16* part = y + first;
        if (kind == LORA) lora(x, inputs, y, outputs, s.slot, *(const Lora*)tables, s.T, inputs);
        if (kind == SCALE_OUTPUT) scale(part, outputs, s.slot, (const int64_t*)tables, s.T, width);
        if (kind == BEHIND) bottleneck((const bf16*)part, outputs, part, outputs, s.slot, *(const Bottleneck*)tables, s.T, width, width);
        if (kind == BESIDE) bottleneck(x, inputs, part, outputs, s.slot, *(const Bottleneck*)tables, s.T, inputs, width);
    }
}

static void run(const Layer* layers, const Shape& f, const Step& s) {
    const int64_t T = s.T, H = f.hidden, I = f.inside, attended = f.heads * f.head_dim, qkv_width = attended + 2 * f.kv_heads * f.head_dim;
    static thread_local std::vector<bf16> scratch;
    scratch.resize(T * (2 * H + qkv_width + attended + 3 * I));
    bf16 *h = scratch.data(), *y = h + T * H, *qkv = y + T * H, *a = qkv + T * qkv_width, *gate_up = a + T * attended, *inner = gate_up + 2 * T * I;
    std::map<int64_t, AttentionWork> works;  // by window
    for (int64_t i = 0; i < f.layers; i++) works.try_emplace(layers[i].window, s.paging, T, f.heads, f.kv_heads, f.head_dim, layers[i].window);
    as_team(true, [=, &works] {
        for (int64_t i = 0; i < f.layers; i++) {
            const Layer& l = layers[i];
            bf16 *keys = s.keys + i * s.pool, *values = s.values + i * s.pool;
            add_rms_norm(s.x, i ? y : nullptr, l.input_norm, h, T, H, float(f.eps));
            matmul(h, H, l.qkv, l.qkv_bias, qkv, qkv_width, T, H, qkv_width);
            edit(s, PLACES * i, h, qkv, H, qkv_width);
            rotate_and_write(qkv, qkv_width, s.cos, s.sin, l.q_norm, l.k_norm, float(f.eps), keys, values, s.write, T, f.heads, f.kv_heads,
                             f.head_dim);
            attend(qkv, qkv_width, keys, values, a, float(l.scaling), works.at(l.window));
            edit_input(s, PLACES * i + 1, a, attended);
            matmul(a, attended, l.o, l.o_bias, y, H, T, attended, H);
            edit(s, PLACES * i + 1, a, y, attended, H);
            add_rms_norm(s.x, y, l.mlp_norm, h, T, H, float(f.eps));
            edit_input(s, PLACES * i + 4, h, H);
            matmul(h, H, l.gate_up, l.gate_up_bias, gate_up, 2 * I, T, H, 2 * I);
            edit(s, PLACES * i + 2, h, gate_up, H, 2 * I);
            swiglu(gate_up, inner, T, I);
            edit_input(s, PLACES * i + 3, inner, I);
            matmul(inner, I, l.down, l.down_bias, y, H, T, I, H);
            edit(s, PLACES * i + 3, inner, y, I, H);
            edit(s, PLACES * i + 4, h, y, H, H);
        }
        add_rms_norm(s.x, y, s.norm, s.out, T, H, float(f.eps));
    });
}

extern "C" {
void layers_bf16(void* layers, void* shape, void* step) { run((const Layer*)layers, *(const Shape*)shape, *(const Step*)step); }
}
#endif
