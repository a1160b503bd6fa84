// y = x weight^T for a weight that is used many times: repacked once, so that a product of few rows reads it in one stream.

#include <algorithm>

#include "kernels.h"
#include "operators.h"

namespace negotiator {

Tensor pack_linear(const Tensor& weight) {
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  require(weight.is_cpu() && weight.dim() == 2 && (bf16 || weight.scalar_type() == ScalarType::Float),
          "weight must be [columns, depth] float32 or bfloat16 on the CPU");
  require(weight.numel() == 0 || weight.stride(1) == 1, "weight must have a contiguous last dimension");
  const Kernels& kernel = kernels();
  const int64_t columns = weight.size(0), depth = weight.size(1), panel = kernel.panel_columns;
  require(!bf16 || depth % 2 == 0, "a bfloat16 weight must have an even depth");
  const int64_t panels = (columns + panel - 1) / panel;
  Tensor packed = torch::stable::new_empty(weight, {panels, depth, panel});
  ask_for_large_pages(packed);
  const auto* from = static_cast<const char*>(weight.const_data_ptr());
  auto* to = static_cast<uint32_t*>(packed.mutable_data_ptr());
  const int64_t stride = weight.stride(0), bytes = weight.element_size(), words = kernel.linear_words(depth, bf16);
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads())
  for (int64_t i = 0; i < panels; ++i)
    kernel.pack_linear(from + i * panel * stride * bytes, stride, std::min(panel, columns - i * panel), depth, bf16,
                       to + i * words);
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
