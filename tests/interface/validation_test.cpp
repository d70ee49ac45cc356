// What the entry points refuse, and what their messages say. A refused call has written nothing.

#include "entry_points.hpp"

namespace cca::test { namespace {

/// A call that is valid until something is changed.
struct prepared {
  problem p;
  argument_memory<float> memory;
  arguments<float> a;

  explicit prepared(entry entry)
      : prepared(example(entry,
                         {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3})) {}
  explicit prepared(const problem& valid) : p(valid), memory(p) {
    random_engine random(1);
    memory.randomize(random);
    a = memory.arguments();
  }
  // The views point into the memory.
  prepared(const prepared&) = delete;
  prepared& operator=(const prepared&) = delete;

  void call() { test::call(p, a); }
};

/// "cca: <argument>: got <got>, wants <wants>".
struct refusal {
  std::string argument, got, wants;
};

void expect_refused(prepared& call, const refusal& expected) {
  const std::string text = refusal_of([&] { call.call(); });
  EXPECT_NE(text.find(expected.argument + ": got "), std::string::npos) << text << " names not " << expected.argument;
  EXPECT_NE(text.find(": got " + expected.got), std::string::npos) << text << " says not " << expected.got;
  EXPECT_NE(text.find(", wants " + expected.wants), std::string::npos) << text << " says not " << expected.wants;
  for (const tensor<float>& result : call.memory.results)
    for_each_row(result.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < result.view().dim(); ++d)
        ASSERT_TRUE(same_bits(result.row(b, h, i)[d], canary<float>())) << text << " comes after writing";
    });
}

const std::vector<entry> with_keys{entry::dense, entry::local, entry::attention, entry::attend, entry::pool};
const std::vector<entry> with_out{entry::dense, entry::local, entry::attention, entry::attend};
const std::vector<entry> with_raw{entry::dense, entry::local, entry::attend};
const std::vector<entry> with_query_per_key{entry::attention, entry::pool};

// ----------------------------------------------------------------------------------------------------------- views

/// The names of all tensor arguments of an entry point, operands first.
std::vector<std::string> names(entry entry) {
  switch (entry) {
    case entry::merge:
      return {"out_a", "lse_a", "out_b", "lse_b", "out", "lse"};
    case entry::pool:
      return {"query", "key", "value", "core_key", "core_value"};
    case entry::attend:
      return {"query", "key", "value", "far.key", "far.value", "out", "lse"};
    default:
      return {"query", "key", "value", "out", "lse"};
  }
}

/// Calls `change(view)` with one tensor of a call after the other, in a new call each, and expects a refusal:
/// `expected(view)`, whose argument is filled in.
template <class Change, class Expected>
void for_each_tensor(bool operands_too, bool lse_too, const Change& change, const Expected& expected) {
  for (const entry entry : all_entries) {
    const std::vector<std::string> all = names(entry);
    for (std::size_t i = 0; i < all.size(); ++i) {
      prepared call(entry);
      const std::size_t operands = call.a.operands.size();
      if ((i < operands && !operands_too) || (all[i].starts_with("lse") && !lse_too)) continue;
      refusal refusal;
      const auto changed = [&](auto& view) {
        change(view);
        refusal = expected(view);
      };
      if (i < operands)
        changed(call.a.operands[i]);
      else
        changed(call.a.results[i - operands]);
      refusal.argument = all[i];
      SCOPED_TRACE(testing::Message() << entry << ", " << all[i]);
      expect_refused(call, refusal);
    }
  }
}

TEST(Validation, RefusesNegativeExtents) {
  for (std::size_t dimension = 0; dimension < 3; ++dimension)
    for_each_tensor(
        true, true, [&](auto& view) { view.extent[dimension] = -1; },
        [&](const auto& view) {
          // A log-sum-exp has no dim.
          const std::string extents = text_of(view.extent);
          return refusal{{}, "extents " + extents.substr(0, extents.rfind(',')), "none below 0"};
        });
}

TEST(Validation, RefusesADimOf0) {
  for_each_tensor(
      true, false, [](auto& view) { view.extent[3] = 0; },
      [](const auto&) {
        return refusal{{}, "dim 0", "a dim of at least 1"};
      });
}

TEST(Validation, RefusesAnInnerStrideOtherThan1) {
  for (const std::int64_t stride : {-1, 0, 2})
    for_each_tensor(
        true, false, [&](auto& view) { view.stride[3] = stride; },
        [&](const auto& view) {
          return refusal{{}, "strides " + text_of(view.stride), "an inner stride of 1"};
        });
}

TEST(Validation, RefusesNullElements) {
  for_each_tensor(
      true, true, [](auto& view) { view.data = nullptr; },
      [](const auto& view) {
        const std::string extents = text_of(view.extent);
        return refusal{{}, "a null pointer", "elements " + extents.substr(0, extents.rfind(','))};
      });
}

TEST(Validation, RefusesOffsetsThatOverflow) {
  for (const std::int64_t stride : {std::int64_t{1} << 60, -(std::int64_t{1} << 60), unlimited, -unlimited - 1})
    for_each_tensor(
        true, true, [&](auto& view) { view.stride[0] = stride; },
        [](const auto&) {
          return refusal{{}, "extents ", "offsets below 2^62 bytes"};
        });
}

/// Also where they hold no element, or the same one everywhere.
TEST(Validation, RefusesExtentsWhoseProductOverflows) {
  constexpr std::int64_t many = std::int64_t{1} << 40;
  const auto expected = [](const auto& view) {
    const std::string extents = text_of(view.extent);
    return refusal{{}, "extents " + extents.substr(0, extents.rfind(',')), "fewer than 2^62 bytes of elements"};
  };
  for (const std::int64_t length : {0, 1})
    for_each_tensor(
        true, true,
        [&](auto& view) {
          view.extent[0] = view.extent[1] = many;
          view.extent[2] = length;
          view.stride[0] = view.stride[1] = 0;
        },
        expected);
  for (const entry entry : all_entries) {
    prepared call(entry);
    const auto empty = [&](auto& view) {
      view.extent[0] = view.extent[1] = many;
      view.extent[2] = 0;
    };
    for (auto& view : call.a.operands) empty(view);
    for (auto& view : call.a.results) empty(view);
    empty(call.a.seen);
    refusal refusal = expected(call.a.operands[0]);
    refusal.argument = names(entry)[0];
    expect_refused(call, refusal);
  }
}

TEST(Validation, RefusesResultsThatOverlap) {
  const auto overlapping = [](const auto&) { return refusal{{}, "strides ", "elements that do not overlap"}; };
  for (std::size_t dimension = 0; dimension < 3; ++dimension) {
    for_each_tensor(
        false, true, [&](auto& view) { view.stride[dimension] = 0; }, overlapping);
    // The stride of another dimension: elements of both meet.
    for_each_tensor(
        false, true, [&](auto& view) { view.stride[dimension] = -view.stride[(dimension + 1) % 3]; }, overlapping);
  }
  for_each_tensor(
      false, false, [](auto& view) { view.stride[2] = view.extent[3] - 1; }, overlapping);
}

/// One extent too few, of every tensor but the query: it says what the others have to be.
TEST(Validation, RefusesExtentsThatDoNotFit) {
  for (const entry entry : all_entries) {
    const std::vector<std::string> all = names(entry);
    for (std::size_t i = 1; i < all.size(); ++i)
      for (std::size_t dimension = 0; dimension < 4; ++dimension) {
        prepared call(entry);
        const std::size_t operands = call.a.operands.size();
        const bool is_operand = i < operands, is_lse = all[i].starts_with("lse");
        const bool is_key = all[i] == "key" || all[i] == "far.key";
        if (is_lse && dimension == 3) continue;
        // These are the key's own to say; what does not fit them is the value, or the output.
        const bool own = (is_key && (dimension == 1 || dimension == 2)) || (all[i] == "value" && dimension == 3);
        if (own) continue;
        auto wanted = is_operand ? call.a.operands[i].extent : call.a.results[i - operands].extent;
        auto got = wanted;
        got[dimension] -= 1;
        (is_operand ? call.a.operands[i].extent : call.a.results[i - operands].extent) = got;
        const auto text = [&](const extents& e) {
          return is_lse ? text_of<3>({e[0], e[1], e[2]}) : text_of(e);
        };
        SCOPED_TRACE(testing::Message() << entry << ", " << all[i] << ", dimension " << dimension);
        if (all[i] == "far.value" && dimension == 3)
          expect_refused(call, {"far.value", "dim 2", "the value's dim 3"});
        else
          expect_refused(call, {all[i], text(got), "extents " + text(wanted)});
      }
  }
}

TEST(Validation, RefusesAValueDimOtherThanThatOfTheOutput) {
  for (const entry entry : {entry::dense, entry::local, entry::attention}) {
    prepared call(entry);
    call.a.operands[2].extent[3] = 2;
    expect_refused(call, {"out", "[2, 4, 6, 3]", "extents [2, 4, 6, 2]"});
  }
}

TEST(Validation, RefusesHeadsThatDoNotDivide) {
  for (const entry entry : with_keys)
    for (const std::int64_t heads : {0, 3, 8}) {
      prepared call(entry);
      call.a.operands[1].extent[1] = call.a.operands[2].extent[1] = heads;
      expect_refused(call, {"key", std::to_string(heads) + " heads", "a divisor of the 4 query heads"});
    }
  for (const std::int64_t heads : {0, 3, 8}) {
    prepared call(entry::attend);
    call.a.operands[3].extent[1] = call.a.operands[4].extent[1] = heads;
    expect_refused(call, {"far.key", std::to_string(heads) + " heads", "a divisor of the 4 query heads"});
  }
}

TEST(Validation, AcceptsNullWhereThereIsNothing) {
  for (const entry entry : all_entries)
    for (const std::size_t dimension : {0u, 2u}) {
      prepared call(entry);
      for (auto& view : call.a.operands) {
        view.extent[dimension] = 0;
        view.data = nullptr;
      }
      for (auto& view : call.a.results) {
        view.extent[dimension] = 0;
        view.data = nullptr;
      }
      call.a.seen.extent[dimension] = 0;
      call.a.seen.data = nullptr;
      EXPECT_NO_THROW(call.call()) << entry;
    }
}

/// Queries may have no keys, or far keys alone.
TEST(Validation, AcceptsNullForKeysThatThereAreNot) {
  for (const entry entry : with_raw)
    for (const std::size_t first : {1u, 3u}) {
      prepared call(entry);
      for (std::size_t i = first; i < std::min(first + 2, call.a.operands.size()); ++i) {
        call.a.operands[i].extent[2] = 0;
        call.a.operands[i].data = nullptr;
      }
      if (first == 3) call.memory.seen.fill(0);
      EXPECT_NO_THROW(call.call()) << entry;
    }
}

TEST(Validation, AcceptsAnyStrideWhereThereIsOneElement) {
  for (const entry entry : all_entries) {
    prepared call(entry);
    for (auto& view : call.a.operands) view.extent[0] = 1, view.stride[0] = unlimited;
    for (auto& view : call.a.results) view.extent[0] = 1, view.stride[0] = -unlimited - 1;
    call.a.seen.extent[0] = 1;
    EXPECT_NO_THROW(call.call()) << entry;
  }
}

// --------------------------------------------------------------------------------------------------------- lengths

TEST(Validation, PoolingWantsAQueryForEveryKey) {
  for (const entry entry : with_query_per_key)
    for (const std::int64_t queries : {0, 5}) {
      prepared call(entry);
      call.a.operands[0].extent[2] = queries;
      expect_refused(call, {"query", std::to_string(queries) + " queries", "a query for each of the 6 keys"});
    }
}

TEST(Validation, RefusesCountsOfFarRowsThatThereAreNot) {
  for (const std::int64_t count : {std::int64_t{-1}, std::int64_t{10}, unlimited, -unlimited - 1}) {
    prepared call(entry::attend);
    *call.memory.seen.row(1, 3, 5) = count;
    expect_refused(call, {"far.seen", std::to_string(count) + " at [1, 3, 5]", "a count in [0, 9]"});
  }
  for (std::size_t dimension = 0; dimension < 3; ++dimension) {
    prepared call(entry::attend);
    call.a.seen.extent[dimension] -= 1;
    expect_refused(call, {"far.seen", text_of(call.a.seen.extent), "extents [2, 4, 6]"});
    call.a.seen.extent[dimension] = -1;
    expect_refused(call, {"far.seen", "extents " + text_of(call.a.seen.extent), "none below 0"});
  }
  prepared call(entry::attend);
  call.a.seen.data = nullptr;
  expect_refused(call, {"far.seen", "a null pointer", "elements [2, 4, 6]"});
}

// --------------------------------------------------------------------------------------------------------- options

struct option_refusal {
  std::vector<entry> entries;
  void (*change)(options&);
  refusal expected;
};

TEST(Validation, RefusesOptions) {
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  const std::vector<option_refusal> table{
      {{entry::pool}, [](options& o) { o.group_size = 0; }, {"options.group_size", "0", "at least 1"}},
      {{entry::local, entry::attention, entry::attend, entry::pool},
       [](options& o) { o.group_size = -3; },
       {"options.group_size", "-3", "at least 1"}},
      {{entry::local, entry::attention, entry::attend},
       [](options& o) { o.window = 0; },
       {"options.window", "0", "at least 1"}},
      {{entry::local, entry::attention, entry::attend},
       [](options& o) { o.window = -unlimited; },
       {"options.window", std::to_string(-unlimited), "at least 1"}},
      {with_keys, [](options& o) { o.softmax_scale = infinity; }, {"options.softmax_scale", "inf", "a finite number"}},
      {with_keys,
       [](options& o) { o.softmax_scale = -infinity; },
       {"options.softmax_scale", "-inf", "a finite number"}},
      {with_keys,
       [](options& o) { o.softmax_scale = std::numeric_limits<double>::quiet_NaN(); },
       {"options.softmax_scale", "nan", "a finite number"}},
      // Finite, but not in float, in which these calls compute.
      {with_keys,
       [](options& o) { o.softmax_scale = 1e300; },
       {"options.softmax_scale", "1e+300", "a finite number"}},
      {with_keys,
       [](options& o) { o.pool = static_cast<pooling>(5); },
       {"options.pool", "5", "last_query, mean, max, select or select_by_mass"}},
      {with_keys,
       [](options& o) { o.core_heads = static_cast<cca::core_heads>(-1); },
       {"options.core_heads", "-1", "per_query_head or per_kv_head"}},
      {with_raw,
       [](options& o) { o.first_position = (std::int64_t{1} << 62) + 1; },
       {"options.first_position", std::to_string((std::int64_t{1} << 62) + 1), "a position between -2^62 and 2^62"}},
      {with_raw,
       [](options& o) { o.first_position = -unlimited; },
       {"options.first_position", std::to_string(-unlimited), "a position between -2^62 and 2^62"}},
      {with_query_per_key, [](options& o) { o.first_position = 3; }, {"options.first_position", "3", "0 or none"}},
      {with_keys, [](options& o) { o.softcap = -1; }, {"options.softcap", "-1", "a finite number above 0"}},
      {with_keys, [](options& o) { o.softcap = infinity; }, {"options.softcap", "inf", "a finite number above 0"}},
      {with_keys, [](options& o) { o.softcap = 1e300; }, {"options.softcap", "1", "a finite number above 0"}},
      {with_keys,
       [](options& o) { o.softcap = std::numeric_limits<double>::quiet_NaN(); },
       {"options.softcap", "nan", "a finite number above 0"}},
      {with_query_per_key,
       [](options& o) { o.pooling_scale = -0.5; },
       {"options.pooling_scale", "-0.5", "at least 0 and, times"}},
      {with_query_per_key,
       [](options& o) { o.pooling_scale = infinity; },
       {"options.pooling_scale", "inf", "at least 0 and, times"}},
      {with_query_per_key,
       [](options& o) { o.pooling_scale = std::numeric_limits<double>::quiet_NaN(); },
       {"options.pooling_scale", "nan", "at least 0 and, times"}},
      // Each is in range, but not what weights are computed with.
      {with_query_per_key,
       [](options& o) { o.softmax_scale = -1e30, o.pooling_scale = 1e9; },
       {"options.pooling_scale", "1e+09", "at least 0 and, times the softmax's scale, at most 2.35"}},
      // Whatever would have no effect.
      {with_raw, [](options& o) { o.pooling_scale = 4; }, {"options.pooling_scale", "4", "1: "}},
      {{entry::attention},
       [](options& o) { o.pooling_scale = 4, o.group_size = 0; },
       {"options.pooling_scale", "4", "1: nothing is pooled"}},
      {with_raw, [](options& o) { o.pool = pooling::mean; }, {"options.pool", "mean", "last_query: "}},
      {with_raw,
       [](options& o) { o.core_heads = core_heads::per_kv_head; },
       {"options.core_heads", "per_kv_head", "per_query_head: "}},
      {{entry::attention},
       [](options& o) { o.pool = pooling::max, o.group_size = 0; },
       {"options.pool", "max", "last_query: nothing is pooled"}},
      {{entry::dense}, [](options& o) { o.window = 5; }, {"options.window", "5", "unlimited: "}},
      {{entry::pool}, [](options& o) { o.window = 5; }, {"options.window", "5", "unlimited: "}},
      {{entry::pool}, [](options& o) { o.softcap = 5; }, {"options.softcap", "5", "0"}},
      {{entry::dense}, [](options& o) { o.group_size = 5; }, {"options.group_size", "5", "0: "}},
      {with_keys, [](options& o) { o.sink_tokens = -1; }, {"options.sink_tokens", "-1", "at least 0"}},
      {with_keys, [](options& o) { o.lookahead = -2; }, {"options.lookahead", "-2", "at least 0"}},
      {with_keys,
       [](options& o) { o.prefix = -unlimited; },
       {"options.prefix", std::to_string(-unlimited), "at least 0"}},
      {{entry::local, entry::attention},
       [](options& o) { o.lookahead = unlimited; },
       {"options.lookahead", "unlimited", "0: with groups"}},
      {{entry::local, entry::attention}, [](options& o) { o.prefix = 2; }, {"options.prefix", "2", "0: with groups"}},
      {{entry::attend}, [](options& o) { o.group_size = 2, o.prefix = 1; }, {"options.prefix", "1", "0: with groups"}},
      {{entry::pool}, [](options& o) { o.lookahead = 1; }, {"options.lookahead", "1", "0: "}},
      {{entry::pool}, [](options& o) { o.prefix = 1; }, {"options.prefix", "1", "0: "}},
      {{entry::local, entry::attention, entry::attend},
       [](options& o) { o.group_size = 5, o.window = unlimited; },
       {"options.group_size", "5", "0: without options.window"}},
  };
  for (const auto& [entries, change, expected] : table)
    for (const entry entry : entries) {
      prepared call(entry);
      change(call.p.options);
      SCOPED_TRACE(testing::Message() << call.p);
      expect_refused(call, expected);
    }
}

/// The largest weight is that of the same token, whatever their scale.
TEST(Validation, RefusesASharperPoolingWithoutASoftmax) {
  const sizes s{.heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3};
  for (const pooling pool : {pooling::mean, pooling::max, pooling::select, pooling::select_by_mass})
    for (const entry entry : with_query_per_key) {
      const std::int64_t window = entry == entry::pool ? pool_window(pool, 1) : 1;
      const problem p{.entry = entry, .sizes = s, .options = {.group_size = 3, .window = window, .pool = pool}};
      EXPECT_NO_THROW(prepared(p).call());
      prepared sharper(p);
      sharper.p.options.pooling_scale = 2;
      expect_refused(sharper, {"options.pooling_scale", "2", "1: of the poolings last_query alone"});
    }
}

/// Which queries are asked, and what they see, is a matter of the window.
TEST(Validation, RefusesToSelectByMassWithoutAWindow) {
  const sizes s{.heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3};
  prepared call({.entry = entry::pool, .sizes = s, .options = {.group_size = 3, .pool = pooling::select_by_mass}});
  expect_refused(call, {"options.window", "unlimited", "a window: "});
  call.p.options.window = 2;
  EXPECT_NO_THROW(call.call());
  prepared biased({.entry = entry::attention,
                   .sizes = s,
                   .options = {.group_size = 3,
                               .window = 2,
                               .pool = pooling::select_by_mass,
                               .core_bias = core_bias::entropy}});
  expect_refused(biased, {"options.core_bias", "entropy", "none: the pooling has no weights"});
}

/// The mean and the maximum have no softmax, unlike the attention that follows them.
TEST(Validation, RefusesAScaleWhereThereAreNoWeights) {
  for (const pooling pool : {pooling::mean, pooling::max}) {
    const sizes s{.heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3};
    prepared call({.entry = entry::pool, .sizes = s, .options = {.group_size = 3, .pool = pool, .softmax_scale = 0.5}});
    expect_refused(call, {"options.softmax_scale", "0.5", "none: "});
    prepared attention({.entry = entry::attention,
                        .sizes = s,
                        .options = {.group_size = 3, .window = 1, .pool = pool, .softmax_scale = 0.5}});
    EXPECT_NO_THROW(attention.call());
  }
}

TEST(Validation, AcceptsTheEndsOfTheRanges) {
  for (const std::int64_t position : {std::int64_t{1} << 62, -(std::int64_t{1} << 62)})
    for (const entry entry : with_raw) {
      prepared call(entry);
      call.p.options.first_position = position;
      EXPECT_NO_THROW(call.call()) << call.p;
    }
  for (const entry entry : {entry::local, entry::attention}) {
    prepared call(entry);
    call.p.options = {.group_size = unlimited, .window = unlimited - 1};
    EXPECT_NO_THROW(call.call()) << call.p;
  }
  for (const entry entry : with_query_per_key) {
    prepared call(entry);
    call.p.options.first_position = 0;
    EXPECT_NO_THROW(call.call()) << call.p;
  }
}

TEST(Validation, WantsNoLogSumExps) {
  for (const entry entry : with_out) {
    prepared call(entry);
    call.a.results[1] = {};
    EXPECT_NO_THROW(call.call()) << entry;
    prepared whole(entry);
    whole.call();
    EXPECT_TRUE(same_bits(call.a.results[0], whole.a.results[0])) << entry;
  }
}

}}  // namespace cca::test
