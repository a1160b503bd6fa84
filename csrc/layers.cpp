// What stands between the matrix products of a layer in training, all fp32. Rows are shared out among the threads in blocks
// whose size depends on nothing but the tensors', so results do not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {
namespace {

constexpr int64_t kBlockRows = 32;         // rows whose share of a weight's gradient is summed up in fp32
constexpr int64_t kBlockNumbers = 1 << 14;

void require_floats(const Tensor& x, const char* name) {
  require(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
          std::string(name) + " must be contiguous float32 on the CPU");
}

void require_like(const Tensor& x, const char* name, const Tensor& other) {
  require_floats(x, name);
  bool same = x.dim() == other.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == other.size(i);
  require(same, std::string(name) + " does not have the size of its partner");
}

// Calls work(first, n) for parts of [0, count) of at most `size`.
template <typename Work>
void in_blocks(int64_t count, int64_t size, Work work) {
#pragma omp parallel for schedule(static) num_threads(torch::stable::get_num_threads()) if (count > size)
  for (int64_t first = 0; first < count; first += size) work(first, std::min(size, count - first));
}

int64_t rows_of(const Tensor& x, const Tensor& weight) {
  require_floats(x, "x");
  const int64_t width = weight.numel();
  require_vector(weight, "weight", ScalarType::Float, width);
  require(width > 0 && x.dim() > 0 && x.size(x.dim() - 1) == width, "x must have rows as long as weight");
  return x.numel() / width;
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  const int64_t rows = rows_of(x, weight), width = weight.numel();
  Tensor out = torch::stable::empty_like(x), factors = torch::stable::new_empty(x, {rows});
  const float *from = x.const_data_ptr<float>(), *scale = weight.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>(), *factor = factors.mutable_data_ptr<float>();
  in_blocks(rows, kBlockRows, [&](int64_t first, int64_t n) {
    kernels().norm_rows({from + first * width, scale, n, width, static_cast<float>(epsilon), to + first * width,
                         factor + first});
  });
  return {out, factors};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                             const Tensor& factors) {
  const int64_t rows = rows_of(x, weight), width = weight.numel();
  require_like(dout, "dout", x);
  require_vector(factors, "factors", ScalarType::Float, rows);
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  const float *d = dout.const_data_ptr<float>(), *from = x.const_data_ptr<float>();
  const float *scale = weight.const_data_ptr<float>(), *factor = factors.const_data_ptr<float>();
  float* to = dx.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> parts(blocks * width);
  in_blocks(rows, kBlockRows, [&](int64_t first, int64_t n) {
    kernels().norm_gradient({d + first * width, from + first * width, scale, factor + first, n, width,
                             to + first * width, parts.data() + first / kBlockRows * width});
  });
  std::vector<double> sums(width);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < width; ++i) sums[i] += parts[block * width + i];
  std::copy(sums.begin(), sums.end(), dweight.mutable_data_ptr<float>());
  return {dx, dweight};
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  require_floats(gate, "gate");
  require_like(up, "up", gate);
  Tensor out = torch::stable::empty_like(gate);
  const float *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  in_blocks(gate.numel(), kBlockNumbers,
            [&](int64_t first, int64_t n) { kernels().gate_rows(n, g + first, u + first, to + first); });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  require_floats(gate, "gate");
  require_like(up, "up", gate);
  require_like(dout, "dout", gate);
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  const float *d = dout.const_data_ptr<float>(), *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float *to_gate = dgate.mutable_data_ptr<float>(), *to_up = dup.mutable_data_ptr<float>();
  in_blocks(gate.numel(), kBlockNumbers, [&](int64_t first, int64_t n) {
    kernels().gate_gradient(n, d + first, g + first, u + first, to_gate + first, to_up + first);
  });
  return {dgate, dup};
}

Tensor rotate_heads(const Tensor& x, const Tensor& cos, const Tensor& sin, bool backward) {
  require_floats(x, "x");
  require(x.dim() == 3 && x.size(2) % 2 == 0, "x must be [tokens, heads, dim] with an even dim");
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2);
  require_floats(cos, "cos");
  require_like(sin, "sin", cos);
  require(cos.dim() == 2 && cos.size(0) == tokens && cos.size(1) == dim, "cos and sin must be [tokens, dim]");
  Tensor out = torch::stable::empty_like(x);
  const float *from = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  in_blocks(tokens, kBlockRows, [&](int64_t first, int64_t n) {
    kernels().rotate_heads({from + first * heads * dim, c + first * dim, s + first * dim, n, heads, dim, backward,
                            to + first * heads * dim});
  });
  return out;
}

}  // namespace negotiator
