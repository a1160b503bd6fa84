// The operators as torch sees them: each checks its arguments at the door, then hands raw pointers to the kernels.
// Only torch's stable ABI is used, so that one build serves later torch versions too.

#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels.h"
#include "operators.h"

namespace negotiator {

const Kernels& kernels() {
#if defined(NEGOTIATOR_X86)
  static const Kernels& best = []() -> const Kernels& {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx2) return kernels_baseline;
    if (!avx512) return kernels_avx2;
    return __builtin_cpu_supports("avx512bf16") ? kernels_avx512bf16 : kernels_avx512;
  }();
  return best;
#else
  return kernels_baseline;
#endif
}

std::string instruction_set() { return kernels().name; }

}  // namespace negotiator

STABLE_TORCH_LIBRARY(negotiator_kernels, m) {
  m.def("instruction_set() -> str");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor slot_starts, "
      "Tensor query_starts, float scale) -> Tensor");
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor seeds, Tensor positions) -> (Tensor, Tensor)");
  m.def(
      "exponentials(Tensor hidden, Tensor weight, Tensor anchors, float temperature, Tensor(a!)? out) -> "
      "(Tensor, Tensor)");
  m.def("pack_linear(Tensor weight, Tensor? second=None) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, int columns) -> Tensor");
  m.def(
      "decoder(Tensor(a!) hidden, Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, Tensor new_slots, "
      "Tensor slots, Tensor slot_starts, Tensor query_starts, Tensor rows, Tensor[] weights, Tensor final_norm, "
      "Tensor head, int heads, int gated_width, int vocabulary, float epsilon, float scale) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor factors) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("rotate_heads(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor");
  m.def("ask_for_large_pages(Tensor x) -> ()");
  m.def("add_product(Tensor(a!) total, Tensor left, Tensor right) -> ()");
  m.def(
      "tile_exponentials(Tensor logits, Tensor anchors, float temperature, Tensor(a!)? values, Tensor(b!) sums, "
      "Tensor(c!) moments, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(negotiator_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&negotiator::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(negotiator_kernels, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&negotiator::paged_attention));
  m.impl("packed_attention", TORCH_BOX(&negotiator::packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&negotiator::packed_attention_backward));
  m.impl("sample", TORCH_BOX(&negotiator::sample));
  m.impl("exponentials", TORCH_BOX(&negotiator::exponentials));
  m.impl("pack_linear", TORCH_BOX(&negotiator::pack_linear));
  m.impl("packed_linear", TORCH_BOX(&negotiator::packed_linear));
  m.impl("decoder", TORCH_BOX(&negotiator::decoder));
  m.impl("rms_norm", TORCH_BOX(&negotiator::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&negotiator::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&negotiator::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&negotiator::swiglu_backward));
  m.impl("rotate_heads", TORCH_BOX(&negotiator::rotate_heads));
  m.impl("ask_for_large_pages", TORCH_BOX(&negotiator::ask_for_large_pages));
  m.impl("add_product", TORCH_BOX(&negotiator::add_product));
}
