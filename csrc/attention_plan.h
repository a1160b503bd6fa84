// Which queries see which keys, in pieces such that keys seen by several sequences are read once for all of them.
//
// A query that several pieces make up goes from one to the next, wave by wave, with the state of its softmax. Pieces end
// where blocks of keys do, so that the result has the same bits however its sequence is cut up: it depends neither on
// what is cached nor on who is computed beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {

// Sequences as negotiator_kernels/attention.py describes them.
struct Segments {
  const int64_t *slots, *slot_starts, *query_starts;
  int64_t count;
};

// Checks the starts of sequences that have so many slots and queries in all.
Segments segments_of(const int64_t* slots, const Tensor& slot_starts, const Tensor& query_starts, int64_t slot_count,
                     int64_t query_count);

// Queries, keys and values in memory; strides in elements.
struct AttentionData {
  const void *q, *k, *v;
  void* out;
  int64_t heads, kv_heads, dim;
  ptrdiff_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride, out_head_stride;
  float scale;
  bool q_bf16, kv_bf16;
};

class AttentionPlan {
 public:
  AttentionPlan(const Segments& segments, int64_t heads, int64_t kv_heads);

  // Tiles of one wave may be done in any order by any thread; a wave needs those before it to be complete.
  int64_t waves() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t tiles(int64_t wave) const { return static_cast<int64_t>(tiles_[wave].size()); }
  // Floats that `states` must have room for.
  int64_t states_size(int64_t heads, int64_t dim) const { return waves() > 1 ? queries_ * heads * (dim + 2) : 0; }

  void run(int64_t wave, int64_t tile, const AttentionData& data, float* states) const;

 private:
  struct Piece {
    const int64_t* slots;    // of its keys
    int64_t keys;            // that the first query sees
    int64_t first, queries;  // in tokens_
    int64_t step;            // keys that each further query sees more; 0 in a piece that others follow
  };
  struct Tile {
    int64_t piece, kv_head, cost;
  };

  void cover(const Segments& segments, std::vector<int64_t> members, int64_t from, size_t wave);
  void add_pieces(const int64_t* slots, int64_t keys, const std::vector<int32_t>& tokens, int64_t step, size_t wave);

  int64_t kv_heads_, most_queries_;  // of a piece
  int64_t queries_;
  std::vector<Piece> pieces_;
  std::vector<std::vector<Tile>> tiles_;  // by wave
  std::vector<int32_t> tokens_;
};

float* thread_scratch(int64_t floats);

}  // namespace negotiator
