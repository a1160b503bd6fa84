// All layers of a Llama-like decoder in one call: what torch would do in fifteen small operations a layer.
//
// T tokens   R rows whose logits are wanted   L layers   D hidden size   Hq, Hkv heads of dimension d   F gated width
// V vocabulary

#include <algorithm>
#include <vector>

#include "attention_plan.h"
#include "kernels.h"
#include "operators.h"
#include "team.h"

namespace negotiator {
namespace {

// Tensors of a layer, in this order; those that a model lacks are empty.
enum Part { kInputNorm, kQkv, kQkvBias, kQNorm, kKNorm, kOutput, kPostNorm, kGateUp, kDown, kParts };

struct Linear {
  const uint32_t* right;
  int64_t depth, columns, panels;
  bool bf16;
};

struct Layer {
  const float *input_norm, *qkv_bias, *q_norm, *k_norm, *post_norm;
  Linear qkv, output, gate_up, down;
};

const float* vector_of(const Tensor& x, int64_t size, const char* name, bool optional = false) {
  if (optional && x.numel() == 0) return nullptr;
  require_vector(x, name, ScalarType::Float, size);
  return x.const_data_ptr<float>();
}

Linear linear_of(const Tensor& packed, int64_t columns, int64_t depth, int64_t copies, const char* name) {
  const bool bf16 = packed.scalar_type() == ScalarType::BFloat16;
  const int64_t panel = kernels().panel_columns, panels = (columns + panel - 1) / panel;
  require(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 3 &&
              (bf16 || packed.scalar_type() == ScalarType::Float) && packed.size(0) == copies * panels &&
              packed.size(1) == depth && packed.size(2) == panel,
          std::string(name) + " must be what pack_linear made of [" + std::to_string(columns) + ", " +
              std::to_string(depth) + "]");
  return {static_cast<const uint32_t*>(packed.const_data_ptr()), depth, columns, panels, bf16};
}

bool same_size(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < 4; ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void require_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  require(x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous() &&
              x.size(0) == rows && x.size(1) == columns,
          std::string(name) + " must be a contiguous float32 [" + std::to_string(rows) + ", " +
              std::to_string(columns) + "] on the CPU");
}

const int64_t* indices_of(const Tensor& x, int64_t size, int64_t below, const char* name) {
  require_vector(x, name, ScalarType::Long, size);
  const int64_t* data = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i)
    require(data[i] >= 0 && data[i] < below, std::string(name) + " must be in [0, " + std::to_string(below) + ")");
  return data;
}

// Rows ready to be multiplied with a weight of this kind.
class Packed {
 public:
  Packed(int64_t rows, int64_t depth, bool bf16)
      : rows(rows), depth(depth), bf16(bf16), words_(kernels().packed_words(rows, depth, bf16)) {}

  int64_t strips() const { return (rows + kernels().strip_rows - 1) / kernels().strip_rows; }
  uint32_t* data() { return words_.data(); }

  // Fills strip `s` from x [rows, depth], normalised if there is a weight for that.
  void fill(int64_t s, const float* x, int64_t stride, const float* norm, float epsilon) {
    const int64_t strip = kernels().strip_rows, first = s * strip, n = std::min(strip, rows - first);
    kernels().norm_strip({x + first * stride, stride, n, depth, norm, epsilon, bf16,
                          words_.data() + kernels().packed_words(first, depth, bf16)});
  }

  const int64_t rows, depth;
  const bool bf16;

 private:
  AlignedWords words_;
};

// Chunks of panels, small enough that threads finish together, large enough that few are handed out.
struct Chunks {
  explicit Chunks(int64_t panels, int threads) : panels(panels), size(std::clamp<int64_t>(panels / (8 * threads), 1, 8)) {}
  int64_t count() const { return (panels + size - 1) / size; }
  int64_t first(int64_t i) const { return i * size; }
  int64_t last(int64_t i) const { return std::min(panels, (i + 1) * size); }
  const int64_t panels, size;
};

}  // namespace

Tensor decoder(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
               const Tensor& new_slots, const Tensor& slots, const Tensor& slot_starts, const Tensor& query_starts,
               const Tensor& rows, std::vector<Tensor> weights, const Tensor& final_norm, const Tensor& head,
               int64_t heads, int64_t gated_width, int64_t vocabulary, double epsilon, double scale) {
  require(hidden.dim() == 2, "hidden must be [tokens, hidden size]");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  require_matrix(hidden, tokens, width, "hidden");
  for (const auto& [cache, name] : {std::pair{&keys, "keys"}, {&values, "values"}})
    require(cache->is_cpu() && cache->dim() == 4 && cache->is_contiguous() &&
                cache->scalar_type() == keys.scalar_type() && same_size(*cache, keys) &&
                (keys.scalar_type() == ScalarType::Float || keys.scalar_type() == ScalarType::BFloat16),
            std::string(name) + " must be contiguous [layers, slots, kv heads, dim], float32 or bfloat16, on the CPU");
  const int64_t layers = keys.size(0), pool = keys.size(1), kv_heads = keys.size(2), dim = keys.size(3);
  require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && dim % 2 == 0, "heads must be a multiple of the kv heads, dim even");
  const int64_t all_heads = heads + 2 * kv_heads;
  require_matrix(cos, tokens, dim, "cos");
  require_matrix(sin, tokens, dim, "sin");
  require(static_cast<int64_t>(weights.size()) == layers * kParts, "weights must be nine tensors a layer");

  std::vector<Layer> layer(layers);
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor* w = weights.data() + l * kParts;
    layer[l] = {vector_of(w[kInputNorm], width, "input norm"),
                vector_of(w[kQkvBias], all_heads * dim, "bias", true),
                vector_of(w[kQNorm], dim, "query norm", true),
                vector_of(w[kKNorm], dim, "key norm", true),
                vector_of(w[kPostNorm], width, "post norm"),
                linear_of(w[kQkv], all_heads * dim, width, 1, "qkv"),
                linear_of(w[kOutput], width, heads * dim, 1, "output projection"),
                linear_of(w[kGateUp], gated_width, width, 2, "gate and up projection"),
                linear_of(w[kDown], width, gated_width, 1, "down projection")};
    require(layer[l].qkv.bf16 == layer[0].qkv.bf16 && layer[l].output.bf16 == layer[0].qkv.bf16 &&
                layer[l].gate_up.bf16 == layer[0].qkv.bf16 && layer[l].down.bf16 == layer[0].qkv.bf16,
            "all layers' weights must have one dtype");
  }
  const float* last_norm = vector_of(final_norm, width, "final norm");
  const Linear logits_of = linear_of(head, vocabulary, width, 1, "head");

  const int64_t* slot = indices_of(slots, slots.numel(), pool, "slots");
  const int64_t* new_slot = indices_of(new_slots, tokens, pool, "new_slots");
  const int64_t* row = indices_of(rows, rows.numel(), tokens, "rows");
  const Segments sequences = segments_of(slot, slot_starts, query_starts, slots.numel(), tokens);

  Tensor logits = torch::stable::new_empty(hidden, {rows.numel(), vocabulary});
  if (tokens == 0) return logits;
  float* x = hidden.mutable_data_ptr<float>();
  const bool bf16 = layers > 0 && layer[0].qkv.bf16, kv_bf16 = keys.scalar_type() == ScalarType::BFloat16;
  const int64_t element = kv_bf16 ? 2 : 4, wanted = rows.numel();
  const float eps = static_cast<float>(epsilon);
  const AttentionPlan plan(sequences, heads, kv_heads);
  AlignedWords qkv_memory(tokens * all_heads * dim), attended_memory(tokens * heads * dim);
  AlignedWords states_memory(plan.states_size(heads, dim)), last_memory(wanted * width);
  float* qkv = reinterpret_cast<float*>(qkv_memory.data());
  float* attended = reinterpret_cast<float*>(attended_memory.data());
  float* states = reinterpret_cast<float*>(states_memory.data());
  float* last = reinterpret_cast<float*>(last_memory.data());
  Packed normed(tokens, width, bf16), mixed(tokens, heads * dim, bf16), gate(tokens, gated_width, bf16);
  Packed final_rows(wanted, width, logits_of.bf16);
  const int64_t cache_layer = pool * kv_heads * dim;
  const auto cache = [&](const Tensor& pool_of, int64_t l, int64_t at) {
    return static_cast<char*>(pool_of.mutable_data_ptr()) + (l * cache_layer + at * kv_heads * dim) * element;
  };
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const Kernels& kernel = kernels();

  Team team((8 + plan.waves()) * layers + 3);
#pragma omp parallel num_threads(threads)
  {
    Member member(team);
    const auto product = [&](Packed& left, const Linear& linear, float* out, int64_t stride, bool add) {
      const Chunks chunks(linear.panels, threads);
      member.for_each(chunks.count(), [&](int64_t i) {
        kernel.linear({left.data(), left.rows, left.depth, linear.right, linear.bf16, chunks.first(i), chunks.last(i),
                       linear.columns, out, stride, add});
      });
    };
    const auto pack = [&](Packed& left, const float* from, const float* norm) {
      member.for_each(left.strips(), [&](int64_t s) { left.fill(s, from, left.depth, norm, eps); });
    };
    for (int64_t l = 0; l < layers; ++l) {
      const Layer& w = layer[l];
      pack(normed, x, w.input_norm);
      product(normed, w.qkv, qkv, all_heads * dim, false);
      member.for_each(tokens, [&](int64_t t) {
        kernel.rotate({qkv + t * all_heads * dim, w.qkv_bias, w.q_norm, w.k_norm, cos.const_data_ptr<float>() + t * dim,
                       sin.const_data_ptr<float>() + t * dim, heads, kv_heads, dim, eps, cache(keys, l, new_slot[t]),
                       cache(values, l, new_slot[t]), kv_bf16});
      });
      const AttentionData data{.q = qkv,
                               .k = cache(keys, l, 0),
                               .v = cache(values, l, 0),
                               .out = attended,
                               .heads = heads,
                               .kv_heads = kv_heads,
                               .dim = dim,
                               .q_stride = all_heads * dim,
                               .q_head_stride = dim,
                               .k_stride = kv_heads * dim,
                               .k_head_stride = dim,
                               .v_stride = kv_heads * dim,
                               .v_head_stride = dim,
                               .out_stride = heads * dim,
                               .out_head_stride = dim,
                               .scale = static_cast<float>(scale),
                               .q_bf16 = false,
                               .kv_bf16 = kv_bf16};
      for (int64_t wave = 0; wave < plan.waves(); ++wave)
        member.for_each(plan.tiles(wave), [&](int64_t i) { plan.run(wave, i, data, states); });
      pack(mixed, attended, nullptr);
      product(mixed, w.output, x, width, true);
      pack(normed, x, w.post_norm);
      const Chunks chunks(w.gate_up.panels, threads);
      member.for_each(chunks.count(), [&](int64_t i) {
        kernel.gated({normed.data(), tokens, width, w.gate_up.right, bf16, chunks.first(i), chunks.last(i), gated_width,
                      nullptr, 0, false},
                     gate.data());
      });
      product(gate, w.down, x, width, true);
    }
    member.for_each(wanted, [&](int64_t r) { std::copy_n(x + row[r] * width, width, last + r * width); });
    pack(final_rows, last, last_norm);
    product(final_rows, logits_of, logits.mutable_data_ptr<float>(), vocabulary, false);
  }
  return logits;
}

}  // namespace negotiator
