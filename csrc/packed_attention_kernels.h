// One tile of attention's gradient, in fp32. Included by kernels.cpp, once per instruction set.
//
// R = rows of the tile (queries x heads of the group), padded to whole vectors; D = head dimension, padded likewise.
// As in the forward pass keys are rows, [keys, R], so that of the five products none needs K or V transposed: only what
// stays for the whole tile, Q and dO, is kept both ways.
#pragma once

#include "kernels.h"
#include "tile_product.h"

namespace {

using negotiator::GradientTile;
using negotiator::kKeyBlock;

struct GradientScratch {
  int64_t rows, dim;              // padded
  float *q, *dout, *dq;           // [rows, dim]
  float *q_columns, *dout_columns;  // [dim, rows]; the former times scale / ln 2
  float *keys, *values;           // [kKeyBlock, dim]
  float* probabilities;           // [kKeyBlock, rows]
  float* slopes;                  // [kKeyBlock, rows], d loss / d probability, then / d score
  float *lse, *mean;              // [rows], the former / ln 2; d loss / d probability on average
  int32_t* visible;               // [rows], tokens from the segment's start on that the row sees

  GradientScratch(float* memory, int64_t real_rows, int64_t real_dim) : rows(padded(real_rows)), dim(padded(real_dim)) {
    const auto take = [&](int64_t n) {
      float* start = memory;
      memory += n;
      return start;
    };
    q = take(rows * dim);
    dout = take(rows * dim);
    dq = take(rows * dim);
    q_columns = take(dim * rows);
    dout_columns = take(dim * rows);
    keys = take(kKeyBlock * dim);
    values = take(kKeyBlock * dim);
    probabilities = take(kKeyBlock * rows);
    slopes = take(kKeyBlock * rows);
    lse = take(rows);
    mean = take(rows);
    visible = reinterpret_cast<int32_t*>(take(rows));
  }
};

int64_t gradient_scratch(int64_t rows, int64_t dim) {
  rows = padded(rows), dim = padded(dim);
  return 5 * rows * dim + 2 * kKeyBlock * dim + 2 * kKeyBlock * rows + 3 * rows;
}

void load_tile(const GradientScratch& s, const GradientTile& tile) {
  constexpr float kLog2e = 1.44269504f;
  // Padding is computed and thrown away, so it only has to be numbers.
  memset(s.q, 0, s.rows * s.dim * 5 * sizeof(float));
  memset(s.keys, 0, kKeyBlock * s.dim * 2 * sizeof(float));
  memset(s.lse, 0, s.rows * 3 * sizeof(float));
  for (int64_t r = 0; r < tile.queries * tile.group; ++r) {
    const int64_t token = tile.first + r / tile.group, head = r % tile.group;
    const int64_t at = token * tile.q_stride + head * tile.dim;
    float* q = s.q + r * s.dim;
    float* dout = s.dout + r * s.dim;
    memcpy(q, tile.q + at, tile.dim * sizeof(float));
    memcpy(dout, tile.dout + at, tile.dim * sizeof(float));
    float mean = 0;  // in the order of the products it is compared with: where one key has all the weight they cancel
    for (int64_t d = 0; d < tile.dim; ++d) {
      s.q_columns[d * s.rows + r] = q[d] * (tile.scale * kLog2e);
      s.dout_columns[d * s.rows + r] = dout[d];
      mean += dout[d] * tile.out[at + d];
    }
    s.mean[r] = mean;
    s.lse[r] = tile.lse[token + head * tile.lse_head_stride] * kLog2e;
    s.visible[r] = static_cast<int32_t>(token - tile.start + 1);
  }
}

// Scores and d loss / d probability of n keys -> probabilities and d loss / d score. `position` is that of the first key
// from the segment's start on; a prefix, which everybody sees, has a negative one.
void differentiate(const GradientScratch& s, int64_t n, int64_t position) {
  for (int64_t r = 0; r < s.rows; r += kLanes) {
    const Float lse = load<Float>(s.lse + r), mean = load<Float>(s.mean + r);
    const Int visible = load<Int>(s.visible + r);
    for (int64_t j = 0; j < n; ++j) {
      float* probability = s.probabilities + j * s.rows + r;
      float* slope = s.slopes + j * s.rows + r;
      const Int seen = static_cast<int32_t>(position + j) < visible;
      const Float p = seen ? exp2(load<Float>(probability) - lse) : Float{};
      store(probability, p);
      store(slope, seen ? p * (load<Float>(slope) - mean) : Float{});
    }
  }
}

// What n <= kKeyBlock keys from token `first` on have to do with the tile.
void gradient_of_keys(const GradientScratch& s, const GradientTile& tile, int64_t first, int64_t n, int64_t position,
                      float* sums) {
  const int64_t rows = tile.queries * tile.group;
  for (int64_t j = 0; j < n; ++j) {
    widen_row(tile.k + (first + j) * tile.kv_stride, tile.dim, s.keys + j * s.dim);
    widen_row(tile.v + (first + j) * tile.kv_stride, tile.dim, s.values + j * s.dim);
  }
  gemm(n, s.rows, tile.dim, s.keys, s.dim, 1, s.q_columns, s.rows, s.probabilities, s.rows, false);
  gemm(n, s.rows, tile.dim, s.values, s.dim, 1, s.dout_columns, s.rows, s.slopes, s.rows, false);
  differentiate(s, n, position);
  gemm(n, s.dim, rows, s.slopes, s.rows, 1, s.q, s.dim, sums, 2 * tile.sum_stride, true);
  gemm(n, s.dim, rows, s.probabilities, s.rows, 1, s.dout, s.dim, sums + tile.sum_stride, 2 * tile.sum_stride, true);
  gemm(rows, s.dim, n, s.slopes, 1, s.rows, s.keys, s.dim, s.dq, s.dim, true);
}

void attention_gradient(const GradientTile& tile) {
  const GradientScratch s(tile.scratch, tile.queries * tile.group, tile.dim);
  load_tile(s, tile);
  const auto all = [&](int64_t start, int64_t keys, int64_t position, float* sums) {
    for (int64_t j = 0; j < keys; j += kKeyBlock)
      gradient_of_keys(s, tile, start + j, keys - j < kKeyBlock ? keys - j : kKeyBlock, position + j,
                       sums + j * 2 * tile.sum_stride);
  };
  all(tile.prefix_start, tile.prefix, -tile.prefix, tile.prefix_sums);
  all(tile.start, tile.first + tile.queries - tile.start, 0, tile.own_sums);
  for (int64_t r = 0; r < tile.queries * tile.group; ++r) {
    float* to = tile.dq + (tile.first + r / tile.group) * tile.q_stride + r % tile.group * tile.dim;
    for (int64_t d = 0; d < tile.dim; ++d) to[d] = s.dq[r * s.dim + d] * tile.scale;
  }
}

}  // namespace
