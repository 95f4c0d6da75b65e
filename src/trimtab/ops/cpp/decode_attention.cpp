// Attention of few rows over long caches, at the speed at which memory gives keys and values.
//
// A row's tokens are cut where their numbers are multiples of CHUNK. A chunk gives each query head the largest score, the sum of weights and
// the weighted values; the chunks of a row are added up in order. So a row's result is the same whoever computes which chunk, and whatever
// rows stand beside it. A chunk reads the keys of all heads as they lie in memory, then the values, and asks for what it reads soon.
// H query heads, G key heads, D head size, rep = H / G.

#include "attention_chunks.h"

namespace {

inline int64_t first_token(int64_t length, int64_t window) { return window && length > window ? length - window : 0; }

}  // namespace

AttentionWork::AttentionWork(const Paging& paging, int64_t T, int64_t H, int64_t G, int64_t D, int64_t window)
    : paging(paging), T(T), H(H), G(G), D(D), window(window), first_part(T), count(T) {
    int64_t chunks = 0, all = 0;
    std::vector<Item> whole;
    for (int64_t t = 0, rows; t < T; t += rows) {
        rows = 1;
        if (paging.length[t] <= 0) continue;  // a row of a long sequence, which runs elsewhere
        while (t + rows < T && rows < ROWS && paging.sequence[t + rows] == paging.sequence[t] &&
               paging.length[t + rows] == paging.length[t] + rows)
            rows++;
        for (int64_t i = t; i < t + rows; i++) {
            const int64_t length = paging.length[i], from = first_token(length, window) / CHUNK;
            count[i] = int32_t((length - 1) / CHUNK - from + 1);
            first_part[i] = all - from;
            if (count[i] > 1) all += count[i];
        }
        const int64_t last = (paging.length[t + rows - 1] - 1) / CHUNK;
        for (int64_t c = first_token(paging.length[t], window) / CHUNK; c <= last; c++)
            whole.push_back({int32_t(t), int32_t(rows), int32_t(c), 0, int32_t(G)});
    }
    // few chunks are divided by heads, so that all threads have some
    const int64_t threads = omp_get_max_threads(), cuts = whole.empty() ? 1 : std::min<int64_t>(G, 2 * threads / int64_t(whole.size()));
    if (threads == 1 || cuts <= 1) {
        items = std::move(whole);
    } else {
        for (Item item : whole)
            for (int64_t i = 0; i < cuts; i++) {
                item.head = int32_t(G * i / cuts), item.heads = int32_t(G * (i + 1) / cuts - G * i / cuts);
                items.push_back(item);
            }
    }
    share = std::max<int64_t>(1, std::min<int64_t>(8, int64_t(items.size()) / (8 * threads)));
    parts.reset(new float[all * H * part_size(D)]), cut = all > 0;
}

// Attention of each row over the first length[t] tokens of its sequence, whose token j lies in row table[seq][j / block] * block + j % block
// of the pools [rows, G, D]. window 0: none; else tokens at distance >= window are not read.
template <class V>
void attend(const V* q, int64_t q_stride, const V* k_pool, const V* v_pool, V* out, float scaling, const AttentionWork& work) {
    const int64_t H = work.H, G = work.G, D = work.D, rep = H / G, size = part_size(D), block = work.paging.block;
    const int64_t count = work.items.size();
    static thread_local Scratch memory, own;
    const V* tokens[2 * (CHUNK + ROWS) + AHEAD + TILE];
    // pointers to tokens from.. of a row, at the first key head of an item
    const auto find = [&](const AttentionWork::Item& item, const V* pool, int64_t from, int64_t n, const V** to) {
        const int32_t* blocks = work.paging.table + work.paging.sequence[item.row] * work.paging.table_stride;
        const V* heads = pool + item.head * D;
        for (int64_t b = from / block, in = from % block; n > 0; b++, in = 0)
            for (const V* p = heads + (blocks[b] * block + in) * G * D; in < block && n > 0; in++, n--, p += G * D) *to++ = p;
    };
    const auto range = [&](const AttentionWork::Item& item, int64_t row) {
        const int64_t length = work.paging.length[row];
        const int64_t from = std::max(first_token(length, work.window), item.chunk * CHUNK);
        return std::pair<int64_t, int64_t>(from, std::min(length, (item.chunk + 1) * CHUNK));
    };
    const auto attend_item = [&](int64_t i) {
        const AttentionWork::Item& item = work.items[i];
        const int64_t from = range(item, item.row).first, n = range(item, item.row + item.rows - 1).second - from;
        find(item, k_pool, from, n, tokens);
        find(item, v_pool, from, n, tokens + n);
        const AttentionWork::Item& next = work.items[std::min(i + 1, count - 1)];
        const auto [next_from, next_to] = range(next, next.row);
        const int64_t soon = std::max<int64_t>(0, std::min(AHEAD + TILE, next_to - next_from));
        find(next, k_pool, next_from, soon, tokens + 2 * n);
        for (int64_t j = soon; j < AHEAD + TILE; j++) tokens[2 * n + j] = tokens[2 * n + j - 1];
        for (int64_t t = item.row; t < item.row + item.rows; t++) {
            const auto [a, b] = range(item, t);
            if (a >= b) continue;
            const int64_t first = item.head * rep, heads = item.heads * rep;
            const bool one = work.count[t] == 1;
            if (one) own.reserve(heads * size * sizeof(float));
            float* to = one ? own.take<float>(heads * size) : work.parts.get() + ((work.first_part[t] + item.chunk) * H + first) * size;
            part(q + t * q_stride + first * D, tokens + a - from, tokens + n + a - from, b - a, t == item.row ? AHEAD : 0, item.heads, rep, D,
                 scaling * LOG2_E, memory, to);
            for (int64_t h = 0; one && h < heads; h++) combine(to + h * size, 1, 0, out + (t * H + first + h) * D, D);
        }
    };
    if (in_crew()) {
        share(count, WHOLE_TAKING, attend_item);
    } else {
#pragma omp for schedule(dynamic, work.share)
        for (int64_t i = 0; i < count; i++) attend_item(i);
    }
    if (!work.cut) return;
    share(work.T * H, 64 * D, [&](int64_t i) {
        const int64_t t = i / H, h = i % H;
        if (work.count[t] <= 1) return;
        const int64_t chunk = first_token(work.paging.length[t], work.window) / CHUNK;
        combine(work.parts.get() + ((work.first_part[t] + chunk) * H + h) * size, work.count[t], H * size, out + i * D, D);
    });
}

template void attend(const bf16*, int64_t, const bf16*, const bf16*, bf16*, float, const AttentionWork&);

extern "C" {
FOR_EACH(attend,
         (void* q, int64_t q_stride, void* k_pool, void* v_pool, void* out, int32_t* sequence, int32_t* length, int32_t* table,
          int64_t table_stride, int64_t block, int64_t T, int64_t H, int64_t G, int64_t D, double scaling, int64_t window),
         const AttentionWork work(Paging{sequence, length, table, table_stride, block}, T, H, G, D, window);
         as_team(work.items.size() > 1, [&] {
             attend((const V*)q, q_stride, (const V*)k_pool, (const V*)v_pool, (V*)out, float(scaling), work);
         }))
}
