// Splits paged attention into tiles and runs them on all threads.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {
namespace {

constexpr int64_t kTileRows = 96;  // queries x heads of a group: enough to reuse each key, small enough for the cache

struct Tile {
  int64_t segment, kv_head, first_query, queries;
  int64_t cost;
};

void require_starts(const int64_t* starts, int64_t segments, int64_t total, const char* name) {
  require(starts[0] == 0 && starts[segments] == total && std::is_sorted(starts, starts + segments + 1),
          std::string(name) + " must rise from 0 to " + std::to_string(total));
}

std::vector<Tile> make_tiles(const int64_t* slot_starts, const int64_t* query_starts, int64_t segments,
                             int64_t kv_heads, int64_t group) {
  const int64_t most = std::max<int64_t>(1, kTileRows / group);
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t queries = query_starts[s + 1] - query_starts[s];
    const int64_t keys = slot_starts[s + 1] - slot_starts[s];
    for (int64_t first = 0; first < queries; first += most) {
      const int64_t n = std::min(most, queries - first);
      for (int64_t head = 0; head < kv_heads; ++head)
        tiles.push_back({s, head, first, n, n * (keys - queries + first + n)});
    }
  }
  // The costly ones first, so that no thread is left alone with one at the end.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  return tiles;
}

float* thread_scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  constexpr size_t alignment = 64 / sizeof(float);
  if (memory.size() < floats + alignment) memory.resize(floats + alignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                       const Tensor& slot_starts, const Tensor& query_starts, double scale) {
  require(q.dim() == 3, "q must be [queries, heads, dim]");
  const ScalarType dtype = q.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "q must be float32 or bfloat16");
  require(q.is_cpu() && (q.numel() == 0 || q.stride(2) == 1), "q must be on the CPU with a contiguous last dimension");
  for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, {&v_cache, "v_cache"}}) {
    require(cache->dim() == 3 && cache->size(2) == q.size(2) && cache->size(1) == k_cache.size(1) &&
                cache->size(0) == k_cache.size(0),
            std::string(name) + " must be [slots, kv heads, dim], equal for both caches, dim as in q");
    require(cache->scalar_type() == dtype, std::string(name) + " must have the dtype of q");
    require(cache->is_cpu() && (cache->numel() == 0 || cache->stride(2) == 1),
            std::string(name) + " must be on the CPU with a contiguous last dimension");
  }
  const int64_t kv_heads = k_cache.size(1);
  require(kv_heads > 0 && q.size(1) % kv_heads == 0, "the heads of q must be a multiple of those of k_cache");
  require(slot_starts.dim() == 1 && slot_starts.size(0) > 0, "slot_starts must be [segments + 1]");
  const int64_t segments = slot_starts.size(0) - 1;
  require_vector(slots, "slots", ScalarType::Long, slots.numel());
  require_vector(slot_starts, "slot_starts", ScalarType::Long, segments + 1);
  require_vector(query_starts, "query_starts", ScalarType::Long, segments + 1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t* kv_start = slot_starts.const_data_ptr<int64_t>();
  const int64_t* q_start = query_starts.const_data_ptr<int64_t>();
  require_starts(kv_start, segments, slots.numel(), "slot_starts");
  require_starts(q_start, segments, q.size(0), "query_starts");
  for (int64_t s = 0; s < segments; ++s)
    require(q_start[s + 1] - q_start[s] <= kv_start[s + 1] - kv_start[s],
            "segment " + std::to_string(s) + " has more queries than keys");
  const auto [least, most] = std::minmax_element(slot, slot + slots.numel());
  require(slots.numel() == 0 || (*least >= 0 && *most < k_cache.size(0)),
          "slots must be in [0, " + std::to_string(k_cache.size(0)) + ")");

  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const int64_t group = q.size(1) / kv_heads;
  const int64_t element = dtype == ScalarType::BFloat16 ? 2 : 4;
  const auto at = [element](const void* base, int64_t offset) {
    return static_cast<char*>(const_cast<void*>(base)) + offset * element;
  };
  const Kernels& kernel = kernels();
  const std::vector<Tile> tiles = make_tiles(kv_start, q_start, segments, kv_heads, group);
  const void *q_data = q.data_ptr(), *k_data = k_cache.data_ptr(), *v_data = v_cache.data_ptr();
  void* out_data = out.data_ptr();
  const int64_t dim = q.size(2);
  const int64_t q_stride = q.stride(0), q_head = q.stride(1), out_stride = out.stride(0), out_head = out.stride(1);
  const int64_t k_stride = k_cache.stride(0), k_head = k_cache.stride(1);
  const int64_t v_stride = v_cache.stride(0), v_head = v_cache.stride(1);

#pragma omp parallel for schedule(dynamic, 1) num_threads(torch::stable::get_num_threads()) if (tiles.size() > 1)
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& tile = tiles[i];
    const int64_t query = q_start[tile.segment] + tile.first_query, head = tile.kv_head * group;
    const int64_t queries = q_start[tile.segment + 1] - q_start[tile.segment];
    const int64_t keys = kv_start[tile.segment + 1] - kv_start[tile.segment];
    kernel.attention({
        .q = at(q_data, query * q_stride + head * q_head),
        .k = at(k_data, tile.kv_head * k_head),
        .v = at(v_data, tile.kv_head * v_head),
        .out = at(out_data, query * out_stride + head * out_head),
        .slots = slot + kv_start[tile.segment],
        .queries = tile.queries,
        .group = group,
        .dim = dim,
        .first_visible = keys - queries + tile.first_query + 1,
        .q_stride = q_stride,
        .q_head_stride = q_head,
        .k_stride = k_stride,
        .v_stride = v_stride,
        .out_stride = out_stride,
        .out_head_stride = out_head,
        .scale = static_cast<float>(scale),
        .bf16 = dtype == ScalarType::BFloat16,
        .scratch = thread_scratch(kernel.attention_scratch(tile.queries * group, dim)),
    });
  }
  return out;
}

}  // namespace negotiator
