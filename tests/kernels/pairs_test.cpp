// All pairs of what a call may ask for, forward and backward, beside the textbook: what works alone works together, or is
// refused.

#include <functional>

#include "score_calls.hpp"

namespace cca::test { namespace {

/// Something that a caller asks for. Two of one `place` exclude each other.
struct feature {
  const char* name;
  const char* place;
  std::function<void(problem&, score_terms&)> ask;
};

/// What every entry point takes.
std::vector<feature> common_features() {
  return {{"sink tokens", "sink tokens", [](problem& p, score_terms&) { p.options.sink_tokens = 5; }},
          {"sinks per head", "sinks", [](problem&, score_terms& t) { t.sinks = sinks::per_head; }},
          {"sinks per query", "sinks", [](problem&, score_terms& t) { t.sinks = sinks::per_query; }},
          {"softcap", "softcap", [](problem& p, score_terms&) { p.options.softcap = 1.5; }},
          {"negative scale", "scale", [](problem& p, score_terms&) { p.options.softmax_scale = -0.6; }},
          {"slopes", "slopes", [](problem&, score_terms& t) { t.slopes = true; }},
          {"slopes per sequence", "slopes", [](problem&, score_terms& t) { t.slopes = true, t.shared = false; }}};
}

std::vector<feature> features_of(entry entry) {
  std::vector<feature> all = common_features();
  const auto add = [&](const char* name, const char* place, std::function<void(problem&, score_terms&)> ask) {
    all.push_back({name, place, std::move(ask)});
  };
  if (entry == entry::attention) {
    add("entropy", "core bias", [](problem& p, score_terms&) { p.options.core_bias = core_bias::entropy; });
    add("pooling scale", "pooling scale", [](problem& p, score_terms&) { p.options.pooling_scale = 2.5; });
    add("select", "pool", [](problem& p, score_terms&) { p.options.pool = pooling::select; });
    add("mean", "pool", [](problem& p, score_terms&) { p.options.pool = pooling::mean; });
    add("max", "pool", [](problem& p, score_terms&) { p.options.pool = pooling::max; });
    add("shared cores", "core heads", [](problem& p, score_terms&) { p.options.core_heads = core_heads::per_kv_head; });
    return all;
  }
  add("bias of keys", "key bias", [](problem&, score_terms& t) { t.key_bias_heads = 2; });
  add("lookahead", "lookahead", [](problem& p, score_terms&) { p.options.lookahead = 4; });
  add("prefix", "prefix", [](problem& p, score_terms&) { p.options.prefix = 12; });
  add("window", "window", [](problem& p, score_terms&) { p.options.window = 9; });
  add("first position", "first position", [](problem& p, score_terms&) { p.options.first_position = 3; });
  if (entry == entry::attend) {
    add("bias of far rows", "far bias", [](problem&, score_terms& t) { t.far_bias_heads = 4; });
    add("far heads", "far heads", [](problem& p, score_terms&) { p.far_heads = 1; });
  }
  return all;
}

/// What contradicts beside two of one place: weights are sharpened where pooling has a query, and a token or a
/// maximum by itself has none.
bool contradict(const feature& a, const feature& b) {
  const auto are = [&](std::string_view one, std::string_view other) {
    return (one == a.name && other == b.name) || (one == b.name && other == a.name);
  };
  return are("pooling scale", "select") || are("pooling scale", "mean") || are("pooling scale", "max") ||
         are("entropy", "select") || are("entropy", "max");
}

problem base_problem(entry entry, std::int64_t queries) {
  problem p{.entry = entry,
            .sizes = {.batch = 2, .heads = 4, .kv_heads = 2, .queries = queries, .keys = 40, .dim = 6, .value_dim = 5},
            .options = {}};
  if (entry == entry::attend) p.far_length = 13, p.far_heads = 4;
  if (entry == entry::attention) p.options.group_size = 3, p.options.window = 7, p.sizes.keys = queries;
  return p;
}

template <class T>
class Pairs : public testing::Test {};
TYPED_TEST_SUITE(Pairs, precisions);

/// Of few queries and of a tile.
TYPED_TEST(Pairs, AreThoseOfTheTextbookOrRefused) {
  random_engine random(1);
  for (const entry entry : {entry::attention, entry::local, entry::attend}) {
    const std::vector<feature> all = features_of(entry);
    for (const std::int64_t queries : {std::int64_t{10}, std::int64_t{40}}) {
      score_rules<TypeParam> rules;
      for (std::size_t i = 0; i < all.size(); ++i)
        for (std::size_t j = i + 1; j < all.size(); ++j) {
          if (std::string_view(all[i].place) == all[j].place) continue;
          problem p = base_problem(entry, queries);
          score_terms terms;
          all[i].ask(p, terms);
          all[j].ask(p, terms);
          score_call<TypeParam> c(p, terms, random);
          const std::string label = std::string(all[i].name) + " and " + all[j].name + ": " + label_of(p, terms);
          if (contradict(all[i], all[j]))
            EXPECT_THROW(c.forward(), std::invalid_argument) << label;
          else
            rules.add(c, label);
        }
      rules.expect();
    }
  }
}

}}  // namespace cca::test
