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

struct Kernels {
  const char* name;
  int64_t (*attention_scratch)(int64_t rows, int64_t dim);
  void (*attention)(const AttentionTile& tile);
  // Largest of n > 0 numbers.
  float (*maximum)(const float* x, int64_t n);
  // weights[i] = exp((x[i] - shift) * factor), for arguments <= 0; returns their sum, NaN if any is NaN.
  double (*exponentials)(const float* x, int64_t n, double shift, double factor, double* weights);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

const Kernels& kernels();

}  // namespace negotiator
