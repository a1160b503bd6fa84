// What a decoder layer does besides attention: products of few rows, norms, rotation, gates. Included by kernels.cpp, once
// per instruction set.
#pragma once

#include "product_kernels.h"

namespace {

using negotiator::LinearPanels;
using negotiator::NormStrip;
using negotiator::RotateToken;

// How a weight is kept, and the rows that it is multiplied with: bf16 stays bf16, also where it has to be widened.
#if defined(__AVX512BF16__)
using Bf16Weight = Bf16Words;
#else
using Bf16Weight = WidenedWords;
#endif

constexpr int64_t kRowBlock = 16;  // strips whose packed rows stay in the second-level cache while panels go by

template <typename Words>
int64_t linear_words_of(int64_t depth) {
  return words<Words>(depth) * Words::kRight;
}

int64_t linear_words(int64_t depth, bool bf16) {
  return bf16 ? linear_words_of<Bf16Weight>(depth) : linear_words_of<Fp32Words>(depth);
}

void pack_linear(const void* weight, int64_t stride, int64_t columns, int64_t depth, bool bf16, uint32_t* packed) {
  if (bf16)
    pack<Bf16Weight, kPanel>(static_cast<const uint16_t*>(weight), stride, 1, columns, depth,
                             reinterpret_cast<Bf16Weight::Word*>(packed));
  else
    pack<Fp32Words, kPanel>(static_cast<const float*>(weight), stride, 1, columns, depth, packed);
}

template <typename Words>
void multiply_rows(int64_t rows, int64_t count, const uint32_t* left, const uint32_t* right, float* out, int64_t stride,
                   Ahead ahead, bool accumulate) {
  switch (rows) {
#if defined(__AVX512F__)
    case 8: return multiply_in_parts<Words, 8>(count, left, right, out, stride, ahead, accumulate);
    case 7: return multiply_in_parts<Words, 7>(count, left, right, out, stride, ahead, accumulate);
#endif
    case 6: return multiply_in_parts<Words, 6>(count, left, right, out, stride, ahead, accumulate);
    case 5: return multiply_in_parts<Words, 5>(count, left, right, out, stride, ahead, accumulate);
    case 4: return multiply_in_parts<Words, 4>(count, left, right, out, stride, ahead, accumulate);
    case 3: return multiply_in_parts<Words, 3>(count, left, right, out, stride, ahead, accumulate);
    case 2: return multiply_in_parts<Words, 2>(count, left, right, out, stride, ahead, accumulate);
    case 1: return multiply_in_parts<Words, 1>(count, left, right, out, stride, ahead, accumulate);
  }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Tile {
  int64_t panel, first, rows;  // which panel; of the rows, which
  const uint32_t* left;
  int64_t strip, strips;  // of those that read the panel one after the other

  // While a panel is in the cache, every strip asks for its share of the panel `words` further on. With a single strip,
  // which waits for the memory in any case, that is a matter of the panel itself.
  template <typename Words>
  Ahead ahead(const uint32_t* right, int64_t count, int64_t words) const {
    if (strips == 1) return same_panel<Words>(right);
    const int64_t share = count * Words::kRight * 4 / strips;
    return {reinterpret_cast<const char*>(right + words) + strip * share, Words::kRight * 4 / strips};
  }
};

// Calls each(tile) in an order that reads the packed rows of a block from the cache.
template <typename Words, typename Each>
void for_each_tile(const LinearPanels& p, Each each) {
  const int64_t strips = (p.rows + kStrip - 1) / kStrip, strip_words = words<Words>(p.depth) * kStrip;
  for (int64_t block = 0; block < strips; block += kRowBlock) {
    const int64_t n = least(kRowBlock, strips - block);
    for (int64_t panel = p.first; panel < p.last; ++panel)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t first = (block + i) * kStrip;
        each(Tile{panel, first, least(kStrip, p.rows - first), p.left + (block + i) * strip_words, i, n});
      }
  }
}

template <typename Words>
void linear_of(const LinearPanels& p) {
  const int64_t count = words<Words>(p.depth), panel_words = count * Words::kRight;
  for_each_tile<Words>(p, [&](const Tile& t) {
    const uint32_t* right = p.right + t.panel * panel_words;
    const Ahead ahead = t.ahead<Words>(right, count, panel_words);
    const int64_t columns = least(kPanel, p.columns - t.panel * kPanel);
    float* to = p.out + t.first * p.out_stride + t.panel * kPanel;
    if (columns == kPanel)
      return multiply_rows<Words>(t.rows, count, t.left, right, to, p.out_stride, ahead, p.add);
    float tile[kStrip * kPanel];
    multiply_rows<Words>(t.rows, count, t.left, right, tile, kPanel, ahead, false);
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        to[i * p.out_stride + j] = tile[i * kPanel + j] + (p.add ? to[i * p.out_stride + j] : 0.0f);
  });
}

void linear(const LinearPanels& p) { p.bf16 ? linear_of<Bf16Weight>(p) : linear_of<Fp32Words>(p); }

template <typename Words>
struct PackedAs {  // the words of packed rows
  using Type = Fp32Words;
};
#if defined(__AVX512BF16__)
template <>
struct PackedAs<Bf16Words> {
  using Type = Bf16Words;
};
#endif

template <typename Words>
void gated_of(const LinearPanels& p, uint32_t* packed) {
  using Out = typename PackedAs<Words>::Type;
  const int64_t count = words<Words>(p.depth), strip_words = words<Out>(p.columns) * kStrip;
  for_each_tile<Words>(p, [&](const Tile& t) {
    const int64_t panel_words = count * Words::kRight;
    const uint32_t *right = p.right + 2 * t.panel * panel_words, *up_right = right + panel_words;
    float gate[kStrip * kPanel], up[kStrip * kPanel];
    multiply_rows<Words>(t.rows, count, t.left, right, gate, kPanel, t.ahead<Words>(right, count, 2 * panel_words),
                         false);
    multiply_rows<Words>(t.rows, count, t.left, up_right, up, kPanel,
                         t.ahead<Words>(up_right, count, 2 * panel_words), false);
    for (int64_t i = 0; i < t.rows * kPanel; i += kLanes) {
      const Float x = load<Float>(gate + i);
      store(gate + i, x / (exp(-x) + 1.0f) * load<Float>(up + i));
    }
    const int64_t columns = least(kPanel, p.columns - t.panel * kPanel);
    uint32_t* to = packed + t.first / kStrip * strip_words + t.panel * kPanel / Out::kDepth * kStrip;
    for (int64_t k = 0; k < words<Out>(columns); ++k)
      for (int64_t i = 0; i < t.rows; ++i) to[k * kStrip + i] = Out::word(gate + i * kPanel, 1, k, columns);
  });
}

void gated(const LinearPanels& p, uint32_t* packed) {
  p.bf16 ? gated_of<Bf16Weight>(p, packed) : gated_of<Fp32Words>(p, packed);
}

float sum_of_squares(const float* x, int64_t n) {
  Float sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Float v = load<Float>(x + i);
    sums += v * v;
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

float inverse_root_mean_square(const float* x, int64_t n, float epsilon) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + epsilon);
}

template <typename Out>
void norm_strip_of(const NormStrip& s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const float* x = s.x + i * s.stride;
    const float factor = s.weight ? inverse_root_mean_square(x, s.depth, s.epsilon) : 1.0f;
    for (int64_t k = 0; k < words<Out>(s.depth); ++k) {
      float pair[2] = {};
      for (int64_t d = k * Out::kDepth; d < least((k + 1) * Out::kDepth, s.depth); ++d)
        pair[d - k * Out::kDepth] = s.weight ? x[d] * factor * s.weight[d] : x[d];
      s.packed[k * kStrip + i] = Out::word(pair, 1, 0, Out::kDepth);
    }
  }
}

void norm_strip(const NormStrip& s) {
  s.bf16 ? norm_strip_of<PackedAs<Bf16Weight>::Type>(s) : norm_strip_of<Fp32Words>(s);
}

void rotate_head(const RotateToken& t, float* x, const float* norm) {
  if (norm) {
    const float factor = inverse_root_mean_square(x, t.dim, t.epsilon);
    for (int64_t d = 0; d < t.dim; ++d) x[d] = x[d] * factor * norm[d];
  }
  const int64_t half = t.dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    x[d] = a * t.cos[d] - b * t.sin[d];
    x[d + half] = b * t.cos[d + half] + a * t.sin[d + half];
  }
}

template <typename Scalar>
void copy_to_cache(const float* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], static_cast<Scalar*>(to) + i);
}

void rotate(const RotateToken& t) {
  const int64_t heads = t.heads + 2 * t.kv_heads, n = t.kv_heads * t.dim;
  for (int64_t i = 0; t.bias && i < heads * t.dim; ++i) t.qkv[i] += t.bias[i];
  for (int64_t head = 0; head < t.heads + t.kv_heads; ++head)
    rotate_head(t, t.qkv + head * t.dim, head < t.heads ? t.q_norm : t.k_norm);
  const float *key = t.qkv + t.heads * t.dim, *value = key + n;
  t.bf16 ? copy_to_cache<uint16_t>(key, n, t.key) : copy_to_cache<float>(key, n, t.key);
  t.bf16 ? copy_to_cache<uint16_t>(value, n, t.value) : copy_to_cache<float>(value, n, t.value);
}

}  // namespace
