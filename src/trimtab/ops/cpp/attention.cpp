// Attention of training on a CPU: rows of many sequences as they lie, no padding between them, forward and backward on matrix tiles, or in wide registers.
// T rows, H query heads, G key heads, D head size (a multiple of 32). A sequence's queries are rows that follow each other; its keys are
// rows of the pools [rows, G, D], in order, and end at the place of its last query.
//
// Blocks are 32 queries by 32 keys: 2 x 2 tiles. Scores are held transposed, a row a key, so that what belongs to a query (its maximum, its
// sum, its gradient's share) lies in a lane: nothing is added up across lanes, and queries past the end are lanes that nobody reads. The
// scores of 32 queries with all their keys are held at once. The backward forms them again; two numbers a query are kept for it.

#include "attention_tiles.h"

#ifdef __AVX512BF16__
namespace {

const int64_t SEQUENCE = 4;  // numbers of a sequence: its first row, its queries, where its keys start in `keys`, how many

struct Rows {  // [rows, heads, D], the heads of a row side by side
    bf16* at;
    int64_t stride;
    bf16* operator()(int64_t row, int64_t head, int64_t D) const { return at + row * stride + head * D; }
};

// One head of a sequence's keys or values, zeros behind the last; `turned`, if wanted, holds `paired<true>` of every 32.
void take_keys(Rows pool, const int64_t* row, int64_t n, int64_t g, int64_t D, bf16* to, bf16* turned) {
    for (int64_t j = 0; j < n; j++) copy(pool(row[j], g, D), D, to + j * D);
    std::memset(to + n * D, 0, (whole_blocks(n) - n) * D * 2);
    if (turned)
        for (int64_t j = 0; j < n; j += BLOCK) paired<true>(to + j * D, D, turned + j * D);
}

// 32 rows of one head from row t, zeros behind the n-th.
void take_queries(Rows from, int64_t t, int64_t n, int64_t h, int64_t D, bf16* to) {
    for (int64_t i = 0; i < n; i++) copy(from(t + i, h, D), D, to + i * D);
    std::memset(to + n * D, 0, (BLOCK - n) * D * 2);
}

// The first n columns of x [D, 32], times their factors, as rows of one head.
void put_queries(const float* x, const float* factor, Rows to, int64_t t, int64_t n, int64_t h, int64_t D) {
    for (int64_t i = 0; i < n; i += TILE)
        for (int64_t d = 0; d < D; d += BLOCK) {
            __m512i r[16];
            const __m512 f = _mm512_loadu_ps(factor + i);
            for (int c = 0; c < 16; c++) {
                const float* at = x + (d + 2 * c) * BLOCK + i;
                r[c] = pairs(_mm512_mul_ps(f, _mm512_loadu_ps(at)), _mm512_mul_ps(f, _mm512_loadu_ps(at + BLOCK)));
            }
            transpose(r);
            for (int64_t c = 0; c < std::min(TILE, n - i); c++) save(to(t + i + c, h, D) + d, r[c]);
        }
}

// 32 queries of which the first has its own key at `place`, and the keys first..end (whole blocks) that any of them sees.
struct Block {
    int64_t place, window, first, end;
    Block(int64_t place, int64_t window, int64_t keys) : place(place), window(window) {
        first = window ? std::max<int64_t>(0, place - window + 1) / BLOCK * BLOCK : 0;
        end = whole_blocks(std::min(keys, place + BLOCK));
    }
    // The queries that see key j, a bit each: those at distance 0..window - 1 behind it.
    uint32_t seeing(int64_t j) const {
        const int64_t low = std::min(std::max<int64_t>(j - place, 0), BLOCK);
        const int64_t high = window ? std::min(std::max<int64_t>(j - place + window, 0), BLOCK) : BLOCK;
        return uint32_t(((uint64_t(1) << high) - 1) >> low << low);
    }
};

// p[pairs of keys][2 tiles of queries] = 2^(c s - most), which `inverse` would scale to a sum of 1.
void softmax(const Block& b, const float* s, float c, bf16* p, float* top, float* inverse) {
    for (int half = 0; half < 2; half++) {
        __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sum = _mm512_setzero_ps();
        const __m512 by = _mm512_set1_ps(c);
        const float* scores = s + half * TILE;
        for (int64_t j = b.first; j < b.end; j++)
            most = _mm512_mask_max_ps(most, __mmask16(b.seeing(j) >> half * TILE), most, _mm512_loadu_ps(scores + j * BLOCK));
        most = _mm512_mul_ps(most, by);
        for (int64_t j = b.first; j < b.end; j += 2) {
            __m512 e[2];
            for (int i = 0; i < 2; i++) {
                e[i] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + (j + i) * BLOCK), by, most));
                e[i] = _mm512_maskz_mov_ps(__mmask16(b.seeing(j + i) >> half * TILE), e[i]);
                sum = _mm512_add_ps(sum, e[i]);
            }
            save(p + j / BLOCK * 2 * WHOLE + half * WHOLE + j % BLOCK / 2 * BLOCK, pairs(e[0], e[1]));
        }
        _mm512_storeu_ps(top + half * TILE, most);
        _mm512_storeu_ps(inverse + half * TILE, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
    }
}

// From scores s and the gradients dp of their probabilities, both [keys][32]: probabilities p and gradients ds of scores, before the factor
// that scores are scaled by, as rows of keys; the latter also in pairs of keys, as `softmax` leaves p.
void softmax_backward(const Block& b, float* s, const float* dp, float c, const float* top, const float* inverse, bf16* p, bf16* ds,
                      bf16* ds_pairs) {
    const __m512 by = _mm512_set1_ps(c), most[2] = {_mm512_loadu_ps(top), _mm512_loadu_ps(top + TILE)};
    const __m512 share[2] = {_mm512_loadu_ps(inverse), _mm512_loadu_ps(inverse + TILE)};
    __m512 delta[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = b.first; j < b.end; j++) {
        const uint32_t seeing = b.seeing(j);
        __m512 e[2];
        for (int half = 0; half < 2; half++) {
            float* at = s + j * BLOCK + half * TILE;
            e[half] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(at), by, most[half]));
            e[half] = _mm512_maskz_mul_ps(__mmask16(seeing >> half * TILE), e[half], share[half]);
            delta[half] = _mm512_fmadd_ps(e[half], _mm512_loadu_ps(dp + j * BLOCK + half * TILE), delta[half]);
            _mm512_storeu_ps(at, e[half]);
        }
        save(p + j * BLOCK, narrow(e[0], e[1]));
    }
    for (int64_t j = b.first; j < b.end; j += 2) {
        __m512i row[2];
        for (int i = 0; i < 2; i++) {
            __m512 d[2];
            for (int half = 0; half < 2; half++) {
                const int64_t at = (j + i) * BLOCK + half * TILE;
                d[half] = _mm512_mul_ps(_mm512_loadu_ps(s + at), _mm512_sub_ps(_mm512_loadu_ps(dp + at), delta[half]));
            }
            row[i] = narrow(d[0], d[1]);
            save(ds + (j + i) * BLOCK, row[i]);
        }
        bf16* to = ds_pairs + j / BLOCK * 2 * WHOLE + j % BLOCK / 2 * BLOCK;
        save(to, interleaved(row[0], row[1], 0));
        save(to + WHOLE, interleaved(row[0], row[1], 1));
    }
}

// to[keys][32] = rows times columns, rows [keys, D].
inline void scores(const Block& b, const bf16* rows, const bf16* columns, int64_t D, float* to) {
    for (int64_t j = b.first; j < b.end; j += BLOCK)
        multiply<false>(rows + j * D, rows + (j + TILE) * D, D, BLOCK, columns, columns + D * TILE, WHOLE, D / BLOCK, to + j * BLOCK,
                        BLOCK);
}
// to[D][32] = turned keys (or values) times pairs of keys.
inline void over_keys(const Block& b, const bf16* turned, const bf16* pairs, int64_t D, float* to) {
    for (int64_t d = 0; d < D; d += BLOCK) {
        const bf16 *a = turned + b.first * D + d * BLOCK, *p = pairs + b.first * BLOCK;
        multiply<false>(a, a + WHOLE, BLOCK, D * BLOCK, p, p + WHOLE, 2 * WHOLE, (b.end - b.first) / BLOCK, to + d * BLOCK, BLOCK);
    }
}
// sums[keys][D] += rows of keys [keys][32] times paired queries.
inline void over_queries(const Block& b, const bf16* rows, const bf16* paired, int64_t D, float* sums) {
    for (int64_t j = b.first; j < b.end; j += BLOCK)
        for (int64_t d = 0; d < D; d += BLOCK) {
            const bf16 *a = rows + j * BLOCK, *q = paired + d * BLOCK;
            multiply<true>(a, a + WHOLE, BLOCK, 0, q, q + WHOLE, 0, 1, sums + j * D + d, D);
        }
}

struct Call {
    Rows q, k, v;
    float *top, *inverse;  // [H, T], what `softmax` found for each query
    const int64_t* keys;
    int64_t T, repeat, D, window;
    float scale;
};

void forward(const Call& x, const int64_t* sequence, int64_t g, int64_t longest, Rows out) {
    const int64_t D = x.D, start = sequence[0], Q = sequence[1], K = sequence[3], S = whole_blocks(longest);
    scratch.reserve(S * D * 4 + BLOCK * D * 8 + S * BLOCK * 6 + 1024);
    bf16 *k = scratch.take<bf16>(S * D), *v_turned = scratch.take<bf16>(S * D), *rows = scratch.take<bf16>(BLOCK * D);
    bf16 *q = scratch.take<bf16>(BLOCK * D), *p = scratch.take<bf16>(S * BLOCK);
    float *s = scratch.take<float>(S * BLOCK), *sums = scratch.take<float>(BLOCK * D);
    float *top = scratch.take<float>(BLOCK), *inverse = scratch.take<float>(BLOCK);
    take_keys(x.v, x.keys + sequence[2], K, g, D, k, v_turned);
    take_keys(x.k, x.keys + sequence[2], K, g, D, k, nullptr);
    for (int64_t i = 0; i < Q; i += BLOCK) {
        const int64_t n = std::min(BLOCK, Q - i);
        const Block b(i + K - Q, x.window, K);
        for (int64_t h = g * x.repeat; h < (g + 1) * x.repeat; h++) {
            take_queries(x.q, start + i, n, h, D, rows);
            columns(rows, D, q);
            scores(b, k, q, D, s);
            softmax(b, s, x.scale * LOG2_E, p, top, inverse);
            over_keys(b, v_turned, p, D, sums);
            put_queries(sums, inverse, out, start + i, n, h, D);
            std::memcpy(x.top + h * x.T + start + i, top, n * sizeof(float));
            std::memcpy(x.inverse + h * x.T + start + i, inverse, n * sizeof(float));
        }
    }
}

struct Gradients {
    Rows out, q, k, v;           // that of the result, and those to be written
    const int64_t* slot;         // for each of `keys`: -1, or where this sequence's share of a row that others read too is kept
    float *k_shares, *v_shares;  // [slots, G, D]
    int64_t G;
};

// One head of a sequence's keys, whose gradients are `sums` [keys, D] times `factor`.
void put_keys(const Call& x, const Gradients& to, const int64_t* sequence, int64_t g, const float* sums, float factor, Rows rows,
              float* shares) {
    for (int64_t j = 0; j < sequence[3]; j++) {
        const int64_t slot = to.slot[sequence[2] + j], D = x.D;
        const float* from = sums + j * D;
        const __m512 f = _mm512_set1_ps(factor);
        for (int64_t d = 0; d < D; d += BLOCK) {
            const __m512 low = _mm512_mul_ps(f, _mm512_loadu_ps(from + d)), high = _mm512_mul_ps(f, _mm512_loadu_ps(from + d + TILE));
            float* share = shares + (slot * to.G + g) * D + d;
            if (slot < 0)
                save(rows(x.keys[sequence[2] + j], g, D) + d, narrow(low, high));
            else
                _mm512_storeu_ps(share, low), _mm512_storeu_ps(share + TILE, high);
        }
    }
}

void backward(const Call& x, const int64_t* sequence, int64_t g, int64_t longest, const Gradients& to) {
    const int64_t D = x.D, start = sequence[0], Q = sequence[1], K = sequence[3], S = whole_blocks(longest);
    scratch.reserve(S * D * 14 + BLOCK * D * 14 + S * BLOCK * 14 + 1024);
    bf16 *k = scratch.take<bf16>(S * D), *v = scratch.take<bf16>(S * D), *k_turned = scratch.take<bf16>(S * D);
    bf16 *rows = scratch.take<bf16>(BLOCK * D), *q = scratch.take<bf16>(BLOCK * D), *q_pairs = scratch.take<bf16>(BLOCK * D);
    bf16 *o = scratch.take<bf16>(BLOCK * D), *o_pairs = scratch.take<bf16>(BLOCK * D), *p = scratch.take<bf16>(S * BLOCK);
    bf16 *ds = scratch.take<bf16>(S * BLOCK), *ds_pairs = scratch.take<bf16>(S * BLOCK);
    float *s = scratch.take<float>(S * BLOCK), *dp = scratch.take<float>(S * BLOCK), *dq = scratch.take<float>(BLOCK * D);
    float *dk = scratch.take<float>(S * D), *dv = scratch.take<float>(S * D);
    float *top = scratch.take<float>(BLOCK), *inverse = scratch.take<float>(BLOCK), *factor = scratch.take<float>(BLOCK);
    std::fill(factor, factor + BLOCK, x.scale);
    std::fill(dk, dk + whole_blocks(K) * D, 0.0f);
    std::fill(dv, dv + whole_blocks(K) * D, 0.0f);
    take_keys(x.k, x.keys + sequence[2], K, g, D, k, k_turned);
    take_keys(x.v, x.keys + sequence[2], K, g, D, v, nullptr);
    for (int64_t i = 0; i < Q; i += BLOCK) {
        const int64_t n = std::min(BLOCK, Q - i);
        const Block b(i + K - Q, x.window, K);
        for (int64_t h = g * x.repeat; h < (g + 1) * x.repeat; h++) {
            take_queries(x.q, start + i, n, h, D, rows);
            columns(rows, D, q), paired<false>(rows, D, q_pairs);
            take_queries(to.out, start + i, n, h, D, rows);
            columns(rows, D, o), paired<false>(rows, D, o_pairs);
            for (int64_t j = 0; j < BLOCK; j++) {
                top[j] = j < n ? x.top[h * x.T + start + i + j] : 0;
                inverse[j] = j < n ? x.inverse[h * x.T + start + i + j] : 0;
            }
            scores(b, k, q, D, s);
            scores(b, v, o, D, dp);
            softmax_backward(b, s, dp, x.scale * LOG2_E, top, inverse, p, ds, ds_pairs);
            over_queries(b, p, o_pairs, D, dv);
            over_queries(b, ds, q_pairs, D, dk);
            over_keys(b, k_turned, ds_pairs, D, dq);
            put_queries(dq, factor, to.q, start + i, n, h, D);
        }
    }
    put_keys(x, to, sequence, g, dk, x.scale, to.k, to.k_shares);
    put_keys(x, to, sequence, g, dv, 1.0f, to.v, to.v_shares);
}

// Row shared[r] of `rows` = the sum of shares first[r]..first[r + 1].
void add_shares(int64_t r, const int64_t* shared, const int64_t* first, const float* shares, int64_t width, Rows rows) {
    for (int64_t d = 0; d < width; d += TILE) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t slot = first[r]; slot < first[r + 1]; slot++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(shares + slot * width + d));
        _mm256_storeu_si256((__m256i*)(rows.at + shared[r] * rows.stride + d), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

}  // namespace

extern "C" {

// Sequences come by falling cost, so whoever is free takes the next: no result depends on who computes it.
void attend_rows_bf16(void* q, int64_t q_stride, void* k, int64_t k_stride, void* v, int64_t v_stride, void* out, float* kept,
                      int64_t* sequences, int64_t* keys, int64_t count, int64_t longest, int64_t T, int64_t H, int64_t G, int64_t D,
                      double scale, int64_t window) {
    const Rows q_rows{(bf16*)q, q_stride}, k_rows{(bf16*)k, k_stride}, v_rows{(bf16*)v, v_stride};
    const Call x{q_rows, k_rows, v_rows, kept, kept + H * T, keys, T, H / G, D, window, float(scale)};
#pragma omp parallel
    {
        const Multiplying on;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < count * G; item++)
            forward(x, sequences + item / G * SEQUENCE, item % G, longest, {(bf16*)out, H * D});
    }
}

// The gradients of rows that several sequences read are summed from their shares, in the order of the sequences.
void attend_rows_backward_bf16(void* q, int64_t q_stride, void* k, int64_t k_stride, void* v, int64_t v_stride, void* d_out,
                               int64_t d_stride, float* kept, void* dq, void* dk, void* dv, int64_t* sequences, int64_t* keys,
                               int64_t* slots, float* shares, int64_t* shared, int64_t* first_share, int64_t shared_count, int64_t count,
                               int64_t longest, int64_t T, int64_t H, int64_t G, int64_t D, double scale, int64_t window) {
    const Rows q_rows{(bf16*)q, q_stride}, k_rows{(bf16*)k, k_stride}, v_rows{(bf16*)v, v_stride};
    const Call x{q_rows, k_rows, v_rows, kept, kept + H * T, keys, T, H / G, D, window, float(scale)};
    float* v_shares = shares + (shared_count ? first_share[shared_count] : 0) * G * D;
    const Gradients to{{(bf16*)d_out, d_stride}, {(bf16*)dq, H * D}, {(bf16*)dk, G * D}, {(bf16*)dv, G * D}, slots, shares, v_shares, G};
#pragma omp parallel
    {
        {
            const Multiplying on;
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < count * G; item++) backward(x, sequences + item / G * SEQUENCE, item % G, longest, to);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < shared_count; r++) {
            add_shares(r, shared, first_share, to.k_shares, G * D, to.k);
            add_shares(r, shared, first_share, to.v_shares, G * D, to.v);
        }
    }
}
}
#endif
