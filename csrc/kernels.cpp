// One tile of attention with an online softmax, in fp32. Compiled once per instruction set.
//
// R = rows of the tile (queries x heads of the group), padded to whole vectors; D = head dimension, padded likewise.
// Scores are kept with the keys as rows, [keys, R]: then neither K nor V is ever transposed, and the softmax runs down
// the columns with no sum across the lanes of a vector.

#include "decoder_kernels.h"
#include "exponentials_kernels.h"
#include "kernels.h"
#include "layers_kernels.h"
#include "packed_attention_kernels.h"
#include "simd.h"
#include "tile_product.h"

namespace {

using negotiator::AttentionTile;
using negotiator::kKeyBlock;

template <typename Scalar>
void prefetch_row(const Scalar* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(Scalar)) __builtin_prefetch(row + i);
}

struct Scratch {
  int64_t rows, dim;      // padded
  float* q;               // [dim, rows], scaled
  float* keys;            // [kKeyBlock, dim]
  float* values;          // [kKeyBlock, dim]
  float* scores;          // [kKeyBlock, rows], then the unnormalised probabilities
  float* sum;             // [rows, dim], output before it is divided by `total`
  float *top, *total;     // [rows], running maximum and sum of probabilities
  float* rescale;         // [rows]
  int32_t* visible;       // [rows], keys that the row sees

  Scratch(float* memory, int64_t real_rows, int64_t real_dim) : rows(padded(real_rows)), dim(padded(real_dim)) {
    const auto take = [&](int64_t n) {
      float* start = memory;
      memory += n;
      return start;
    };
    q = take(dim * rows);
    keys = take(kKeyBlock * dim);
    values = take(kKeyBlock * dim);
    scores = take(kKeyBlock * rows);
    sum = take(rows * dim);
    top = take(rows);
    total = take(rows);
    rescale = take(rows);
    visible = reinterpret_cast<int32_t*>(take(rows));
  }
};

int64_t attention_scratch(int64_t rows, int64_t dim) {
  rows = padded(rows), dim = padded(dim);
  return 2 * rows * dim + 2 * kKeyBlock * dim + kKeyBlock * rows + 4 * rows;
}

// Turns scores of keys [start, start + n) into probabilities relative to the new running maximum.
void softmax_step(const Scratch& s, int64_t start, int64_t n, bool masked) {
  for (int64_t r = 0; r < s.rows; r += kLanes) {
    float* column = s.scores + r;
    const Float old_top = load<Float>(s.top + r);
    Float new_top = old_top;
    if (masked) {
      const Int visible = load<Int>(s.visible + r);
      for (int64_t j = 0; j < n; ++j) {
        const Float score = load<Float>(column + j * s.rows);
        store(column + j * s.rows, (int32_t)(start + j) < visible ? score : splat(-__builtin_inff()));
      }
    }
    for (int64_t j = 0; j < n; ++j) new_top = max(load<Float>(column + j * s.rows), new_top);
    const Float rescale = exp2(old_top - new_top);
    Float total = load<Float>(s.total + r) * rescale;
    for (int64_t j = 0; j < n; ++j) {
      const Float p = exp2(load<Float>(column + j * s.rows) - new_top);
      store(column + j * s.rows, p);
      total += p;
    }
    store(s.top + r, new_top);
    store(s.total + r, total);
    store(s.rescale + r, rescale);
  }
}

float* state_of(const AttentionTile& tile, int64_t row) {
  return tile.states + tile.tokens[row / tile.group] * tile.state_stride + row % tile.group * (tile.dim + 2);
}

template <typename Query, typename Key>
void attend(const AttentionTile& tile) {
  const int64_t rows = tile.queries * tile.group;
  const Scratch s(tile.scratch, rows, tile.dim);
  const auto* q = static_cast<const Query*>(tile.q);
  const auto* k = static_cast<const Key*>(tile.k);
  const auto* v = static_cast<const Key*>(tile.v);
  auto* out = static_cast<Query*>(tile.out);

  // Padding lanes are computed and thrown away, so they only have to be numbers.
  memset(s.q, 0, s.dim * s.rows * sizeof(float));
  memset(s.values, 0, kKeyBlock * s.dim * sizeof(float));
  memset(s.sum, 0, s.rows * s.dim * sizeof(float));
  memset(s.total, 0, s.rows * sizeof(float));
  const float scale = tile.scale * 1.44269504f;  // the softmax is in powers of two
  for (int64_t r = 0; r < s.rows; ++r) {
    s.top[r] = -__builtin_inff();
    s.visible[r] = static_cast<int32_t>(tile.first_visible + (r < rows ? r / tile.group * tile.step : 0));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Query* row = q + tile.tokens[r / tile.group] * tile.q_stride + r % tile.group * tile.q_head_stride;
    for (int64_t d = 0; d < tile.dim; ++d) s.q[d * s.rows + r] = widen(row[d]) * scale;
    if (!tile.from_state) continue;
    const float* state = state_of(tile, r);
    memcpy(s.sum + r * s.dim, state, tile.dim * sizeof(float));
    s.top[r] = state[tile.dim];
    s.total[r] = state[tile.dim + 1];
  }

  const int64_t keys = tile.first_visible + (tile.queries - 1) * tile.step;  // seen by at least one row
  for (int64_t start = 0; start < keys; start += kKeyBlock) {
    const int64_t n = keys - start < kKeyBlock ? keys - start : kKeyBlock;
    for (int64_t j = 0; j < n; ++j) {
      // Rows lie scattered in memory: ask for those of the next block while this one is worked on.
      const int64_t slot = tile.slots[start + j], next = start + j + kKeyBlock;
      if (next < keys) {
        prefetch_row(k + tile.slots[next] * tile.k_stride, tile.dim);
        prefetch_row(v + tile.slots[next] * tile.v_stride, tile.dim);
      }
      widen_row(k + slot * tile.k_stride, tile.dim, s.keys + j * s.dim);
      widen_row(v + slot * tile.v_stride, tile.dim, s.values + j * s.dim);
    }
    gemm(n, s.rows, tile.dim, s.keys, s.dim, 1, s.q, s.rows, s.scores, s.rows, false);
    softmax_step(s, start, n, start + n > tile.first_visible);
    for (int64_t r = 0; r < rows; ++r) {
      if (s.rescale[r] == 1.0f) continue;
      for (int64_t d = 0; d < s.dim; d += kLanes)
        store(s.sum + r * s.dim + d, load<Float>(s.sum + r * s.dim + d) * s.rescale[r]);
    }
    gemm(rows, s.dim, n, s.scores, 1, s.rows, s.values, s.dim, s.sum, s.dim, true);
  }

  for (int64_t r = 0; r < rows; ++r) {
    if (tile.to_state) {
      float* state = state_of(tile, r);
      memcpy(state, s.sum + r * s.dim, tile.dim * sizeof(float));
      state[tile.dim] = s.top[r];
      state[tile.dim + 1] = s.total[r];
      continue;
    }
    Query* row = out + tile.tokens[r / tile.group] * tile.out_stride + r % tile.group * tile.out_head_stride;
    const float inverse = 1.0f / s.total[r];
    for (int64_t d = 0; d < tile.dim; ++d) narrow(s.sum[r * s.dim + d] * inverse, row + d);
    if (tile.lse)
      tile.lse[tile.tokens[r / tile.group] + r % tile.group * tile.lse_head_stride] =
          s.top[r] * 0.693147181f + __builtin_logf(s.total[r]);
  }
}

void attention(const AttentionTile& tile) {
  if (tile.q_bf16)
    tile.kv_bf16 ? attend<uint16_t, uint16_t>(tile) : attend<uint16_t, float>(tile);
  else
    tile.kv_bf16 ? attend<float, uint16_t>(tile) : attend<float, float>(tile);
}

float maximum(const float* x, int64_t n) {
  float top = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    Float tops = load<Float>(x);
    for (; i + kLanes <= n; i += kLanes) tops = max(load<Float>(x + i), tops);
    for (int lane = 0; lane < kLanes; ++lane) top = tops[lane] > top ? tops[lane] : top;
  }
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

double exponentials(const float* x, int64_t n, double shift, double factor, double* weights) {
  constexpr int lanes = kLanes / 2;
  Double sums{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Double wide = __builtin_convertvector(load<HalfFloat>(x + i), Double);
    const Double w = exp((wide - shift) * factor);
    store(weights + i, w);
    sums += w;
  }
  double sum = 0.0;
  for (int lane = 0; lane < lanes; ++lane) sum += sums[lane];
  for (; i < n; ++i) {
    const Double w = exp((x[i] - shift) * factor - Double{});
    weights[i] = w[0];
    sum += w[0];
  }
  return sum;
}

using BothBf16 = WordsOf<uint16_t, uint16_t>::Type;

int64_t block_columns(int64_t depth, bool bf16) {
  return bf16 ? exponential_columns<BothBf16>(depth) : exponential_columns<Fp32Words>(depth);
}

int64_t packed_words(int64_t rows, int64_t depth, bool bf16) {
  return rounded_up(rows, kStrip) * (bf16 ? words<BothBf16>(depth) : words<Fp32Words>(depth));
}

int64_t block_words(int64_t columns, int64_t depth, bool bf16) {
  return rounded_up(columns, kPanel) * ((bf16 ? words<BothBf16>(depth) : words<Fp32Words>(depth)) + kStrip);
}

void pack_rows(const PackedRows& rows) {
  rows.bf16 ? pack_left<BothBf16, uint16_t>(rows) : pack_left<Fp32Words, float>(rows);
}

template <typename Scalar, typename Out>
void exponentials_into(const ExponentialBlock& block) {
  block.out == nullptr ? exponentials_of<false, Scalar, Out>(block) : exponentials_of<true, Scalar, Out>(block);
}

void exponential_block(const ExponentialBlock& block) {
  if (block.left.bf16)
    block.out_bf16 ? exponentials_into<uint16_t, uint16_t>(block) : exponentials_into<uint16_t, float>(block);
  else
    block.out_bf16 ? exponentials_into<float, uint16_t>(block) : exponentials_into<float, float>(block);
}

int64_t right_words(int64_t depth, int64_t columns) { return words<Fp32Words>(depth) * rounded_up(columns, kPanel); }

void pack_right(const PackedRight& right, int64_t panel) {
  if (right.bf16)
    right.left_bf16 ? pack_panel<BothBf16, uint16_t>(right, panel) : pack_panel<Fp32Words, uint16_t>(right, panel);
  else
    pack_panel<Fp32Words, float>(right, panel);
}

void product(const ProductBlock& block) {
  if (block.right.left_bf16)
    block.right.bf16 ? product_of<BothBf16, uint16_t>(block) : product_of<Fp32Words, uint16_t>(block);
  else
    product_of<Fp32Words, float>(block);
}

static_assert(kDepthBlock * kStrip <= negotiator::kProductScratch);

}  // namespace

namespace negotiator {

const Kernels KERNELS = {
    KERNELS_NAME,
    attention_scratch,
    attention,
    gradient_scratch,
    attention_gradient,
    maximum,
    exponentials,
    block_columns,
    packed_words,
    block_words,
    pack_rows,
    exponential_block,
    kPanel,
    right_words,
    pack_right,
    product,
    linear_words,
    pack_linear,
    linear,
    gated,
    kStrip,
    norm_strip,
    rotate,
    norm_rows,
    norm_gradient,
    gate_rows,
    gate_gradient,
    rotate_heads,
};

}  // namespace negotiator
