// y = x weight^T for a weight that is used many times: repacked once, so that a product of few rows reads it in one stream.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {

Tensor pack_linear(const Tensor& weight, const std::optional<Tensor>& second) {
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  require(bf16 || weight.scalar_type() == ScalarType::Float, "weight must be float32 or bfloat16");
  std::vector<Tensor> weights{weight};
  if (second) weights.push_back(*second);
  for (const Tensor& w : weights)
    require(w.is_cpu() && w.dim() == 2 && w.scalar_type() == weight.scalar_type() && w.size(0) == weight.size(0) &&
                w.size(1) == weight.size(1) && (w.numel() == 0 || w.stride(1) == 1),
            "weights must be [columns, depth] on the CPU with a contiguous last dimension, of one size and dtype");
  const Kernels& kernel = kernels();
  const int64_t columns = weight.size(0), depth = weight.size(1), panel = kernel.panel_columns;
  require(!bf16 || depth % 2 == 0, "a bfloat16 weight must have an even depth");
  const int64_t panels = (columns + panel - 1) / panel, count = static_cast<int64_t>(weights.size());
  Tensor packed = torch::stable::new_empty(weight, {panels * count, depth, panel});
  ask_for_large_pages(packed);
  auto* to = static_cast<uint32_t*>(packed.mutable_data_ptr());
  const int64_t bytes = weight.element_size(), words = kernel.linear_words(depth, bf16);
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t i = 0; i < panels * count; ++i) {
    const Tensor& from = weights[i % count];
    const int64_t first = i / count * panel;
    kernel.pack_linear(static_cast<const char*>(from.const_data_ptr()) + first * from.stride(0) * bytes, from.stride(0),
                       std::min(panel, columns - first), depth, bf16, to + i * words);
  }
  return packed;
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t columns) {
  const Kernels& kernel = kernels();
  const int64_t panel = kernel.panel_columns;
  require(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float && (x.numel() == 0 || x.stride(1) == 1),
          "x must be [rows, depth] float32 on the CPU with a contiguous last dimension");
  const int64_t rows = x.size(0), depth = x.size(1);
  require(packed.is_cpu() && packed.dim() == 3 && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
              packed.size(1) == depth && packed.size(2) == panel && packed.size(0) == (columns + panel - 1) / panel,
          "packed must be what pack_linear made of a [columns, depth] float32 weight");
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  if (rows == 0) return out;
  AlignedWords left(kernel.packed_words(rows, depth, false));
  kernel.pack_rows({x.data_ptr(), x.stride(0), rows, depth, false, left.data()});
  const auto* right = static_cast<const uint32_t*>(packed.const_data_ptr());
  float* to = out.mutable_data_ptr<float>();
  const int64_t panels = packed.size(0);
  constexpr int64_t kChunk = 4;
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads()) if (panels > kChunk)
  for (int64_t i = 0; i < panels; i += kChunk)
    kernel.linear({left.data(), rows, depth, right, false, i, std::min(i + kChunk, panels), columns, to, columns, false});
  return out;
}

}  // namespace negotiator
