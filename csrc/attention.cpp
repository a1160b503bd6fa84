// Paged attention, its tiles on all threads.

#include <algorithm>

#include "attention_plan.h"
#include "kernels.h"
#include "operators.h"

namespace negotiator {
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
  require(kv_heads > 0 && q.size(1) > 0 && q.size(1) % kv_heads == 0,
          "the heads of q must be a multiple of those of k_cache");
  require_vector(slots, "slots", ScalarType::Long, slots.numel());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const Segments segments = segments_of(slot, slot_starts, query_starts, slots.numel(), q.size(0));
  const auto [least, most] = std::minmax_element(slot, slot + slots.numel());
  require(slots.numel() == 0 || (*least >= 0 && *most < k_cache.size(0)),
          "slots must be in [0, " + std::to_string(k_cache.size(0)) + ")");

  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const AttentionPlan plan(segments, q.size(1), kv_heads);
  const AttentionData data{
      .q = q.data_ptr(),
      .k = k_cache.data_ptr(),
      .v = v_cache.data_ptr(),
      .out = out.data_ptr(),
      .heads = q.size(1),
      .kv_heads = kv_heads,
      .dim = q.size(2),
      .q_stride = q.stride(0),
      .q_head_stride = q.stride(1),
      .k_stride = k_cache.stride(0),
      .k_head_stride = k_cache.stride(1),
      .v_stride = v_cache.stride(0),
      .v_head_stride = v_cache.stride(1),
      .out_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .scale = static_cast<float>(scale),
      .q_bf16 = dtype == ScalarType::BFloat16,
      .kv_bf16 = dtype == ScalarType::BFloat16,
  };
  AlignedWords memory(plan.states_size(data.heads, data.dim));
  float* states = reinterpret_cast<float*>(memory.data());
  for (int64_t wave = 0; wave < plan.waves(); ++wave) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(torch::stable::get_num_threads()) if (plan.tiles(wave) > 1)
    for (int64_t i = 0; i < plan.tiles(wave); ++i) plan.run(wave, i, data, states);
  }
  return out;
}

}  // namespace negotiator
