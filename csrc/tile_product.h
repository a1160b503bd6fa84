// Products of tiles that lie in the cache, as attention takes them: neither side is repacked. Included by kernels.cpp, once
// per instruction set.
#pragma once

#include "simd.h"

namespace {

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// c[M, N vectors] (+)= a[M, depth] b[depth, N vectors], held in registers throughout.
template <int M, int N>
void gemm_block(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                int64_t c_row, bool accumulate) {
  Float sum[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sum[i][j] = Float{};
  for (int64_t k = 0; k < depth; ++k) {
    Float right[N];
    for (int j = 0; j < N; ++j) right[j] = load<Float>(b + k * b_row + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const float left = a[i * a_row + k * a_col];
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float* to = c + i * c_row + j * kLanes;
      store(to, accumulate ? load<Float>(to) + sum[i][j] : sum[i][j]);  // a sum of sums loses fewer digits than one sum
    }
}

template <int N>
void gemm_columns(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                  int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  for (; rows >= 6; rows -= 6, a += 6 * a_row, c += 6 * c_row)
    gemm_block<6, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
  switch (rows) {
    case 5: return gemm_block<5, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 4: return gemm_block<4, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 3: return gemm_block<3, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 2: return gemm_block<2, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    case 1: return gemm_block<1, N>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate);
  }
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns is a multiple of kLanes, a has any strides.
void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
          int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    gemm_columns<2>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);
  if (j < columns) gemm_columns<1>(rows, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);
}

template <typename Scalar>
void widen_row(const Scalar* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, widen_vector(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

}  // namespace
