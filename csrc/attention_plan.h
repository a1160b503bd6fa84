// Which queries see which keys, in pieces such that keys seen by several sequences are read once for all of them.
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

  // Work items, which may be done in any order by any thread; after all of them, the queries [0, queries) to be merged.
  int64_t tiles() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t queries() const { return static_cast<int64_t>(part_starts_.size()) - 1; }
  // Floats that `parts` must have room for.
  int64_t parts_size(int64_t heads, int64_t dim) const { return part_starts_.back() * heads * (dim + 2); }

  void run(int64_t tile, const AttentionData& data, float* parts) const;
  void merge(int64_t query, const AttentionData& data, const float* parts) const;

 private:
  struct Piece {
    const int64_t* slots;  // of its keys
    int64_t keys;          // that the first query sees
    int64_t first, queries;  // in tokens_ and part_of_
    int64_t step;            // keys that each further query sees more
  };
  struct Tile {
    int64_t piece, kv_head, cost;
  };

  void cover(const Segments& segments, std::vector<int64_t> members, int64_t from);
  void add_pieces(const int64_t* slots, int64_t keys, const std::vector<int32_t>& tokens, int64_t step);

  int64_t most_queries_;  // of a piece
  std::vector<Piece> pieces_;
  std::vector<Tile> tiles_;
  std::vector<int32_t> tokens_, part_of_;
  std::vector<int64_t> part_starts_;  // of each query; one that is seen in a single piece has none
};

float* thread_scratch(int64_t floats);

}  // namespace negotiator
