#include "attention_plan.h"

#include <algorithm>

namespace negotiator {
namespace {

constexpr int64_t kTileRows = 96;    // queries x heads of a group: enough to reuse each key, small enough for the cache
constexpr int64_t kLeastShared = 16;  // keys that are worth a piece of their own, whose result has to be merged

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
    : most_queries_(std::max<int64_t>(1, kTileRows / (heads / kv_heads))) {
  std::vector<int64_t> all;
  for (int64_t s = 0; s < segments.count; ++s)
    if (segments.query_starts[s + 1] > segments.query_starts[s]) all.push_back(s);
  cover(segments, std::move(all), 0);

  const int64_t queries = segments.query_starts[segments.count];
  std::vector<int32_t> seen(queries, 0);
  for (const int32_t token : tokens_) ++seen[token];
  part_starts_.assign(queries + 1, 0);
  for (int64_t t = 0; t < queries; ++t) part_starts_[t + 1] = part_starts_[t] + (seen[t] > 1 ? seen[t] : 0);
  std::vector<int64_t> next(part_starts_.begin(), part_starts_.end() - 1);
  part_of_.resize(tokens_.size());
  for (size_t i = 0; i < tokens_.size(); ++i) part_of_[i] = static_cast<int32_t>(next[tokens_[i]]++);

  for (int64_t p = 0; p < static_cast<int64_t>(pieces_.size()); ++p)
    for (int64_t head = 0; head < kv_heads; ++head) {
      const Piece& piece = pieces_[p];
      tiles_.push_back({p, head, piece.queries * (piece.keys + (piece.queries - 1) * piece.step)});
    }
  // The costly ones first, so that no thread is left alone with one at the end.
  std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
}

// Pieces for the keys from `from` on of sequences whose earlier slots are equal.
void AttentionPlan::cover(const Segments& segments, std::vector<int64_t> members, int64_t from) {
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
    return add_pieces(slots(s) + from, earlier(s) + 1 - from, own, 1);
  }

  int64_t common = earlier(members[0]);
  for (const int64_t s : members) {
    common = std::min(common, earlier(s));
    common = std::mismatch(slots(members[0]) + from, slots(members[0]) + std::max(common, from), slots(s) + from).first -
             slots(members[0]);
  }
  if (common - from >= kLeastShared) {
    std::vector<int32_t> together;
    for (const int64_t s : members) tokens(s, together);
    add_pieces(slots(members[0]) + from, common - from, together, 0);
    from = common;
  }
  // Those that go on with the same slot stay together; the new tokens of a sequence are its own.
  const auto branch = [&](int64_t s) { return earlier(s) > common ? slots(s)[common] : -1 - s; };
  std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return branch(a) < branch(b); });
  for (size_t first = 0; first < members.size();) {
    size_t last = first + 1;
    while (last < members.size() && branch(members[last]) == branch(members[first])) ++last;
    cover(segments, {members.begin() + first, members.begin() + last}, from);
    first = last;
  }
}

void AttentionPlan::add_pieces(const int64_t* slots, int64_t keys, const std::vector<int32_t>& tokens, int64_t step) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  for (int64_t first = 0; first < count; first += most_queries_) {
    const int64_t n = std::min(most_queries_, count - first);
    pieces_.push_back({slots, keys + first * step, static_cast<int64_t>(tokens_.size()), n, step});
    tokens_.insert(tokens_.end(), tokens.begin() + first, tokens.begin() + first + n);
  }
}

void AttentionPlan::run(int64_t index, const AttentionData& data, float* parts) const {
  const Kernels& kernel = kernels();
  const Piece& piece = pieces_[tiles_[index].piece];
  const int64_t kv_head = tiles_[index].kv_head, group = data.heads / data.kv_heads, head = kv_head * group;
  const auto at = [](const void* base, int64_t offset, bool bf16) {
    return static_cast<char*>(const_cast<void*>(base)) + offset * (bf16 ? 2 : 4);
  };
  const int32_t token = tokens_[piece.first];
  const bool in_parts = part_starts_[token + 1] > part_starts_[token];  // so are then all queries of the piece
  kernel.attention({
      .q = at(data.q, head * data.q_head_stride, data.q_bf16),
      .tokens = tokens_.data() + piece.first,
      .k = at(data.k, kv_head * data.k_head_stride, data.kv_bf16),
      .v = at(data.v, kv_head * data.v_head_stride, data.kv_bf16),
      .out = at(data.out, head * data.out_head_stride, data.q_bf16),
      .parts = in_parts ? parts + head * (data.dim + 2) : nullptr,
      .part_of = in_parts ? part_of_.data() + piece.first : nullptr,
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
      .part_stride = data.heads * (data.dim + 2),
      .scale = data.scale,
      .q_bf16 = data.q_bf16,
      .kv_bf16 = data.kv_bf16,
      .scratch = thread_scratch(kernel.attention_scratch(piece.queries * group, data.dim)),
  });
}

void AttentionPlan::merge(int64_t query, const AttentionData& data, const float* parts) const {
  const int64_t first = part_starts_[query], count = part_starts_[query + 1] - first;
  if (count == 0) return;
  const int64_t part_stride = data.heads * (data.dim + 2), element = data.q_bf16 ? 2 : 4;
  for (int64_t head = 0; head < data.heads; ++head)
    kernels().attention_merge({
        .parts = parts + first * part_stride + head * (data.dim + 2),
        .count = count,
        .part_stride = part_stride,
        .dim = data.dim,
        .out = static_cast<char*>(data.out) + (query * data.out_stride + head * data.out_head_stride) * element,
        .bf16 = data.q_bf16,
        .scratch = thread_scratch(data.dim),
    });
}

}  // namespace negotiator
