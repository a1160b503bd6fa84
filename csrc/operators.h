#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <tuple>

namespace negotiator {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arguments and meaning: see negotiator_kernels/attention.py and sampling.py, whose names these are.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                       const Tensor& slot_starts, const Tensor& query_starts, double scale);
std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_p,
                                  const Tensor& seeds, const Tensor& positions);

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

inline void require_vector(const Tensor& x, const char* name, ScalarType dtype, int64_t size) {
  require(x.is_cpu() && x.dim() == 1 && x.scalar_type() == dtype && x.size(0) == size && x.is_contiguous(),
          std::string(name) + " must be a contiguous CPU vector of " + std::to_string(size) + " " +
              (dtype == ScalarType::Long ? "int64" : "float32"));
}

}  // namespace negotiator
