// Splits a matrix product into blocks and runs them on all threads.

#include <algorithm>

#include "kernels.h"
#include "operators.h"

namespace negotiator {
namespace {

constexpr int64_t kRows = 48;             // of a block of the result: with its columns a part of the second-level cache
constexpr int64_t kColumns = 576;         // likewise
constexpr int64_t kRightWords = 1 << 20;  // of the right operand, repacked at once: a part of the last-level cache

}  // namespace

void add_product(const Tensor& total, const Tensor& left, const Tensor& right) {
  require(total.dim() == 2 && left.dim() == 2 && right.dim() == 2, "total, left and right must be matrices");
  const int64_t rows = left.size(0), depth = left.size(1), columns = right.size(1);
  require(right.size(0) == depth && total.size(0) == rows && total.size(1) == columns,
          "left must be [rows, depth], right [depth, columns], total [rows, columns]");
  for (const auto& [x, name] : {std::pair{&left, "left"}, {&right, "right"}})
    require(x->scalar_type() == ScalarType::Float || x->scalar_type() == ScalarType::BFloat16,
            std::string(name) + " must be float32 or bfloat16");
  require(total.scalar_type() == ScalarType::Float, "total must be float32");
  require(total.is_cpu() && left.is_cpu() && right.is_cpu(), "total, left and right must be on the CPU");
  require(total.numel() == 0 || total.stride(1) == 1, "total must have a contiguous last dimension");
  require(right.numel() == 0 || right.stride(1) == 1, "right must have a contiguous last dimension");

  const Kernels& kernel = kernels();
  const bool left_bf16 = left.scalar_type() == ScalarType::BFloat16;
  const bool right_bf16 = right.scalar_type() == ScalarType::BFloat16;
  const int64_t width = std::min(columns, kColumns / kernel.panel_columns * kernel.panel_columns);
  const int64_t deep = std::max<int64_t>(256, kRightWords / std::max<int64_t>(width, 1) / 256 * 256);
  const auto* left_data = static_cast<const char*>(left.data_ptr());
  const auto* right_data = static_cast<const char*>(right.data_ptr());
  float* out = total.mutable_data_ptr<float>();
  const int64_t row_stride = left.stride(0), depth_stride = left.stride(1);
  const int64_t right_stride = right.stride(0), out_stride = total.stride(0);
  AlignedWords packed(kernel.right_words(std::min(deep, depth), width));

#pragma omp parallel num_threads(torch::stable::get_num_threads())
  {
    AlignedWords scratch(kProductScratch);
    for (int64_t j = 0; j < columns; j += width) {
      for (int64_t k = 0; k < depth; k += deep) {
        const PackedRight part{
            .from = right_data + (k * right_stride + j) * (right_bf16 ? 2 : 4),
            .stride = right_stride,
            .depth = std::min(deep, depth - k),
            .columns = std::min(width, columns - j),
            .bf16 = right_bf16,
            .left_bf16 = left_bf16,
            .packed = packed.data(),
        };
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < (part.columns + kernel.panel_columns - 1) / kernel.panel_columns; ++panel)
          kernel.pack_panel(part, panel);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < rows; i += kRows)
          kernel.product({
              .left = left_data + (i * row_stride + k * depth_stride) * (left_bf16 ? 2 : 4),
              .row_stride = row_stride,
              .depth_stride = depth_stride,
              .rows = std::min(kRows, rows - i),
              .right = part,
              .out = out + i * out_stride + j,
              .out_stride = out_stride,
              .scratch = scratch.data(),
          });
      }
    }
  }
}

}  // namespace negotiator
