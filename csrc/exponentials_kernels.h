// A matrix product whose epilogue is the exponential: logits live in registers and first-level cache only. Included by
// kernels.cpp, once per instruction set.
#pragma once

#include "product_kernels.h"

namespace {

using negotiator::ExponentialBlock;
using negotiator::PackedRows;

void narrow_vector(Float x, float* to) { store(to, x); }
void narrow_vector(Float x, uint16_t* to) {
  const Uint bits = (Uint)x;
  const Uint rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store(to, __builtin_convertvector(x == x ? rounded : (Uint)(Int{} + 0x7fc0), Short));
}

// One row of a block: logits -> exponentials, their sum and the sum of value times logarithm.
template <bool kStore, typename Out>
void exponentiate(const float* logits, int64_t n, float inverse_temperature, float anchor, Out* out, float* sum,
                  float* moment) {
  Float sums{}, moments{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Float logs = load<Float>(logits + j) * inverse_temperature - anchor;
    const Float values = exp(logs);
    if (kStore) narrow_vector(values, out + j);
    sums += values;
    moments += values * max(logs, splat(-100.0f));  // so that 0 times -inf is 0
  }
  if (j < n) {
    Float rest = splat(-__builtin_inff());  // whose exponential is 0
    for (int64_t i = j; i < n; ++i) rest[i - j] = logits[i] * inverse_temperature - anchor;
    const Float values = exp(rest);
    for (int64_t i = j; kStore && i < n; ++i) narrow(values[i - j], out + i);
    sums += values;
    moments += values * max(rest, splat(-100.0f));
  }
  *sum = *moment = 0;
  for (int lane = 0; lane < kLanes; ++lane) *sum += sums[lane], *moment += moments[lane];
}

template <typename Words>
int64_t exponential_columns(int64_t depth) {
  constexpr int64_t kCacheWords = 72 << 10;  // packed columns that stay in the second-level cache
  const int64_t panels = kCacheWords / (words<Words>(depth) * kPanel);
  return (panels < 1 ? 1 : panels > 8 ? 8 : panels) * kPanel;
}

template <typename Words, typename Scalar>
void pack_left(const PackedRows& left) {
  const int64_t count = words<Words>(left.depth);
  for (int64_t first = 0; first < left.rows; first += kStrip)
    pack<Words, kStrip>(static_cast<const Scalar*>(left.from) + first * left.stride, left.stride, 1,
                        left.rows - first < kStrip ? left.rows - first : kStrip, left.depth,
                        left.packed + first * count);
}

template <bool kStore, typename Scalar, typename Out>
void exponentials_of(const ExponentialBlock& block) {
  using Words = typename WordsOf<Scalar, Scalar>::Type;
  const PackedRows& left = block.left;
  const int64_t count = words<Words>(left.depth), stride = rounded_up(block.columns, kPanel);
  uint32_t* right = block.scratch;
  float* logits = reinterpret_cast<float*>(right + stride * count);
  for (int64_t j = 0; j < stride; j += kPanel)
    pack<Words, kPanel>(static_cast<const Scalar*>(block.weight) + j * block.weight_stride, block.weight_stride, 1,
                        block.columns - j < kPanel ? block.columns - j : kPanel, left.depth, right + j * count);
  for (int64_t first = 0; first < left.rows; first += kStrip) {
    for (int64_t j = 0; j < stride; j += kPanel)
      multiply_in_parts<Words>(count, left.packed + first * count, right + j * count, logits + j, stride,
                               same_panel<Words>(right + j * count));
    const int64_t last = left.rows - first < kStrip ? left.rows : first + kStrip;
    for (int64_t row = first; row < last; ++row)
      exponentiate<kStore>(logits + (row - first) * stride, block.columns, block.inverse_temperature,
                           block.anchors[row], static_cast<Out*>(block.out) + row * block.out_stride,
                           block.sums + row, block.moments + row);
  }
}

}  // namespace
