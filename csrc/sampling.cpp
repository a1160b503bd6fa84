// Temperature and nucleus sampling of a batch of rows, without sorting the vocabulary.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace negotiator {
namespace {

uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

double uniform(int64_t seed, int64_t position) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15;
  const uint64_t bits = mix(mix(seed + golden) + (position + 1) * golden);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

struct Token {
  float logit;
  int32_t index;
  double weight;

  bool outranks(const Token& other) const {
    return logit > other.logit || (logit == other.logit && index < other.index);
  }
};

// The token of [first, last) at which the weights, added up in order of rank, first reach `target`.
// Reorders the tokens. Like a quickselect: expected linear time.
Token last_of_nucleus(Token* first, Token* last, double target) {
  const auto outranks = [](const Token& a, const Token& b) { return a.outranks(b); };
  while (last - first > 1) {
    Token* middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, outranks);
    double upper = 0.0;
    for (const Token* t = first; t < middle; ++t) upper += t->weight;
    if (upper >= target) {
      last = middle;
    } else {
      target -= upper;
      first = middle;
    }
  }
  return *first;
}

// Index into `weights` at which their running sum first exceeds `target`; of the last positive one if none does,
// which only rounding can bring about.
template <typename Weight>
int64_t draw(int64_t n, double target, Weight weight) {
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    sum += w;
    if (sum > target) return i;
    if (w > 0.0) last = i;
  }
  return last;
}

struct Drawn {
  int64_t id;
  float logprob;
};

Drawn sample_row(const float* logits, int64_t vocabulary, float temperature, float top_p, double u) {
  if (!(temperature >= 0.0f && top_p > 0.0f && top_p <= 1.0f)) return {0, NAN};
  thread_local std::vector<double> weights;
  thread_local std::vector<int32_t> nucleus;  // indices, ascending
  thread_local std::vector<Token> tokens;     // the same before the nucleus is cut, in any order
  weights.resize(vocabulary);
  const float top = kernels().maximum(logits, vocabulary);
  const double factor = temperature == 0.0f ? 1.0 : 1.0 / static_cast<double>(temperature);
  const double total = kernels().exponentials(logits, vocabulary, top, factor, weights.data());
  if (!(total > 0.0)) return {0, NAN};

  int64_t id;
  if (temperature == 0.0f) {
    id = std::find(logits, logits + vocabulary, top) - logits;
  } else if (top_p == 1.0f) {
    id = draw(vocabulary, u * total, [&](int64_t i) { return weights[i]; });
  } else {
    // All tokens lighter than this together weigh at most half of what the nucleus leaves out: none is in it.
    const double lightest = 0.5 * (1.0 - static_cast<double>(top_p)) * total / static_cast<double>(vocabulary);
    nucleus.resize(vocabulary);
    int64_t n = 0;
    for (int64_t i = 0; i < vocabulary; ++i) {  // without a branch: nothing here is predictable
      nucleus[n] = static_cast<int32_t>(i);
      n += weights[i] >= lightest;
    }
    tokens.clear();
    for (int64_t i = 0; i < n; ++i) tokens.push_back({logits[nucleus[i]], nucleus[i], weights[nucleus[i]]});
    const Token last = last_of_nucleus(tokens.data(), tokens.data() + n, static_cast<double>(top_p) * total);
    double mass = 0.0;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Token token{logits[nucleus[i]], nucleus[i], weights[nucleus[i]]};
      if (last.outranks(token)) continue;
      mass += token.weight;
      nucleus[kept++] = token.index;
    }
    id = nucleus[draw(kept, u * mass, [&](int64_t i) { return weights[nucleus[i]]; })];
  }
  return {id, static_cast<float>((static_cast<double>(logits[id]) - top) * factor - std::log(total))};
}

}  // namespace

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_p,
                                  const Tensor& seeds, const Tensor& positions) {
  require(logits.is_cpu() && logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && logits.size(1) > 0 &&
              logits.size(1) <= std::numeric_limits<int32_t>::max(),
          "logits must be [rows, vocabulary] float32 on the CPU");
  require(logits.stride(1) == 1, "logits must have a contiguous last dimension");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  require_vector(temperature, "temperature", ScalarType::Float, rows);
  require_vector(top_p, "top_p", ScalarType::Float, rows);
  require_vector(seeds, "seeds", ScalarType::Long, rows);
  require_vector(positions, "positions", ScalarType::Long, rows);

  Tensor ids = torch::stable::new_empty(seeds, {rows});
  Tensor logprobs = torch::stable::new_empty(temperature, {rows});
  const float* x = logits.const_data_ptr<float>();
  const float *temperatures = temperature.const_data_ptr<float>(), *top_ps = top_p.const_data_ptr<float>();
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  float* logprob = logprobs.mutable_data_ptr<float>();

#pragma omp parallel for schedule(dynamic, 1) num_threads(torch::stable::get_num_threads()) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const Drawn drawn =
        sample_row(x + row * stride, vocabulary, temperatures[row], top_ps[row], uniform(seed[row], position[row]));
    id[row] = drawn.id;
    logprob[row] = drawn.logprob;
  }
  return {ids, logprobs};
}

}  // namespace negotiator
