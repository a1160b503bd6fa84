#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace negotiator {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arguments and meaning: see attention.py, sampling.py, exponentials.py and layers.py of negotiator_kernels, whose names
// these are.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                       const Tensor& slot_starts, const Tensor& query_starts, double scale);
std::tuple<Tensor, Tensor> packed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments,
                                            double scale);
std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             const Tensor& segments, double scale);
std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_p,
                                  const Tensor& seeds, const Tensor& positions);

std::tuple<Tensor, Tensor> exponentials(const Tensor& hidden, const Tensor& weight, const Tensor& anchors,
                                        double temperature, const std::optional<Tensor>& out);
Tensor pack_linear(const Tensor& weight, const std::optional<Tensor>& second);
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t columns);
Tensor decoder(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
               const Tensor& new_slots, const Tensor& slots, const Tensor& slot_starts, const Tensor& query_starts,
               const Tensor& rows, std::vector<Tensor> weights, const Tensor& final_norm, const Tensor& head,
               int64_t heads, int64_t gated_width, int64_t vocabulary, double epsilon, double scale);
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double epsilon);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                             const Tensor& factors);
Tensor swiglu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up);
Tensor rotate_heads(const Tensor& x, const Tensor& cos, const Tensor& sin, bool backward);
void ask_for_large_pages(const Tensor& x);
void add_product(const Tensor& total, const Tensor& left, const Tensor& right);

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

inline void require_vector(const Tensor& x, const char* name, ScalarType dtype, int64_t size) {
  require(x.is_cpu() && x.dim() == 1 && x.scalar_type() == dtype && x.size(0) == size && x.is_contiguous(),
          std::string(name) + " must be a contiguous CPU vector of " + std::to_string(size) + " " +
              (dtype == ScalarType::Long ? "int64" : "float32"));
}

// Uninitialised memory that starts on a cache line.
class AlignedWords {
 public:
  explicit AlignedWords(int64_t words) : data_(static_cast<uint32_t*>(operator new(words * 4, kLine))) {}
  AlignedWords(const AlignedWords&) = delete;
  AlignedWords& operator=(const AlignedWords&) = delete;
  ~AlignedWords() { operator delete(data_, kLine); }
  uint32_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  uint32_t* data_;
};

}  // namespace negotiator
