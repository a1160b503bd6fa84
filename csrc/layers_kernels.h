// What stands between the matrix products of a layer in training: RMS norms, rotations and gates, forward and backward.
// Included by kernels.cpp, once per instruction set.
#pragma once

#include "decoder_kernels.h"

namespace {

using negotiator::HeadRotation;
using negotiator::NormGradient;
using negotiator::NormRows;

// step(i, n) for each vector of n numbers from i on; n is kLanes but for the last one.
template <typename Step>
inline __attribute__((always_inline)) void for_each_vector(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step(i, (int64_t)kLanes);
  if (i < count) step(i, count - i);
}

// The first n of a vector's numbers; the others are 0.
inline __attribute__((always_inline)) Float load_first(const float* from, int64_t n) {
  Float x{};
  memcpy(&x, from, n * sizeof(float));
  return x;
}

inline __attribute__((always_inline)) void store_first(float* to, Float x, int64_t n) {
  memcpy(to, &x, n * sizeof(float));
}

void norm_rows(const NormRows& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* x = p.x + r * p.width;
    float* out = p.out + r * p.width;
    const float factor = inverse_root_mean_square(x, p.width, p.epsilon);
    p.factors[r] = factor;
    for_each_vector(p.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      store_first(out + i, load_first(x + i, n) * factor * load_first(p.weight + i, n), n);
    });
  }
}

// With y = f w x and f = 1 / rms(x): dx = f (w dy - x f^2 mean(w dy x)), dw = sum of f x dy.
void norm_gradient(const NormGradient& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const float *x = p.x + r * p.width, *dout = p.dout + r * p.width, factor = p.factors[r];
    float* dx = p.dx + r * p.width;
    Float sums{};
    for_each_vector(p.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      sums += load_first(dout + i, n) * load_first(p.weight + i, n) * load_first(x + i, n);
    });
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    const float along = sum * factor * factor / static_cast<float>(p.width);
    for_each_vector(p.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const Float v = load_first(x + i, n), d = load_first(dout + i, n);
      store_first(dx + i, (d * load_first(p.weight + i, n) - v * along) * factor, n);
      if (p.dweight) store_first(p.dweight + i, load_first(p.dweight + i, n) + d * (v * factor), n);
    });
  }
}

void gate_rows(int64_t count, const float* gate, const float* up, float* out) {
  for_each_vector(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Float x = load_first(gate + i, n);
    store_first(out + i, x / (exp(-x) + 1.0f) * load_first(up + i, n), n);
  });
}

void gate_gradient(int64_t count, const float* dout, const float* gate, const float* up, float* dgate, float* dup) {
  for_each_vector(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Float x = load_first(gate + i, n), d = load_first(dout + i, n);
    const Float sigmoid = 1.0f / (exp(-x) + 1.0f);
    store_first(dgate + i, d * load_first(up + i, n) * (sigmoid * (1.0f + x * (1.0f - sigmoid))), n);
    store_first(dup + i, d * (x * sigmoid), n);
  });
}

// Pairs (a, b) of a head's two halves: a' = a cos - b sin, b' = b cos' + a sin' with the halves of cos and sin; or,
// backward, the transpose of that.
void rotate_heads(const HeadRotation& p) {
  const int64_t half = p.dim / 2;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const float *cos = p.cos + t * p.dim, *sin = p.sin + t * p.dim;
    const float *to_a = sin + (p.backward ? half : 0), *to_b = sin + (p.backward ? 0 : half);
    const float sign = p.backward ? -1.0f : 1.0f;
    for (int64_t head = 0; head < p.heads; ++head) {
      const float* x = p.x + (t * p.heads + head) * p.dim;
      float* out = p.out + (t * p.heads + head) * p.dim;
      for_each_vector(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Float a = load_first(x + i, n), b = load_first(x + half + i, n);
        store_first(out + i, a * load_first(cos + i, n) - b * load_first(to_a + i, n) * sign, n);
        store_first(out + half + i, b * load_first(cos + half + i, n) + a * load_first(to_b + i, n) * sign, n);
      });
    }
  }
}

}  // namespace
