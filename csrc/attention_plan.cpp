#include "attention_plan.h"

#include <algorithm>

namespace negotiator {
namespace {

constexpr int64_t kTileRows = 96;  // queries x heads of a group: enough to reuse each key, small enough for the cache

void require_starts(const int64_t* starts, int64_t segments, int64_t total, const char* name) {
  require(starts[0] == 0 && starts[segments] == total && std::is_sorted(starts, starts + segments + 1),
          std::string(name) + " must rise from 0 to " + std::to_string(total));
}

}  // namespace

Segments segments_of(const int64_t* slots, const Tensor& slot_starts, const Tensor& query_starts, int64_t slot_count,
                     int64_t query_count) {
  require(slot_starts.dim() == 1 && slot_starts.size(0) > 0, "slot_starts must be [segments + 1]");
  const int64_t count = slot_starts.size(0) - 1;
  require_vector(slot_starts, "slot_starts", ScalarType::Long, count + 1);
  require_vector(query_starts, "query_starts", ScalarType::Long, count + 1);
  const Segments segments{slots, slot_starts.const_data_ptr<int64_t>(), query_starts.const_data_ptr<int64_t>(), count};
  require_starts(segments.slot_starts, count, slot_count, "slot_starts");
  require_starts(segments.query_starts, count, query_count, "query_starts");
  for (int64_t s = 0; s < count; ++s)
    require(segments.query_starts[s + 1] - segments.query_starts[s] <=
                segments.slot_starts[s + 1] - segments.slot_starts[s],
            "segment " + std::to_string(s) + " has more queries than keys");
  return segments;
}

float* thread_scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  constexpr size_t alignment = 64 / sizeof(float);
  if (memory.size() < floats + alignment) memory.resize(floats + alignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

AttentionPlan::AttentionPlan(const Segments& segments, int64_t heads, int64_t kv_heads)
    : kv_heads_(kv_heads),
      most_queries_(std::max<int64_t>(1, kTileRows / (heads / kv_heads))),
      queries_(segments.query_starts[segments.count]) {
  std::vector<int64_t> all;
  for (int64_t s = 0; s < segments.count; ++s)
    if (segments.query_starts[s + 1] > segments.query_starts[s]) all.push_back(s);
  cover(segments, std::move(all), 0, 0);
  // The costly ones first, so that no thread is left alone with one at the end.
  for (std::vector<Tile>& wave : tiles_)
    std::stable_sort(wave.begin(), wave.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
}

// Pieces for the keys from `from` on of sequences whose earlier slots are equal.
void AttentionPlan::cover(const Segments& segments, std::vector<int64_t> members, int64_t from, size_t wave) {
  const auto slots = [&](int64_t s) { return segments.slots + segments.slot_starts[s]; };
  const auto queries = [&](int64_t s) { return segments.query_starts[s + 1] - segments.query_starts[s]; };
  const auto earlier = [&](int64_t s) {  // keys that all its queries see
    return segments.slot_starts[s + 1] - segments.slot_starts[s] - queries(s);
  };
  const auto tokens = [&](int64_t s, std::vector<int32_t>& to) {
    for (int64_t t = segments.query_starts[s]; t < segments.query_starts[s + 1]; ++t) to.push_back(static_cast<int32_t>(t));
  };
  if (members.empty()) return;
  if (members.size() == 1) {
    const int64_t s = members[0];
    std::vector<int32_t> own;
    tokens(s, own);
    return add_pieces(slots(s) + from, earlier(s) + 1 - from, own, 1, wave);
  }

  int64_t common = earlier(members[0]);
  for (const int64_t s : members) {
    common = std::min(common, earlier(s));
    common = std::mismatch(slots(members[0]) + from, slots(members[0]) + std::max(common, from), slots(s) + from).first -
             slots(members[0]);
  }
  if (const int64_t whole = common / kKeyBlock * kKeyBlock; whole > from) {
    std::vector<int32_t> together;
    for (const int64_t s : members) tokens(s, together);
    add_pieces(slots(members[0]) + from, whole - from, together, 0, wave++);
    from = whole;
  }
  // Those that go on with the same slot stay together; the new tokens of a sequence are its own.
  const auto branch = [&](int64_t s) { return earlier(s) > common ? slots(s)[common] : -1 - s; };
  std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return branch(a) < branch(b); });
  for (size_t first = 0; first < members.size();) {
    size_t last = first + 1;
    while (last < members.size() && branch(members[last]) == branch(members[first])) ++last;
    cover(segments, {members.begin() + first, members.begin() + last}, from, wave);
    first = last;
  }
}

void AttentionPlan::add_pieces(const int64_t* slots, int64_t keys, const std::vector<int32_t>& tokens, int64_t step,
                               size_t wave) {
  if (tiles_.size() <= wave) tiles_.resize(wave + 1);
  const int64_t count = static_cast<int64_t>(tokens.size());
  for (int64_t first = 0; first < count; first += most_queries_) {
    const int64_t n = std::min(most_queries_, count - first), piece = static_cast<int64_t>(pieces_.size());
    pieces_.push_back({slots, keys + first * step, static_cast<int64_t>(tokens_.size()), n, step});
    tokens_.insert(tokens_.end(), tokens.begin() + first, tokens.begin() + first + n);
    for (int64_t head = 0; head < kv_heads_; ++head)
      tiles_[wave].push_back({piece, head, n * (pieces_.back().keys + (n - 1) * step)});
  }
}

void AttentionPlan::run(int64_t wave, int64_t index, const AttentionData& data, float* states) const {
  const Kernels& kernel = kernels();
  const Tile& tile = tiles_[wave][index];
  const Piece& piece = pieces_[tile.piece];
  const int64_t group = data.heads / data.kv_heads, head = tile.kv_head * group;
  const auto at = [](const void* base, int64_t offset, bool bf16) {
    return static_cast<char*>(const_cast<void*>(base)) + offset * (bf16 ? 2 : 4);
  };
  kernel.attention({
      .q = at(data.q, head * data.q_head_stride, data.q_bf16),
      .tokens = tokens_.data() + piece.first,
      .k = at(data.k, tile.kv_head * data.k_head_stride, data.kv_bf16),
      .v = at(data.v, tile.kv_head * data.v_head_stride, data.kv_bf16),
      .out = at(data.out, head * data.out_head_stride, data.q_bf16),
      .states = states + head * (data.dim + 2),
      .from_state = wave > 0,  // a query takes part in every wave up to its last
      .to_state = piece.step == 0,
      .slots = piece.slots,
      .queries = piece.queries,
      .group = group,
      .dim = data.dim,
      .first_visible = piece.keys,
      .step = piece.step,
      .q_stride = data.q_stride,
      .q_head_stride = data.q_head_stride,
      .k_stride = data.k_stride,
      .v_stride = data.v_stride,
      .out_stride = data.out_stride,
      .out_head_stride = data.out_head_stride,
      .state_stride = data.heads * (data.dim + 2),
      .scale = data.scale,
      .q_bf16 = data.q_bf16,
      .kv_bf16 = data.kv_bf16,
      .scratch = thread_scratch(kernel.attention_scratch(piece.queries * group, data.dim)),
  });
}

}  // namespace negotiator
