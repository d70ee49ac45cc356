// NaN, infinities, and logits and values at the ends of the number range: they show where they are seen, and only there.

#include "entry_points.hpp"

namespace cca::test { namespace {

template <class T>
class SpecialValues : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block;
  const std::int64_t stack = tile<T>().least_stack * lanes;  // of sequences as short as those here
  static constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
};

TYPED_TEST_SUITE(SpecialValues, precisions);

// ------------------------------------------------------------------------------------------ where a number may show

enum class operand { query, key, value, far_key, far_value };

/// In which form something of token `j`, or of far row `j`, reaches query `i`.
struct reach {
  bool raw = false;   ///< a key or value of its own in the softmax, or the query itself
  bool core = false;  ///< through a core
};

/// What query `i` sees of token `j`'s key and value, by the rules.
reach reach_of_token(const problem& p, std::int64_t j, std::int64_t i) {
  const std::int64_t g = std::max<std::int64_t>(p.options.group_size, 1), s = p.options.window;
  const std::int64_t t = p.options.first_position.value_or(p.sizes.keys - p.sizes.queries) + i;
  const std::int64_t last_of_group = j / g * g + g - 1;
  const bool before_window = s != unlimited && last_of_group < t + 1 - s;
  return {.raw = j <= t && !before_window, .core = before_window && p.entry == entry::attention};
}

/// Whether query `i` sees no token and no far row.
bool sees_nothing(const problem& p, std::int64_t i) {
  if (seen_count(p, 0, 0, i) > 0) return false;
  for (std::int64_t j = 0; j < p.sizes.keys; ++j)
    if (const reach reach = reach_of_token(p, j, i); reach.raw || reach.core) return false;
  return true;
}

reach reach_of(const problem& p, operand operand, std::int64_t j, std::int64_t i) {
  if (operand == operand::far_key || operand == operand::far_value) return {.raw = j < seen_count(p, 0, 0, i)};
  if (operand != operand::query) return reach_of_token(p, j, i);
  const std::int64_t g = std::max<std::int64_t>(p.options.group_size, 1), s = p.options.window;
  bool core = j % g == g - 1 && reach_of_token(p, j, i).core;
  if (p.options.pool == pooling::select_by_mass) {  // which queries of a window that is shorter than 64 observe is plain: all
    core = false;
    for (std::int64_t last = g - 1; last + s <= i; last += g) core = core || (last <= j && j < last + s);
  }
  return {.raw = i == j && !sees_nothing(p, i), .core = core};
}

/// Checks the results of a call with `bad` in the last element of row `j` of one operand against the call without it.
template <class T>
void expect_shown_where_seen(const problem& p, argument_memory<T>& clean, operand operand, std::int64_t j, T bad) {
  argument_memory<T> spoilt = clean;
  tensor<T>& victim = spoilt.operands[static_cast<std::size_t>(operand)];
  const std::int64_t last = victim.view().dim() - 1;
  victim.row(0, 0, j)[last] = bad;
  call(p, spoilt.arguments());
  const bool is_value = operand == operand::value || operand == operand::far_value;
  for (std::int64_t i = 0; i < p.sizes.queries; ++i) {
    const reach reach = reach_of(p, operand, j, i);
    const T *out = spoilt.results[0].row(0, 0, i), *clean_out = clean.results[0].row(0, 0, i);
    const T lse = *spoilt.results[1].row(0, 0, i), clean_lse = *clean.results[1].row(0, 0, i);
    for (std::int64_t d = 0; d < p.sizes.value_dim; ++d) {
      // A value shows in its own column. A key, a query, or the weights of a core show in all.
      const bool shows = (reach.raw && (!is_value || d == last)) || (reach.core && (!is_value || d == last));
      if (!shows) {
        ASSERT_TRUE(same_bits(out[d], clean_out[d])) << p << ": row " << j << " leaks to query " << i;
      } else if (std::isnan(bad)) {
        ASSERT_TRUE(std::isnan(out[d])) << p << ": row " << j << " is hidden from query " << i;
      } else if (is_value) {
        ASSERT_FALSE(std::isfinite(out[d])) << p << ": row " << j << " is hidden from query " << i;
      }
    }
    if (is_value || !(reach.raw || reach.core)) {
      ASSERT_TRUE(same_bits(lse, clean_lse)) << p << ": row " << j << " leaks to the lse of query " << i;
    } else if (std::isnan(bad)) {
      ASSERT_TRUE(std::isnan(lse)) << p << ": row " << j << " is hidden from the lse of query " << i;
    }
  }
}

TYPED_TEST(SpecialValues, ShowExactlyWhereTheyAreSeen) {
  using T = TypeParam;
  random_engine random(1);
  const std::int64_t length = this->stack + this->block + 5;
  std::vector<problem> problems;
  for (const std::int64_t queries : {std::int64_t{3}, this->lanes + 7, length}) {
    const sizes s{.queries = queries, .keys = length, .dim = 6, .value_dim = 5};
    problems.push_back(example(entry::dense, s));
    problems.push_back(example(entry::attend, s));
    for (const options& options : {options{.window = 1},
                                   {.window = this->block + 3},
                                   {.group_size = 7, .window = 20},
                                   {.group_size = 5, .window = 9, .first_position = 40}})
      problems.push_back({.entry = entry::local, .sizes = s, .options = options});
  }
  const sizes whole{.queries = length, .keys = length, .dim = 6, .value_dim = 5};
  for (const pooling pool : all_poolings)
    problems.push_back(
        {.entry = entry::attention, .sizes = whole, .options = {.group_size = 6, .window = 15, .pool = pool}});
  problems.push_back({.entry = entry::attention, .sizes = whole, .options = {.group_size = 1, .window = 30}});

  for (const problem& p : problems) {
    argument_memory<T> clean = argument_memory<T>(p).randomize(random);
    call(p, clean.arguments());
    for (std::size_t o = 0; o < clean.operands.size(); ++o) {
      const auto operand = static_cast<test::operand>(o);
      // In pooling by the mean or the maximum no query has part; of values those are shown that are selected.
      if (operand == operand::query && !detail::uses_query(p.options.pool)) continue;
      const bool selects = p.options.pool == pooling::select || p.options.pool == pooling::select_by_mass;
      if (operand == operand::value && selects) continue;
      const std::int64_t rows = clean.operands[o].view().length();
      for (std::int64_t j = 0; j < rows; j += draw(random, 1, 23))
        for (const T bad : {this->nan, this->infinity, -this->infinity}) {
          // A query of infinities has logits of either sign, and NaNs of its own only where both meet.
          if (operand == operand::query && !std::isnan(bad)) continue;
          // An infinite key may weigh nothing; and the maximum passes -inf over.
          const bool maximum_of = p.options.pool == pooling::max && p.entry == entry::attention;
          if (maximum_of && bad == -this->infinity) continue;
          expect_shown_where_seen(p, clean, operand, j, bad);
          if (testing::Test::HasFatalFailure()) return;
        }
    }
  }
}

/// Only the tokens of complete groups are pooled, and each into its own core.
TYPED_TEST(SpecialValues, StayInTheirGroup) {
  using T = TypeParam;
  random_engine random(2);
  for (const pooling pool : group_poolings)
    for (const std::int64_t group_size : {1, 7, 70, 150}) {
      const sizes s{.queries = 307, .keys = 307, .dim = 6, .value_dim = 5};
      const problem p{.entry = entry::pool, .sizes = s, .options = {.group_size = group_size, .pool = pool}};
      argument_memory<T> clean = argument_memory<T>(p).randomize(random);
      call(p, clean.arguments());
      for (std::size_t o = 0; o < 3; ++o)
        for (std::int64_t j = 0; j < s.keys; j += draw(random, 1, 9)) {
          argument_memory<T> spoilt = clean;
          const std::int64_t last = spoilt.operands[o].view().dim() - 1;
          spoilt.operands[o].row(0, 0, j)[last] = this->nan;
          call(p, spoilt.arguments());
          for (std::size_t r = 0; r < 2; ++r)
            for (std::int64_t c = 0; c < s.keys / group_size; ++c)
              for (std::int64_t d = 0; d < spoilt.results[r].view().dim(); ++d) {
                const bool by_weight = detail::uses_query(pool);
                bool in_group = j / group_size == c;
                if (pool == pooling::select && o == 2)
                  in_group = in_group && clean.results[0].row(0, 0, c)[0] == clean.operands[1].row(0, 0, j)[0];
                const bool shows = o == 0   ? in_group && by_weight && j % group_size == group_size - 1
                                   : o == 1 ? in_group && (by_weight || (r == 0 && d == last))
                                            : in_group && r == 1 && d == last;
                const T core = spoilt.results[r].row(0, 0, c)[d];
                ASSERT_TRUE(shows ? std::isnan(core) : same_bits(core, clean.results[r].row(0, 0, c)[d]))
                    << p << ": operand " << o << ", token " << j << ", core " << c << ", result " << r;
              }
        }
    }
}

/// Heads and sequences beside the one with a NaN keep their bits.
TYPED_TEST(SpecialValues, StayInTheirHeadAndSequence) {
  using T = TypeParam;
  random_engine random(3);
  for (const entry entry : all_entries)
    for (const std::int64_t length : {std::int64_t{3}, this->lanes + 3}) {
      const problem p = example(
          entry, {.batch = 2, .heads = 6, .kv_heads = 3, .queries = length, .keys = length, .dim = 6, .value_dim = 5});
      argument_memory<T> clean = argument_memory<T>(p).randomize(random);
      call(p, clean.arguments());
      for (std::size_t o = 0; o < clean.operands.size(); ++o) {
        argument_memory<T> spoilt = clean;
        const auto victim = spoilt.operands[o].view();
        const std::int64_t bad_head = victim.heads() / 2;
        for (std::int64_t i = 0; i < victim.length(); ++i)
          std::fill_n(victim.row(1, bad_head, i), victim.dim(), this->nan);
        call(p, spoilt.arguments());
        for (std::size_t r = 0; r < 2; ++r) {
          const auto result = spoilt.results[r].view();
          for_each_row(result, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
            if (b == 1 && h * victim.heads() / result.heads() == bad_head) return;
            for (std::int64_t d = 0; d < result.dim(); ++d)
              ASSERT_TRUE(same_bits(result.row(b, h, i)[d], clean.results[r].row(b, h, i)[d]))
                  << p << ": operand " << o << " leaks to sequence " << b << ", head " << h;
          });
        }
      }
    }
}

// ------------------------------------------------------------------------------------------------ nothing to be seen

/// 0 and -inf for the queries `i` of which `empty(i)` holds; numbers for the others.
template <class T, class Empty>
void expect_empty(const argument_memory<T>& memory, const Empty& empty) {
  const auto out = memory.results[0].view(), lse = memory.results[1].view();
  for_each_row(out, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < out.dim(); ++d)
      ASSERT_TRUE(empty(i) ? same_bits(out.row(b, h, i)[d], T(0)) : std::isfinite(out.row(b, h, i)[d])) << i;
    ASSERT_TRUE(empty(i) ? *lse.row(b, h, i) == -std::numeric_limits<T>::infinity() : std::isfinite(*lse.row(b, h, i)))
        << i;
  });
}

TYPED_TEST(SpecialValues, QueriesThatSeeNothingAreEmpty) {
  using T = TypeParam;
  random_engine random(4);
  for (const std::int64_t queries : {std::int64_t{2}, this->lanes + 5, this->stack + 3})
    for (const entry entry : {entry::dense, entry::local}) {
      // Before the first key, and far behind the last.
      for (const std::int64_t first : {std::int64_t{-1}, -queries, std::int64_t{5}, std::int64_t{1000}}) {
        problem p = example(entry, {.heads = 2, .queries = queries, .keys = 20, .dim = 3, .value_dim = 4});
        p.options.first_position = first;
        argument_memory<T> memory = argument_memory<T>(p).randomize(random);
        call(p, memory.arguments());
        expect_empty(memory, [&](std::int64_t i) { return sees_nothing(p, i); });
      }
    }
  for (const std::int64_t queries : {std::int64_t{2}, this->lanes + 5}) {
    // All that is seen is far, and some queries see nothing there.
    problem p = example(entry::attend, {.queries = queries, .keys = 0, .dim = 3, .value_dim = 4});
    p.far_length = 12;
    argument_memory<T> memory = argument_memory<T>(p).randomize(random);
    call(p, memory.arguments());
    expect_empty(memory, [&](std::int64_t i) { return sees_nothing(p, i); });
  }
}

/// Queries of one tile whose first visible row lies blocks behind that of others: the rows before it are masked, by the
/// window, or by logits of -inf, which mask as well.
TYPED_TEST(SpecialValues, RowsMayStartMasked) {
  using T = TypeParam;
  random_engine random(5);
  const std::int64_t keys = 4 * this->block + 3, dim = 8;
  for (const std::int64_t queries : {std::int64_t{3}, this->stack + 9})
    for (const std::int64_t window : {std::int64_t{1}, this->block - 3, this->block + 40, 2 * this->block})
      for (const std::int64_t infinite : {std::int64_t{0}, keys / 2, keys - this->lanes}) {
        const problem p{.entry = entry::local,
                        .sizes = {.queries = queries, .keys = keys, .dim = dim, .value_dim = dim},
                        .options = {.window = window}};
        argument_memory<T> memory = argument_memory<T>(p).randomize(random);
        memory.operands[0].fill(T(1));  // positive, so that -inf in a key is -inf in its logits
        for (std::int64_t j = 0; j < infinite; ++j) memory.operands[1].row(0, 0, j)[0] = -this->infinity;
        call(p, memory.arguments());
        expect_empty(memory, [&](std::int64_t i) { return keys - queries + i < infinite; });
        // As if those keys were not seen: whatever their values are.
        argument_memory<T> other_values = memory;
        for (std::int64_t j = 0; j < infinite; ++j) std::fill_n(other_values.operands[2].row(0, 0, j), dim, T(7));
        call(p, other_values.arguments());
        ASSERT_TRUE(same_bits(other_values.arguments().results, memory.arguments().results)) << p;
      }
}

// --------------------------------------------------------------------------------- the ends of the range of numbers

/// The error rule for random operands that `adjust(memory)` changes; over several draws, since where few keys matter
/// the error of one is a matter of luck.
template <class T, class Adjust>
testing::AssertionResult exact(const problem& p, const Adjust& adjust, int draws = 4) {
  random_engine random(6);
  error_rule<T> out, lse;
  for (int i = 0; i < draws; ++i) {
    argument_memory<T> memory = argument_memory<T>(p).randomize(random);
    adjust(memory);
    const arguments<T> a = memory.arguments();
    call(p, a);
    const auto textbook = [&]<class Scalar>() {
      const auto &q = a.operands[0], &k = a.operands[1], &v = a.operands[2];
      if (p.entry == entry::attention) return reference::attention<Scalar>(inputs{q, k, v}, p.options);
      if (p.entry == entry::attend)
        return reference::attend<Scalar>(inputs{q, k, v}, far_context{a.operands[3], a.operands[4], a.seen}, p.options);
      return reference::local_attention<Scalar>(inputs{q, k, v}, p.options);
    };
    const auto plain = textbook.template operator()<T>();
    const auto truth = textbook.template operator()<exact_type<T>>();
    out.add(memory.results[0].view(), plain.out.view(), truth.out.view());
    lse.add(memory.results[1].view(), plain.lse.view(), truth.lse.view());
  }
  if (const auto holds = out.holds(); !holds) return testing::AssertionFailure() << p << ", out: " << holds.message();
  if (const auto holds = lse.holds(); !holds) return testing::AssertionFailure() << p << ", lse: " << holds.message();
  return testing::AssertionSuccess();
}

/// Every entry point, with many queries and with few.
std::vector<problem> problems_of(std::int64_t length) {
  std::vector<problem> problems;
  for (const entry entry : {entry::dense, entry::local, entry::attention, entry::attend}) {
    sizes s{.heads = 2, .queries = length, .keys = length, .dim = 16, .value_dim = 8};
    problems.push_back(example(entry, s));
    if (entry == entry::attention) continue;  // as many queries as keys
    s.heads = 32, s.kv_heads = 4, s.queries = 2;
    problems.push_back(example(entry, s));
  }
  return problems;
}

/// Calls `f(row)` for every row of an operand.
template <class T, class F>
void for_each_row_of(tensor<T>& operand, const F& f) {
  for_each_row(operand.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) { f(operand.row(b, h, i)); });
}

/// Makes the logits `offset`, or of either sign by chance, plus normal ones times `spread`. The first elements of
/// query and key make the offset: the softmax scale is 1/4 for a dim of 16.
template <class T>
auto logits_about(double offset, double spread, bool either_sign = false) {
  return [=](argument_memory<T>& memory) {
    random_engine random(7);
    const double root = 2 * std::sqrt(std::fabs(offset));
    for (std::size_t o = 0; o < memory.operands.size(); ++o) {
      if (o == 2 || o == 4) continue;  // values
      for_each_row_of(memory.operands[o], [&](T* row) {
        const bool negative = o == 0 ? offset < 0 : either_sign && draw(random, 0, 1) == 0;
        row[0] = static_cast<T>(negative ? -root : root);
        for (std::int64_t d = 1; d < 16; ++d) row[d] *= static_cast<T>(std::sqrt(spread));
      });
    }
  };
}

TYPED_TEST(SpecialValues, LogitsMayLieAnywhere) {
  using T = TypeParam;
  for (const problem& p : problems_of(this->stack + 30))
    for (const double offset : {-6e4, -1e8, -1e33, 6e4, 1e8})
      for (const double spread : {0.0, 1.0}) EXPECT_TRUE(exact<T>(p, logits_about<T>(offset, spread))) << offset;
}

/// Where most weights are 0, and the maximum leaps.
TYPED_TEST(SpecialValues, LogitsMayLieFarApart) {
  using T = TypeParam;
  for (const problem& p : problems_of(this->stack + 30))
    for (const double offset : {100.0, 6e4}) EXPECT_TRUE(exact<T>(p, logits_about<T>(offset, 1, true))) << offset;
}

TYPED_TEST(SpecialValues, LogitsMayBeMinusInfinity) {
  using T = TypeParam;
  for (const problem& p : problems_of(this->stack + 30)) {
    if (p.entry == entry::attention) continue;  // a core of infinite keys is NaN
    const auto some_infinite = [&](argument_memory<T>& memory) {
      // Every query is positive there; two of three keys weigh nothing.
      for_each_row_of(memory.operands[0], [](T* query) { query[0] = 1; });
      std::int64_t i = 0;
      for_each_row_of(memory.operands[1], [&](T* key) {
        if (i++ % 3 != 0) key[0] = -std::numeric_limits<T>::infinity();
      });
    };
    EXPECT_TRUE(exact<T>(p, some_infinite));
  }
}

TYPED_TEST(SpecialValues, NumbersMayBeDenormalOrHuge) {
  using T = TypeParam;
  const double denormal = std::numeric_limits<T>::denorm_min() * 1000, huge = std::numeric_limits<T>::max() / 1e5;
  for (const problem& p : problems_of(this->stack + 30))
    for (const auto& [keys, values] :
         std::array<std::pair<double, double>, 4>{{{denormal, 1}, {1, denormal}, {1, huge}, {30, huge}}}) {
      const auto scaled = [keys = keys, values = values](argument_memory<T>& memory) {
        for (std::size_t o = 1; o < memory.operands.size(); ++o) {
          const bool is_key = o % 2 == 1;
          for_each_row_of(memory.operands[o], [&](T* row) {
            for (std::int64_t d = 0; d < (is_key ? 16 : 8); ++d) row[d] *= static_cast<T>(is_key ? keys : values);
          });
        }
      };
      EXPECT_TRUE(exact<T>(p, scaled)) << "keys times " << keys << ", values times " << values;
    }
}

/// The plain mean of a million values: each is a weight of 1 in a sum of a million.
TYPED_TEST(SpecialValues, AMillionEqualKeysAverageTheirValues) {
  using T = TypeParam;
  constexpr std::int64_t million = 1000000;
  for (const std::int64_t queries : {1, 5})
    for (const entry entry : {entry::dense, entry::attend}) {
      problem p = example(entry, {.queries = queries, .keys = million, .dim = 1, .value_dim = 1});
      if (entry == entry::attend) {
        p.sizes.keys = 5;
        p.far_length = million;
      }
      const auto equal = [](argument_memory<T>& memory) {
        memory.seen.fill(million);
        for (std::size_t o = 1; o < memory.operands.size(); ++o) {
          if (o % 2 == 1)
            memory.operands[o].fill(T(0.75));
          else  // all positive, so that an error of the sum shows
            for_each_row_of(memory.operands[o], [](T* value) { value[0] = std::fabs(value[0]); });
        }
      };
      EXPECT_TRUE(exact<T>(p, equal, 1));
    }
}

TYPED_TEST(SpecialValues, AGroupMayBeAMillionEqualKeys) {
  using T = TypeParam;
  constexpr std::int64_t million = 1000000;
  const problem p{.entry = entry::pool,
                  .sizes = {.queries = million, .keys = million, .dim = 1, .value_dim = 1},
                  .options = {.group_size = million}};
  random_engine random(11);
  argument_memory<T> memory = argument_memory<T>(p).randomize(random);
  memory.operands[1].fill(T(0.75));
  const arguments<T> a = memory.arguments();
  call(p, a);
  const auto plain = reference::pool<T>(a.operands[0], a.operands[1], a.operands[2], p.options);
  const auto truth = reference::pool<exact_type<T>>(a.operands[0], a.operands[1], a.operands[2], p.options);
  error_rule<T> keys, values;
  keys.add(memory.results[0].view(), plain.first.view(), truth.first.view());
  values.add(memory.results[1].view(), plain.second.view(), truth.second.view());
  EXPECT_TRUE(keys.holds());
  EXPECT_TRUE(values.holds());
}

// --------------------------------------------------------------------------------------------------------- merging

/// NaN wins over an empty part and over any other; an infinite score has no share that could be computed.
TYPED_TEST(SpecialValues, OfAPartShowInItsMerge) {
  using T = TypeParam;
  const problem p{.entry = entry::merge, .sizes = {.dim = 1, .value_dim = 1}};
  const auto merged = [&](T lse_a, T lse_b) {
    argument_memory<T> memory(p);
    memory.operands[0].fill(T(1));
    memory.operands[1].fill(lse_a);
    memory.operands[2].fill(T(3));
    memory.operands[3].fill(lse_b);
    call(p, memory.arguments());
    return std::pair{*memory.results[0].row(0, 0, 0), *memory.results[1].row(0, 0, 0)};
  };
  for (const T other : {T(0), T(-1e8), -this->infinity, this->nan})
    for (const bool first : {false, true}) {
      const auto [out, lse] = first ? merged(this->nan, other) : merged(other, this->nan);
      EXPECT_TRUE(std::isnan(out)) << other;
      EXPECT_TRUE(std::isnan(lse)) << other;
    }
  EXPECT_EQ(merged(-this->infinity, -this->infinity), std::pair(T(0), -this->infinity));
  EXPECT_EQ(merged(-this->infinity, T(-1e8)), std::pair(T(3), T(-1e8)));
  EXPECT_EQ(merged(T(1e8), -this->infinity), std::pair(T(1), T(1e8)));
}

}}  // namespace cca::test
