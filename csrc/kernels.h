// The kernels that are compiled once per instruction set; `kernels()` picks the best one the processor runs.
//
// Their sources may not use the standard library's templates: the linker keeps one copy of each inline function, and it
// might keep the one with instructions that this processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace negotiator {

// Keys per step of the online softmax. K and V of one step, in fp32, stay in the first-level cache.
constexpr int64_t kKeyBlock = 48;

// One tile of attention: the `group` query heads of one key/value head, for queries [0, queries) of one segment.
// Row r of the tile is query r / group, head r % group; it sees keys [0, first_visible + r / group).
struct AttentionTile {
  const void* q;  // first query, first head of the group
  const void* k;  // the pool, at this key/value head
  const void* v;
  void* out;
  const int64_t* slots;  // of the keys of the segment
  int64_t queries, group, dim;
  int64_t first_visible;
  ptrdiff_t q_stride, q_head_stride, k_stride, v_stride, out_stride, out_head_stride;  // in elements
  float scale;
  bool bf16;      // else fp32, all four of them
  float* scratch;  // attention_scratch() floats, aligned to 64 bytes
};

// The rows of the left operand of a product, repacked for it.
struct PackedRows {
  const void* from;  // [rows, depth]
  int64_t stride;    // in elements
  int64_t rows, depth;
  bool bf16;         // else fp32; as is the weight
  uint32_t* packed;  // packed_words() of them, aligned to 64 bytes
};

// Columns [0, columns) of exp(left . weight^T * inverse_temperature - anchor), and their sums a row.
struct ExponentialBlock {
  PackedRows left;
  const void* weight;  // [columns, depth]
  int64_t weight_stride, columns;
  float inverse_temperature;
  const float* anchors;  // [rows]
  void* out;             // [rows, columns], null if only the sums are wanted
  int64_t out_stride;
  bool out_bf16;          // else fp32
  float *sums, *moments;  // [rows]
  uint32_t* scratch;      // block_words() of them, aligned to 64 bytes
};

// A part of the right operand of a product, repacked for it.
struct PackedRight {
  const void* from;  // [depth, columns]
  int64_t stride;    // in elements
  int64_t depth, columns;
  bool bf16;         // else fp32
  bool left_bf16;    // likewise, of the left operand
  uint32_t* packed;  // right_words() of them, aligned to 64 bytes
};

// out[rows, columns] += left[rows, depth] right[depth, columns].
struct ProductBlock {
  const void* left;
  int64_t row_stride, depth_stride;  // in elements
  int64_t rows;
  PackedRight right;
  float* out;
  int64_t out_stride;
  uint32_t* scratch;  // kProductScratch of them, aligned to 64 bytes
};

constexpr int64_t kProductScratch = 1024;

struct Kernels {
  const char* name;
  int64_t (*attention_scratch)(int64_t rows, int64_t dim);
  void (*attention)(const AttentionTile& tile);
  // Largest of n > 0 numbers.
  float (*maximum)(const float* x, int64_t n);
  // weights[i] = exp((x[i] - shift) * factor), for arguments <= 0; returns their sum, NaN if any is NaN.
  double (*exponentials)(const float* x, int64_t n, double shift, double factor, double* weights);
  // The columns that a block should have at most; 32-bit words of memory that rows and blocks need.
  int64_t (*block_columns)(int64_t depth, bool bf16);
  int64_t (*packed_words)(int64_t rows, int64_t depth, bool bf16);
  int64_t (*block_words)(int64_t columns, int64_t depth, bool bf16);
  void (*pack_rows)(const PackedRows& rows);
  void (*exponential_block)(const ExponentialBlock& block);
  // Columns of a panel of the right operand; words that its repacked form needs.
  int64_t panel_columns;
  int64_t (*right_words)(int64_t depth, int64_t columns);
  void (*pack_panel)(const PackedRight& right, int64_t panel);
  void (*product)(const ProductBlock& block);
  // A linear layer's weight [columns, depth], a panel of it at a time, and what packed rows make of that panel.
  void (*pack_linear)(const float* weight, int64_t stride, int64_t columns, int64_t depth, float* packed);
  void (*linear_panel)(const uint32_t* rows_packed, int64_t rows, const float* packed, int64_t columns, int64_t depth,
                       float* out, int64_t out_stride);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;

const Kernels& kernels();

}  // namespace negotiator
