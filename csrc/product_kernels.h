// Matrix products in registers, fp32 sums. Included by kernels.cpp, once per instruction set.
//
// Operands are packed into 32-bit words: one fp32 number, or where the processor multiplies them a pair of bf16 numbers
// that follow each other along the depth. Left: strips, [word of the depth][kStrip rows]. Right: panels, [word of the
// depth][kPanel columns], so that a vector holds columns and a word of the left side is broadcast.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using negotiator::PackedRight;
using negotiator::ProductBlock;

#if defined(__AVX512F__)
constexpr int kStrip = 8, kVectors = 3;  // 24 of the 32 registers hold sums
#else
constexpr int kStrip = 6, kVectors = 2;  // 12 of 16
#endif
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kDepthBlock = 128;  // words; of all columns, they stay in the second-level cache

// What a step along the depth is in an operand, and how one of each is multiplied.
struct Fp32Words {
  using Word = uint32_t;
  static constexpr int64_t kDepth = 1;  // numbers a word
  static constexpr int64_t kRight = kPanel;  // 32-bit words of a panel that belong to a step
  template <int kRows>
  static inline __attribute__((always_inline)) void multiply_add(Float (&sum)[kRows][kVectors], const uint32_t* left,
                                                                 const uint32_t* right) {
    Float columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = load<Float>(right + j * kLanes);
    add_rows<kRows>(sum, left, columns);
  }
  template <int kRows>
  static inline __attribute__((always_inline)) void add_rows(Float (&sum)[kRows][kVectors], const uint32_t* left,
                                                             const Float (&columns)[kVectors]) {
    for (int i = 0; i < kRows; ++i) {
      const float x = load<float>(left + i);
      for (int j = 0; j < kVectors; ++j) sum[i][j] += x * columns[j];
    }
  }
  // Word k of numbers that lie `step` apart; `depth` is how many they are.
  template <typename Scalar>
  static uint32_t word(const Scalar* from, int64_t step, int64_t k, int64_t) {
    const float x = widen(from[k * step]);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
};

// A weight that stays in bf16, to be read faster, and is multiplied with fp32 rows.
struct WidenedWords {
  using Word = uint16_t;
  static constexpr int64_t kDepth = 1, kRight = kPanel / 2;
  template <int kRows>
  static inline __attribute__((always_inline)) void multiply_add(Float (&sum)[kRows][kVectors], const uint32_t* left,
                                                                 const uint32_t* right) {
    Float columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = widen_vector(reinterpret_cast<const uint16_t*>(right) + j * kLanes);
    Fp32Words::add_rows<kRows>(sum, left, columns);
  }
  static uint16_t word(const uint16_t* from, int64_t step, int64_t k, int64_t) { return from[k * step]; }
};

// For a left and a right operand of these types.
template <typename Left, typename Right>
struct WordsOf {
  using Type = Fp32Words;  // bf16 is widened when it is packed
};

#if defined(__AVX512BF16__)
struct Bf16Words {
  using Word = uint32_t;
  static constexpr int64_t kDepth = 2, kRight = kPanel;
  template <int kRows>
  static inline __attribute__((always_inline)) void multiply_add(Float (&sum)[kRows][kVectors], const uint32_t* left,
                                                                 const uint32_t* right) {
    Float columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = load<Float>(right + j * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j)
        sum[i][j] = (Float)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)_mm512_set1_epi32((int)left[i]),
                                           (__m512bh)columns[j]);
  }
  static uint32_t bits(uint16_t x) { return x; }
  static uint32_t bits(float x) {
    uint16_t rounded;
    narrow(x, &rounded);
    return rounded;
  }
  template <typename Scalar>
  static uint32_t word(const Scalar* from, int64_t step, int64_t k, int64_t depth) {
    return bits(from[2 * k * step]) | (2 * k + 1 < depth ? bits(from[(2 * k + 1) * step]) << 16 : 0);
  }
};
template <>
struct WordsOf<uint16_t, uint16_t> {
  using Type = Bf16Words;
};
#endif

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename Words>
constexpr int64_t words(int64_t depth) {
  return (depth + Words::kDepth - 1) / Words::kDepth;
}

// Packs n <= kWidth rows or columns, `stride` apart, whose numbers along the depth are `step` apart; the rest is 0.
template <typename Words, int64_t kWidth, typename Scalar>
void pack(const Scalar* from, int64_t stride, int64_t step, int64_t n, int64_t depth, typename Words::Word* to) {
  const int64_t count = words<Words>(depth);
  if (n < kWidth) memset(to, 0, count * kWidth * sizeof *to);
  if (stride == 1 && n == kWidth) {
    const int64_t whole = depth / Words::kDepth;  // without a test on the depth the loop over the columns is vectors
    for (int64_t k = 0; k < whole; ++k)
      for (int64_t i = 0; i < kWidth; ++i)
        to[k * kWidth + i] = Words::word(from + k * Words::kDepth * step + i, step, 0, Words::kDepth);
    for (int64_t i = 0; i < kWidth && whole < count; ++i)
      to[whole * kWidth + i] = Words::word(from + i, step, whole, depth);
    return;
  }
  constexpr int64_t kStep = 16;  // a cache line of each row at a time, so that what is written stays in the cache
  for (int64_t start = 0; start < count; start += kStep) {
    const int64_t end = start + kStep < count ? start + kStep : count;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = start; k < end; ++k) to[k * kWidth + i] = Words::word(from + i * stride, step, k, depth);
  }
}

// Memory to ask for while a product is under way: `step` bytes further with each step along the depth.
struct Ahead {
  const char* from;
  int64_t step;
};

// The panel itself, some lines before they are needed.
template <typename Words>
Ahead same_panel(const uint32_t* right) {
  return {reinterpret_cast<const char*>(right + 24 * kPanel), Words::kRight * 4};
}

// out[kRows, kPanel] (+)= one strip, or the first rows of one, times one panel.
template <typename Words, bool kAccumulate, int kRows = kStrip>
void multiply(int64_t count, const uint32_t* left, const uint32_t* right, float* out, int64_t stride, Ahead ahead) {
  Float sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(ahead.from + k * ahead.step);
    Words::template multiply_add<kRows>(sum, left + k * kStrip, right + k * Words::kRight);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + i * stride + j * kLanes;
      store(to, kAccumulate ? load<Float>(to) + sum[i][j] : sum[i][j]);
    }
}

// The same in parts. Sums of many terms, one after the other, lose digits; sums of sums lose fewer.
template <typename Words, int kRows = kStrip>
void multiply_in_parts(int64_t count, const uint32_t* left, const uint32_t* right, float* out, int64_t stride,
                       Ahead ahead, bool accumulate = false) {
  constexpr int64_t kPart = 256;  // steps
  for (int64_t k = 0; k < count; k += kPart) {
    const int64_t n = count - k < kPart ? count - k : kPart;
    const uint32_t *rows = left + k * kStrip, *columns = right + k * Words::kRight;
    const Ahead next{ahead.from + k * ahead.step, ahead.step};
    if (accumulate || k > 0)
      multiply<Words, true, kRows>(n, rows, columns, out, stride, next);
    else
      multiply<Words, false, kRows>(n, rows, columns, out, stride, next);
  }
}

// One panel of `right`, all of its depth, in blocks of kDepthBlock words.
template <typename Words, typename Scalar>
void pack_panel(const PackedRight& right, int64_t panel) {
  constexpr int64_t kNumbers = kDepthBlock * Words::kDepth;
  const int64_t first = panel * kPanel, n = right.columns - first < kPanel ? right.columns - first : kPanel;
  const int64_t padded_columns = rounded_up(right.columns, kPanel);
  for (int64_t k = 0; k < right.depth; k += kNumbers) {
    const int64_t depth = right.depth - k < kNumbers ? right.depth - k : kNumbers, count = words<Words>(depth);
    pack<Words, kPanel>(static_cast<const Scalar*>(right.from) + k * right.stride + first, 1, right.stride, n, depth,
                 right.packed + words<Words>(k) * padded_columns + first * count);
  }
}

template <typename Words>
void multiply_edge(int64_t count, const uint32_t* left, const uint32_t* right, float* out, int64_t stride, int64_t rows,
                   int64_t columns) {
  float tile[kStrip * kPanel];
  multiply<Words, false>(count, left, right, tile, kPanel, same_panel<Words>(right));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i * stride + j] += tile[i * kPanel + j];
}

template <typename Words, typename Scalar>
void product_of(const ProductBlock& block) {
  constexpr int64_t kNumbers = kDepthBlock * Words::kDepth;
  const PackedRight& right = block.right;
  const int64_t padded_columns = rounded_up(right.columns, kPanel);
  const auto* left = static_cast<const Scalar*>(block.left);
  for (int64_t k = 0; k < right.depth; k += kNumbers) {
    const int64_t depth = right.depth - k < kNumbers ? right.depth - k : kNumbers, count = words<Words>(depth);
    const uint32_t* packed = right.packed + words<Words>(k) * padded_columns;
    for (int64_t i = 0; i < block.rows; i += kStrip) {
      const int64_t rows = block.rows - i < kStrip ? block.rows - i : kStrip;
      pack<Words, kStrip>(left + i * block.row_stride + k * block.depth_stride, block.row_stride, block.depth_stride, rows,
                   depth, block.scratch);
      float* out = block.out + i * block.out_stride;
      for (int64_t j = 0; j < right.columns; j += kPanel) {
        const int64_t columns = right.columns - j < kPanel ? right.columns - j : kPanel;
        if (rows == kStrip && columns == kPanel)
          multiply<Words, true>(count, block.scratch, packed + j * count, out + j, block.out_stride,
                                same_panel<Words>(packed + j * count));
        else
          multiply_edge<Words>(count, block.scratch, packed + j * count, out + j, block.out_stride, rows, columns);
      }
    }
  }
}

}  // namespace
