// Attention of a packed batch and its gradient, on all threads. What is summed up in which order depends on the batch
// alone, so the results have the same bits with any number of threads.

#include <algorithm>
#include <cstring>
#include <numeric>

#include "attention_plan.h"
#include "kernels.h"
#include "operators.h"

namespace negotiator {
namespace {

constexpr int64_t kTileRows = 96;      // queries x heads of a group
constexpr int64_t kChunkQueries = 256;  // enough to make up for the sums of its own that a chunk has for each of its keys
constexpr int64_t kReducedTokens = 32;  // at a time

// Consecutive queries of one segment.
struct Tile {
  int64_t prefix_start, prefix;  // what all of them see
  int64_t start;                 // of the segment
  int64_t first, queries;
  int64_t cost() const { return queries * (prefix + first - start + queries); }
};

// Consecutive tiles with one prefix, whose gradients are added up by one thread.
struct Chunk {
  size_t first, last;           // tiles
  int64_t prefix_start, prefix;
  int64_t start, end;           // tokens seen beside the prefix
  int64_t sums;                 // rows of sums that the chunks before it have
  int64_t queries, cost;
};

// One head of a tile or chunk.
struct Task {
  size_t index;
  int64_t head, cost;
};

struct Shape {
  int64_t tokens, heads, kv_heads, dim;
  int64_t group() const { return heads / kv_heads; }
};

void require_rows(const Tensor& x, const char* name, int64_t tokens, int64_t heads, int64_t dim) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 3 && x.size(0) == tokens &&
              x.size(1) == heads && x.size(2) == dim && x.is_contiguous(),
          std::string(name) + " must be contiguous float32 on the CPU, [tokens, heads, dim]");
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 3 && k.dim() == 3, "q, k and v must be [tokens, heads, dim]");
  const Shape shape{q.size(0), q.size(1), k.size(1), q.size(2)};
  require_rows(q, "q", shape.tokens, shape.heads, shape.dim);
  require_rows(k, "k", shape.tokens, shape.kv_heads, shape.dim);
  require_rows(v, "v", shape.tokens, shape.kv_heads, shape.dim);
  require(shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0,
          "the heads of q must be a multiple of those of k");
  return shape;
}

std::vector<Tile> tiles_of(const Tensor& segments, const Shape& shape) {
  require(segments.is_cpu() && segments.scalar_type() == ScalarType::Long && segments.dim() == 2 &&
              segments.size(1) == 4 && segments.is_contiguous(),
          "segments must be contiguous int64 on the CPU, [segments, 4]");
  const int64_t* row = segments.const_data_ptr<int64_t>();
  const int64_t most = std::max<int64_t>(1, kTileRows / shape.group());
  std::vector<Tile> tiles;
  int64_t token = 0;
  for (int64_t s = 0; s < segments.size(0); ++s, row += 4) {
    const int64_t start = row[0], end = row[1], prefix_start = row[2], prefix_end = row[3];
    require(start == token && start < end, "segments must follow each other from 0 on, none of them empty");
    require(0 <= prefix_start && prefix_start <= prefix_end && prefix_end <= start,
            "the prefix of segment " + std::to_string(s) + " must lie before it");
    for (; token < end; token += most)
      tiles.push_back({prefix_start, prefix_end - prefix_start, start, token, std::min(most, end - token)});
    token = end;
  }
  require(token == shape.tokens, "segments must end with the last token");
  return tiles;
}

std::vector<Chunk> chunks_of(const std::vector<Tile>& tiles) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    if (chunks.empty() || chunks.back().prefix_start != tile.prefix_start || chunks.back().prefix != tile.prefix ||
        chunks.back().queries + tile.queries > kChunkQueries) {
      const int64_t sums = chunks.empty() ? 0 : chunks.back().sums + chunks.back().prefix + chunks.back().end - chunks.back().start;
      chunks.push_back({i, i, tile.prefix_start, tile.prefix, tile.start, tile.start, sums, 0, 0});
    }
    Chunk& chunk = chunks.back();
    chunk.last = i + 1;
    chunk.end = tile.first + tile.queries;
    chunk.queries += tile.queries;
    chunk.cost += tile.cost();
  }
  return chunks;
}

// The costly ones first, so that no thread is left alone with one at the end.
template <typename Part, typename Cost>
std::vector<Task> tasks_of(const std::vector<Part>& parts, int64_t heads, Cost cost) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < parts.size(); ++i)
    for (int64_t head = 0; head < heads; ++head) tasks.push_back({i, head, cost(parts[i])});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

// to[dim] += from[dim] for the tokens that [start, start + count) has in common with [first, last).
void add_common(const float* from, int64_t stride, int64_t start, int64_t count, int64_t first, int64_t last, float* to,
                int64_t to_stride, int64_t dim) {
  for (int64_t t = std::max(start, first); t < std::min(start + count, last); ++t)
    for (int64_t d = 0; d < dim; ++d) to[t * to_stride + d] += from[(t - start) * stride + d];
}

}  // namespace

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments,
                                            double scale) {
  const Shape shape = shape_of(q, k, v);
  const std::vector<Tile> tiles = tiles_of(segments, shape);
  // Of each tile the tokens that its last query sees; those of a segment share a list.
  std::vector<int64_t> slots, first_slots;
  for (size_t i = 0; i < tiles.size(); ++i) {
    if (i > 0 && tiles[i].start == tiles[i - 1].start) {
      first_slots.push_back(first_slots.back());
    } else {
      first_slots.push_back(static_cast<int64_t>(slots.size()));
      for (int64_t j = 0; j < tiles[i].prefix; ++j) slots.push_back(tiles[i].prefix_start + j);
    }
    for (int64_t j = 0; j < tiles[i].queries; ++j) slots.push_back(tiles[i].first + j);
  }
  std::vector<int32_t> tokens(shape.tokens);
  std::iota(tokens.begin(), tokens.end(), 0);

  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {shape.heads, shape.tokens});
  const auto *q_data = q.const_data_ptr<float>(), *k_data = k.const_data_ptr<float>(), *v_data = v.const_data_ptr<float>();
  float *out_data = out.mutable_data_ptr<float>(), *lse_data = lse.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  const int64_t group = shape.group(), q_stride = shape.heads * shape.dim, kv_stride = shape.kv_heads * shape.dim;
  const std::vector<Task> tasks = tasks_of(tiles, shape.kv_heads, [](const Tile& tile) { return tile.cost(); });
#pragma omp parallel for schedule(dynamic, 1) num_threads(torch::stable::get_num_threads()) if (tasks.size() > 1)
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Tile& tile = tiles[tasks[i].index];
    const int64_t kv_head = tasks[i].head, head = kv_head * group;
    kernel.attention({
        .q = q_data + head * shape.dim,
        .tokens = tokens.data() + tile.first,
        .k = k_data + kv_head * shape.dim,
        .v = v_data + kv_head * shape.dim,
        .out = out_data + head * shape.dim,
        .states = nullptr,
        .from_state = false,
        .to_state = false,
        .slots = slots.data() + first_slots[tasks[i].index],
        .queries = tile.queries,
        .group = group,
        .dim = shape.dim,
        .first_visible = tile.prefix + tile.first - tile.start + 1,
        .step = 1,
        .q_stride = q_stride,
        .q_head_stride = shape.dim,
        .k_stride = kv_stride,
        .v_stride = kv_stride,
        .out_stride = q_stride,
        .out_head_stride = shape.dim,
        .state_stride = 0,
        .scale = static_cast<float>(scale),
        .q_bf16 = false,
        .kv_bf16 = false,
        .scratch = thread_scratch(kernel.attention_scratch(tile.queries * group, shape.dim)),
        .lse = lse_data + head * shape.tokens,
        .lse_head_stride = shape.tokens,
    });
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             const Tensor& segments, double scale) {
  const Shape shape = shape_of(q, k, v);
  require_rows(dout, "dout", shape.tokens, shape.heads, shape.dim);
  require_rows(out, "out", shape.tokens, shape.heads, shape.dim);
  require(lse.is_cpu() && lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == shape.heads &&
              lse.size(1) == shape.tokens && lse.is_contiguous(),
          "lse must be contiguous float32 on the CPU, [heads, tokens]");
  const std::vector<Tile> tiles = tiles_of(segments, shape);
  const std::vector<Chunk> chunks = chunks_of(tiles);
  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes()), dv = torch::stable::new_empty(v, v.sizes());
  if (chunks.empty()) return {dq, dk, dv};

  const Chunk& last = chunks.back();
  const int64_t rows = last.sums + last.prefix + last.end - last.start;
  const int64_t stride = (shape.dim + 15) / 16 * 16;  // whole vectors of any kind
  AlignedWords memory(shape.kv_heads * rows * 2 * stride);
  auto* sums = reinterpret_cast<float*>(memory.data());
  const auto sums_of = [&](const Chunk& chunk, int64_t head) { return sums + (head * rows + chunk.sums) * 2 * stride; };
  const auto *q_data = q.const_data_ptr<float>(), *k_data = k.const_data_ptr<float>(), *v_data = v.const_data_ptr<float>();
  const auto *out_data = out.const_data_ptr<float>(), *dout_data = dout.const_data_ptr<float>();
  const float* lse_data = lse.const_data_ptr<float>();
  float *dq_data = dq.mutable_data_ptr<float>(), *dk_data = dk.mutable_data_ptr<float>(), *dv_data = dv.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  const int64_t group = shape.group(), q_stride = shape.heads * shape.dim, kv_stride = shape.kv_heads * shape.dim;
  const std::vector<Task> tasks = tasks_of(chunks, shape.kv_heads, [](const Chunk& chunk) { return chunk.cost; });
  const int64_t blocks = (shape.tokens + kReducedTokens - 1) / kReducedTokens;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
      const Chunk& chunk = chunks[tasks[i].index];
      const int64_t kv_head = tasks[i].head, head = kv_head * group;
      float* prefix_sums = sums_of(chunk, kv_head);
      float* own_sums = prefix_sums + chunk.prefix * 2 * stride;
      memset(prefix_sums, 0, (chunk.prefix + chunk.end - chunk.start) * 2 * stride * sizeof(float));
      for (size_t j = chunk.first; j < chunk.last; ++j) {
        const Tile& tile = tiles[j];
        kernel.attention_gradient({
            .q = q_data + head * shape.dim,
            .out = out_data + head * shape.dim,
            .dout = dout_data + head * shape.dim,
            .dq = dq_data + head * shape.dim,
            .k = k_data + kv_head * shape.dim,
            .v = v_data + kv_head * shape.dim,
            .lse = lse_data + head * shape.tokens,
            .first = tile.first,
            .queries = tile.queries,
            .group = group,
            .dim = shape.dim,
            .start = tile.start,
            .prefix_start = tile.prefix_start,
            .prefix = tile.prefix,
            .prefix_sums = prefix_sums,
            .own_sums = own_sums + (tile.start - chunk.start) * 2 * stride,
            .q_stride = q_stride,
            .kv_stride = kv_stride,
            .lse_head_stride = shape.tokens,
            .sum_stride = stride,
            .scale = static_cast<float>(scale),
            .scratch = thread_scratch(kernel.gradient_scratch(tile.queries * group, shape.dim)),
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * shape.kv_heads; ++i) {
      const int64_t head = i % shape.kv_heads, first = i / shape.kv_heads * kReducedTokens;
      const int64_t end = std::min(first + kReducedTokens, shape.tokens);
      for (const auto& [data, offset, factor] :
           {std::tuple{dk_data, int64_t{0}, static_cast<float>(scale)}, {dv_data, stride, 1.0f}}) {
        float* to = data + head * shape.dim;
        for (int64_t t = first; t < end; ++t) memset(to + t * kv_stride, 0, shape.dim * sizeof(float));
        for (const Chunk& chunk : chunks) {
          const float* from = sums_of(chunk, head) + offset;
          add_common(from, 2 * stride, chunk.prefix_start, chunk.prefix, first, end, to, kv_stride, shape.dim);
          add_common(from + chunk.prefix * 2 * stride, 2 * stride, chunk.start, chunk.end - chunk.start, first, end, to,
                     kv_stride, shape.dim);
        }
        for (int64_t t = first; t < end; ++t)
          for (int64_t d = 0; d < shape.dim; ++d) to[t * kv_stride + d] *= factor;
      }
    }
  }
  return {dq, dk, dv};
}

}  // namespace negotiator
