// All layers of a forward in one call: Llama and its kin, bfloat16, few rows, weights dense or quantised, LoRA, IA3 and bottleneck adapters beside the base.
// A step of few rows otherwise spends as long between kernels as in the small ones. H hidden, I inside the MLP.

#include <map>

#include "quantized.h"

#ifdef __AVX512BF16__
// As ops/stack.py lays them out.
struct Layer {
    const bf16 *input_norm, *mlp_norm, *q_norm, *k_norm;
    const Projection *qkv, *o, *gate_up, *down;
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

// So many rows go through a layer at a time: what lies between its matrices stays in a core's own cache, and the next rows find the matrices
// in the cache that all cores share.
const int64_t AT_A_TIME = 128;

// The step's rows from `first` on, at most AT_A_TIME of them.
static Step part(const Step& whole, const Shape& f, int64_t first) {
    Step s = whole;
    s.T = std::min(AT_A_TIME, whole.T - first);
    s.x += first * f.hidden, s.out += first * f.hidden, s.cos += first * f.head_dim, s.sin += first * f.head_dim;
    s.write += first, s.paging.sequence += first, s.paging.length += first;
    if (s.edits) s.slot += first;
    return s;
}

// Layer i: x += y of the layer before, then its attention is added, and y [T, hidden] is what its MLP gives. memory: of what lies between.
static void layer(const Layer& l, const Shape& f, const Step& s, int64_t i, const AttentionWork& work, bf16* y, bf16* memory) {
    const int64_t T = s.T, H = f.hidden, I = f.inside, attended = f.heads * f.head_dim, qkv_width = attended + 2 * f.kv_heads * f.head_dim;
    bf16 *h = memory, *qkv = h + T * H, *a = qkv + T * qkv_width, *gate_up = a + T * attended, *inner = gate_up + 2 * T * I;
    bf16 *keys = s.keys + i * s.pool, *values = s.values + i * s.pool;
    add_rms_norm(s.x, i ? y : nullptr, l.input_norm, h, T, H, float(f.eps));
    project(*l.qkv, h, H, qkv, qkv_width, T);
    edit(s, PLACES * i, h, qkv, H, qkv_width);
    rotate_and_write(qkv, qkv_width, s.cos, s.sin, l.q_norm, l.k_norm, float(f.eps), keys, values, s.write, T, f.heads, f.kv_heads, f.head_dim);
    attend(qkv, qkv_width, keys, values, a, float(l.scaling), work);
    edit_input(s, PLACES * i + 1, a, attended);
    project(*l.o, a, attended, y, H, T);
    edit(s, PLACES * i + 1, a, y, attended, H);
    add_rms_norm(s.x, y, l.mlp_norm, h, T, H, float(f.eps));
    edit_input(s, PLACES * i + 4, h, H);
    project(*l.gate_up, h, H, gate_up, 2 * I, T);
    edit(s, PLACES * i + 2, h, gate_up, H, 2 * I);
    swiglu(gate_up, inner, T, I);
    edit_input(s, PLACES * i + 3, inner, I);
    project(*l.down, inner, I, y, H, T);
    edit(s, PLACES * i + 3, inner, y, I, H);
    edit(s, PLACES * i + 4, h, y, H, H);
}

static void run(const Layer* layers, const Shape& f, const Step& whole) {
    const int64_t H = f.hidden, width = H + 2 * (f.heads + f.kv_heads) * f.head_dim + 3 * f.inside;
    static thread_local std::vector<bf16> scratch;
    scratch.resize(whole.T * H + std::min(AT_A_TIME, whole.T) * width);
    bf16 *y = scratch.data(), *memory = y + whole.T * H;
    std::vector<Step> parts;
    for (int64_t t = 0; t < whole.T; t += AT_A_TIME) parts.push_back(part(whole, f, t));
    std::map<int64_t, std::vector<AttentionWork>> works;  // by window, of each part
    for (int64_t i = 0; i < f.layers; i++) {
        auto [at, fresh] = works.try_emplace(layers[i].window);
        for (const Step& s : parts)
            if (fresh) at->second.emplace_back(s.paging, s.T, f.heads, f.kv_heads, f.head_dim, layers[i].window);
    }
    as_team(true, [&f, &parts, &works, layers, y, memory] {
        for (int64_t i = 0; i < f.layers; i++)
            for (size_t p = 0; p < parts.size(); p++)
                layer(layers[i], f, parts[p], i, works.at(layers[i].window)[p], y + int64_t(p) * AT_A_TIME * f.hidden, memory);
        for (size_t p = 0; p < parts.size(); p++) {
            const Step& s = parts[p];
            add_rms_norm(s.x, y + int64_t(p) * AT_A_TIME * f.hidden, s.norm, s.out, s.T, f.hidden, float(f.eps));
        }
    });
}

extern "C" {
void layers_bf16(void* layers, void* shape, void* step) { run((const Layer*)layers, *(const Shape*)shape, *(const Step*)step); }
}
#endif
