// Frozen matrices in 4 to 8 bits. Parts and formulas of each kind are those of `PackedMatrix` in ops/quantized.py.

#pragma once

#include "inference.h"

// The last two are bfloat16: rows one after the other, and as `matmul` of tiles.cpp reads them.
enum QuantizedKind : int64_t { CODE4, INT8, FP8, INT4, MXFP4, INT8_GROUPS, Q4_0, Q8_0, Q4_K, Q6_K, DENSE, TILED };

// W [O, I] as ops/native_quantized.py hands it over. part: addresses in the order of its `PARTS`, null for what there is
// not. block: numbers of a row that share a scale; block_rows: rows that do, of FP8.
struct Quantized {
    int64_t kind, O, I, block, block_rows, nested_block;
    double nested_offset;
    const void* part[5];
};

// y [T, O] = x W^T + bias, rows shared by the threads of a team as in inference.h. A row of y does not depend on the rows beside it.
template <class V>
void quantized_product(const Quantized& W, const V* x, int64_t x_stride, const V* bias, V* y, int64_t y_stride, int64_t T);

// to [rows, columns] = W from (row, column) on.
template <class V>
void quantized_dense(const Quantized& W, int64_t row, int64_t rows, int64_t column, int64_t columns, V* to, int64_t stride);

// Matrices of one input; their results lie side by side in a row of y. bias: of all of them, or null.
struct Projection {
    int64_t count;
    const Quantized* each;
    const bf16* bias;
};
void project(const Projection& p, const bf16* x, int64_t x_stride, bf16* y, int64_t y_stride, int64_t T);
