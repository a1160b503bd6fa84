// Splits the exponentials of the logits into blocks of the vocabulary and runs them on all threads.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {

std::tuple<Tensor, Tensor> exponentials(const Tensor& hidden, const Tensor& weight, const Tensor& anchors,
                                        double temperature, const std::optional<Tensor>& out) {
  const ScalarType dtype = hidden.scalar_type();
  require(hidden.dim() == 2, "hidden must be [rows, depth]");
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "hidden must be float32 or bfloat16");
  const int64_t rows = hidden.size(0), depth = hidden.size(1), vocabulary = weight.size(0);
  require(weight.dim() == 2 && weight.size(1) == depth, "weight must be [vocabulary, depth], depth as in hidden");
  require(!out || (out->dim() == 2 && out->size(0) == rows && out->size(1) == vocabulary),
          "out must be [rows, vocabulary]");
  require(weight.scalar_type() == dtype, "weight must have the dtype of hidden");
  const bool out_bf16 = out && out->scalar_type() == ScalarType::BFloat16;
  require(!out || out_bf16 || out->scalar_type() == ScalarType::Float, "out must be float32 or bfloat16");
  for (const auto& [x, name] : {std::pair{&hidden, "hidden"}, {&weight, "weight"}, {out ? &*out : &hidden, "out"}}) {
    require(x->is_cpu() && (x->numel() == 0 || x->stride(1) == 1),
            std::string(name) + " must be on the CPU with a contiguous last dimension");
  }
  require_vector(anchors, "anchors", ScalarType::Float, rows);

  const Kernels& kernel = kernels();
  const bool bf16 = dtype == ScalarType::BFloat16;
  const int64_t element = bf16 ? 2 : 4;
  AlignedWords packed(kernel.packed_words(rows, depth, bf16));
  const PackedRows left{hidden.data_ptr(), hidden.stride(0), rows, depth, bf16, packed.data()};
  kernel.pack_rows(left);

  // Sums of each block, to be added in order: the result does not depend on the number of threads.
  const int64_t width = kernel.block_columns(depth, bf16), blocks = (vocabulary + width - 1) / width;
  std::vector<float> sums(blocks * rows), moments(blocks * rows);
  const auto* columns = static_cast<const char*>(weight.data_ptr());
  auto* values = out ? static_cast<char*>(out->data_ptr()) : nullptr;
  const float* anchor = anchors.const_data_ptr<float>();
  const int64_t weight_stride = weight.stride(0), out_stride = out ? out->stride(0) : 0;

#pragma omp parallel num_threads(torch::stable::get_num_threads()) if (blocks > 1)
  {
    AlignedWords scratch(kernel.block_words(width, depth, bf16));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * width;
      kernel.exponential_block({
          .left = left,
          .weight = columns + first * weight_stride * element,
          .weight_stride = weight_stride,
          .columns = std::min(width, vocabulary - first),
          .inverse_temperature = static_cast<float>(1.0 / temperature),
          .anchors = anchor,
          .out = values == nullptr ? nullptr : values + first * (out_bf16 ? 2 : 4),
          .out_stride = out_stride,
          .out_bf16 = out_bf16,
          .sums = sums.data() + i * rows,
          .moments = moments.data() + i * rows,
          .scratch = scratch.data(),
      });
    }
  }

  const Tensor sum = torch::stable::new_empty(anchors, {rows}), moment = torch::stable::new_empty(anchors, {rows});
  for (const auto& [parts, total] : {std::pair{&sums, &sum}, {&moments, &moment}}) {
    float* to = total->mutable_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      double x = 0.0;
      for (int64_t i = 0; i < blocks; ++i) x += (*parts)[i * rows + row];
      to[row] = static_cast<float>(x);
    }
  }
  return {sum, moment};
}

}  // namespace negotiator
