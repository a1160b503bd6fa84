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

// One tile of attention: the `group` query heads of one key/value head, for some queries.
// Row r of the tile is query r / group, head r % group; it sees keys [0, first_visible + r / group * step). Keys are taken
// in blocks of kKeyBlock, and what a row does with a block depends on nothing else: an attention that stops between two
// blocks and goes on from its state gives the same bits as one that does not.
struct AttentionTile {
  const void* q;          // token 0, first head of the group
  const int32_t* tokens;  // [queries], where each lies in q and out
  const void* k;          // the pool, at this key/value head
  const void* v;
  void* out;
  float* states;  // of all tokens, at this key/value head: [tokens][heads][dim sums, maximum, total]
  bool from_state, to_state;  // goes on from there; leaves its own there instead of a result
  const int64_t* slots;  // of the keys
  int64_t queries, group, dim;
  int64_t first_visible, step;
  ptrdiff_t q_stride, q_head_stride, k_stride, v_stride, out_stride, out_head_stride, state_stride;  // in elements
  float scale;
  bool q_bf16, kv_bf16;  // else fp32; out is like q
  float* scratch;        // attention_scratch() floats, aligned to 64 bytes
  float* lse = nullptr;  // if wanted, the log-sum-exp of each query's scores: of token 0, first head of the group
  ptrdiff_t lse_head_stride = 0;
};

// One tile of attention's gradient: the `group` query heads of one key/value head, for the tokens [first, first + queries).
// All of them see the `prefix` tokens from prefix_start on; token t also sees [start, t]. All of it is fp32.
struct GradientTile {
  const float *q, *out, *dout;  // token 0, first head of the group
  float* dq;                    // likewise
  const float *k, *v;           // token 0, at this key/value head
  const float* lse;             // token 0, first head of the group
  int64_t first, queries, group, dim;
  int64_t start, prefix_start, prefix;
  // Of each token of the prefix and of those from `start` on: dk / scale, then dv, sum_stride each. They are added to.
  float *prefix_sums, *own_sums;
  ptrdiff_t q_stride, kv_stride, lse_head_stride, sum_stride;  // in elements; heads of a group lie side by side
  float scale;
  float* scratch;  // gradient_scratch() floats, aligned to 64 bytes
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

// out[rows, columns] (+)= rows . weight^T for panels [first, last) of a linear layer's repacked weight.
// `gated` takes a weight whose panels are by turns those of the gate and those of what it lets through, and packs
// silu(gate) * up as the rows of the next product; `columns` are those of one of the two.
struct LinearPanels {
  const uint32_t* left;  // packed rows
  int64_t rows, depth;
  const uint32_t* right;  // from panel 0 on
  bool bf16;              // else fp32
  int64_t first, last, columns;
  float* out;
  int64_t out_stride;
  bool add;
};

// Up to strip_rows rows, divided by their root mean square, times a weight, packed; as they are without a weight.
struct NormStrip {
  const float* x;  // [rows, depth]
  int64_t stride, rows, depth;
  const float* weight;  // [depth] or null
  float epsilon;
  bool bf16;  // of the weight that the packed rows will be multiplied with
  uint32_t* packed;
};

// Queries, keys and values of one token as they come out of the projection, in place; then the latter two to the cache.
struct RotateToken {
  float* qkv;  // [heads + 2 kv_heads, dim]
  const float *bias, *q_norm, *k_norm;  // [(heads + 2 kv_heads) dim], [dim], [dim]; or null
  const float *cos, *sin;               // [dim]
  int64_t heads, kv_heads, dim;
  float epsilon;
  void *key, *value;  // [kv_heads, dim], where this token's go
  bool bf16;          // the cache, else fp32
};

// out = x / rms(x) * weight, row by row; `factors` [rows] are 1 / rms(x).
struct NormRows {
  const float *x, *weight;  // [rows, width], [width]
  int64_t rows, width;
  float epsilon;
  float *out, *factors;
};

struct NormGradient {
  const float *dout, *x, *weight, *factors;
  int64_t rows, width;
  float *dx, *dweight;  // dweight [width] is added to
};

// Heads [tokens, heads, dim] turned by the angles of their tokens, cos and sin [tokens, dim].
struct HeadRotation {
  const float *x, *cos, *sin;
  int64_t tokens, heads, dim;
  bool backward;
  float* out;
};

struct Kernels {
  const char* name;
  int64_t (*attention_scratch)(int64_t rows, int64_t dim);
  void (*attention)(const AttentionTile& tile);
  int64_t (*gradient_scratch)(int64_t rows, int64_t dim);
  void (*attention_gradient)(const GradientTile& tile);
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
  // A linear layer's weight [columns, depth], a panel of it at a time; the words of that panel.
  int64_t (*linear_words)(int64_t depth, bool bf16);
  void (*pack_linear)(const void* weight, int64_t stride, int64_t columns, int64_t depth, bool bf16, uint32_t* packed);
  void (*linear)(const LinearPanels& panels);
  void (*gated)(const LinearPanels& panels, uint32_t* packed);
  // Strips of rows, and how many rows are in one.
  int64_t strip_rows;
  void (*norm_strip)(const NormStrip& strip);
  void (*rotate)(const RotateToken& token);
  // What stands between the products in training; gates are silu(gate) * up.
  void (*norm_rows)(const NormRows& rows);
  void (*norm_gradient)(const NormGradient& rows);
  void (*gate_rows)(int64_t count, const float* gate, const float* up, float* out);
  void (*gate_gradient)(int64_t count, const float* dout, const float* gate, const float* up, float* dgate, float* dup);
  void (*rotate_heads)(const HeadRotation& rotation);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;

const Kernels& kernels();

}  // namespace negotiator
