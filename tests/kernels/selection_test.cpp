// Far context that is no prefix: rows that are visible for a while, in any order, and lists of selected blocks of rows,
// forward and backward, by rules that are spelled out row by row here, and against the textbook.

#include "executors.hpp"
#include "score_calls.hpp"

#if defined(CCA_TEST_UNITS)
#include "amx_emulator.hpp"
#include "unit_entry_points.hpp"
#endif

namespace cca::test { namespace {

/// What says who sees a far row.
enum class kind {
  from,      // rows come
  until,     // rows go
  sorted,    // both, in the order of the rows
  unsorted,  // both, in none
  evicted,   // rows come in their order and go in any
  lists,     // of selected blocks
};
constexpr std::array all_kinds{kind::from, kind::until, kind::sorted, kind::unsorted, kind::evicted, kind::lists};

/// A divisor of `heads`.
std::int64_t draw_divisor(random_engine& random, std::int64_t heads) {
  std::vector<std::int64_t> all;
  for (std::int64_t d = 1; d <= heads; ++d)
    if (heads % d == 0) all.push_back(d);
  return draw_from(random, all);
}

struct visibility {
  test::kind kind;
  bool counted;  // by `seen` as well
  std::int64_t heads, first, block_rows = 1, block_queries = 1;
  tensor<std::int64_t, 3> counts, from, until;
  tensor<std::int64_t> lists;

  visibility(const problem& p, test::kind of, random_engine& random, bool shared = false)
      : kind(of),
        counted(draw(random, 0, 1) == 0),
        heads(p.sizes.heads),
        first(detail::first_position(p.options, p.sizes.queries, p.sizes.keys)),
        counts({p.sizes.batch, heads, p.sizes.queries}, random_layout(random)),
        from(rows_of(p, random, shared)),
        until(rows_of(p, random, shared)),
        lists(std::array<std::int64_t, 4>{}) {
    counts.generate([&] { return draw(random, 0, p.far_length); });
    if (kind == kind::lists) draw_lists(p, random, shared);
    const std::int64_t least = first - 3, most = first + p.sizes.queries + 3;
    for (tensor<std::int64_t, 3>* bounds : {&from, &until}) {
      bounds->generate([&] { return draw(random, least, most); });
      if (kind == kind::sorted)
        for_each_row(bounds->view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
          if (j > 0) *bounds->row(b, h, j) = std::max(*bounds->row(b, h, j - 1), *bounds->row(b, h, j) / 8 + j / 3);
        });
    }
    if (kind == kind::evicted)
      for_each_row(from.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
        *from.row(b, h, j) = first + j * p.sizes.queries / (p.far_length + 1);
      });
  }

  static tensor<std::int64_t, 3> rows_of(const problem& p, random_engine& random, bool shared) {
    return tensor<std::int64_t, 3>(
        {shared ? 1 : p.sizes.batch, draw_divisor(random, p.sizes.heads), p.far_length}, random_layout(random));
  }

  /// Some blocks and then -1 for each block of queries.
  void draw_lists(const problem& p, random_engine& random, bool shared) {
    block_rows = draw_from(random, std::array<std::int64_t, 9>{1, 1, 2, 3, 8, 16, 40, 64, 200});
    block_queries = draw_from(random, std::array<std::int64_t, 12>{1, 1, 1, 1, 2, 3, 4, 5, 16, 33, 64, 100});
    const std::int64_t blocks = (p.far_length + block_rows - 1) / block_rows;
    const std::int64_t most = draw(random, 1, draw(random, 0, 1) == 0 ? 3 : blocks + 1);
    lists = tensor<std::int64_t>({shared ? 1 : p.sizes.batch, draw_divisor(random, heads),
                                  (p.sizes.queries + block_queries - 1) / block_queries, most},
                                 random_layout(random));
    for_each_row(lists.view(),
                 [&](std::int64_t b, std::int64_t h, std::int64_t q) { draw_list(b, h, q, blocks, random); });
  }
  void draw_list(std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t blocks, random_engine& random) {
    std::vector<std::int64_t> all(static_cast<std::size_t>(blocks)), some;
    std::iota(all.begin(), all.end(), 0);
    std::sample(all.begin(), all.end(), std::back_inserter(some), draw(random, 0, lists.view().dim()), random);
    some.resize(static_cast<std::size_t>(lists.view().dim()), -1);
    std::copy(some.begin(), some.end(), lists.row(b, h, q));
  }

  template <class Arguments>
  void put(Arguments& a) const {
    if (!counted) a.seen = {};
    if (counted) a.seen = counts.view();
    if (kind == kind::lists) {
      a.selected = {lists.view(), block_rows, block_queries};
      return;
    }
    if (kind != kind::until) a.visible_from = from.view();
    if (kind != kind::from) a.visible_until = until.view();
  }

  /// The rule in words: whether query `i` of head `h` sees row `j`.
  [[nodiscard]] bool sees(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const auto of = [&](const tensor<std::int64_t, 3>& numbers) {
      const auto view = numbers.view();
      return *view.row(view.batch() == 1 ? 0 : b, h / (heads / view.heads()), j);
    };
    if (counted && j >= *counts.row(b, h, i)) return false;
    if (kind != kind::lists) {
      const bool has_come = kind == kind::until || of(from) <= first + i;
      return has_come && (kind == kind::from || first + i < of(until));
    }
    const auto view = lists.view();
    const std::int64_t* list = view.row(view.batch() == 1 ? 0 : b, h / (heads / view.heads()), i / block_queries);
    return std::count(list, list + view.dim(), j / block_rows) > 0;
  }

  friend std::ostream& operator<<(std::ostream& to, const visibility& v) {
    return to << ", kind " << static_cast<int>(v.kind) << ", counted " << v.counted << ", blocks of " << v.block_rows
              << " rows and " << v.block_queries << " queries, lists " << text_of(v.lists.view().extent);
  }
};

problem random_problem(random_engine& random, std::int64_t most_queries, std::int64_t most_rows) {
  problem p{.entry = entry::attend, .sizes = {.batch = draw(random, 1, 2)}, .options = {}};
  sizes& s = p.sizes;
  s.kv_heads = draw(random, 1, 2);
  s.heads = s.kv_heads * draw_from(random, std::array{1, 1, 2, 3, 9});
  s.queries = draw(random, 0, 2) == 0 ? draw(random, 1, 9) : draw(random, 1, most_queries);
  s.keys = draw(random, 0, 20);
  s.dim = draw(random, 1, 20);
  s.value_dim = draw(random, 1, 20);
  p.far_heads = draw_divisor(random, s.heads);
  p.far_length = draw(random, 1, most_rows);
  p.options.window = draw(random, 1, 25);
  if (draw(random, 0, 1) == 0) p.options.first_position = draw(random, -20, 20);
  return p;
}

/// A call with this visibility, which outlives it.
template <class T>
score_call<T> call_of(const problem& p, const score_terms& terms, const visibility& who, random_engine& random) {
  score_call<T> c(p, terms, random);
  c.adjust = [&who](arguments<T>& a) { who.put(a); };
  return c;
}

std::string label_of(const problem& p, const visibility& who) {
  std::ostringstream label;
  label << p << who;
  return label.str();
}

template <class T>
class Selection : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block;
};
TYPED_TEST_SUITE(Selection, precisions);

// --------------------------------------------------------------------------------------------------- who sees what

/// Queries of zeros give every row the same weight: with the identity for values output j is the share of row j.
TYPED_TEST(Selection, IsSeenByTheRule) {
  using T = TypeParam;
  random_engine random(1);
  for (const kind kind : all_kinds)
    for (int times = 0; times < 60; ++times) {
      problem p = random_problem(random, times % 3 == 0 ? 2 * this->lanes + 7 : 20, times % 5 == 0 ? 300 : 50);
      p.sizes.batch = p.sizes.kv_heads = 1, p.sizes.keys = 0;
      p.far_heads = draw_divisor(random, p.sizes.heads);
      p.sizes.value_dim = p.far_length;
      const visibility who(p, kind, random);
      score_call<T> c = call_of<T>(p, {}, who, random);
      std::vector<tensor<T>>& operands = c.memory.operands;
      operands[0] = tensor<T>(operands[0].view().extent).fill(0);
      operands[4] = tensor<T>(operands[4].view().extent).fill(0);
      for_each_row(operands[4].view(),
                   [&](std::int64_t b, std::int64_t h, std::int64_t j) { operands[4].row(b, h, j)[j] = 1; });
      c.forward();
      for_each_row(c.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::int64_t count = 0;
        for (std::int64_t j = 0; j < p.far_length; ++j) {
          count += who.sees(b, h, i, j);
          ASSERT_EQ(c.out().row(b, h, i)[j] != 0, who.sees(b, h, i, j))
              << label_of(p, who) << ", head " << h << ", query " << i << ", row " << j;
        }
        const auto lse = static_cast<double>(*c.lse().row(b, h, i));
        ASSERT_NEAR(std::exp(lse), static_cast<double>(count), 1e-3) << label_of(p, who) << ", query " << i;
      });
    }
}

/// What a query gets does not depend, to the bit, on what the others select.
TYPED_TEST(Selection, OfNeighboursDoesNotMatter) {
  using T = TypeParam;
  random_engine random(2);
  for (int times = 0; times < 40; ++times) {
    const problem p = random_problem(random, 3 * this->lanes, 400);
    visibility who(p, kind::lists, random);
    score_call<T> c = call_of<T>(p, {}, who, random);
    c.forward().gradient();
    const std::int64_t kept = draw(random, 0, who.lists.view().length() - 1);
    const std::int64_t blocks = (p.far_length + who.block_rows - 1) / who.block_rows;
    score_call<T> other = c;
    for_each_row(who.lists.view(), [&](std::int64_t b, std::int64_t h, std::int64_t q) {
      if (q != kept) who.draw_list(b, h, q, blocks, random);
    });
    other.forward().gradient();
    for_each_row(c.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      if (i / who.block_queries != kept) return;
      for (std::int64_t d = 0; d < p.sizes.value_dim; ++d)
        ASSERT_TRUE(same_bits(c.out().row(b, h, i)[d], other.out().row(b, h, i)[d])) << label_of(p, who);
      for (std::int64_t d = 0; d < p.sizes.dim; ++d)
        ASSERT_TRUE(same_bits(c.memory.results[0].row(b, h, i)[d], other.memory.results[0].row(b, h, i)[d]))
            << label_of(p, who);
    });
  }
}

/// Rows that come in their order and stay are those that counts say: to the bit where either way takes a head by itself, or
/// its queries one by one.
TYPED_TEST(Selection, OfAPrefixIsCounted) {
  using T = TypeParam;
  random_engine random(3);
  static_assert(2 * 3 < detail::least_in_lanes<float>);
  const std::int64_t many = detail::larger(this->lanes, detail::most_few_queries);
  for (const std::int64_t queries : {std::int64_t{3}, many + 3, 5 * many}) {
    problem p{.entry = entry::attend,
              .sizes = {.heads = 2, .queries = queries, .keys = queries, .dim = 8, .value_dim = 5},
              .far_length = 3 * this->block + 5,
              .options = {.window = 7}};
    visibility who(p, kind::from, random);
    who.counted = false;
    for_each_row(who.from.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
      *who.from.row(b, h, j) = j * queries / p.far_length;
    });
    score_call<T> c = call_of<T>(p, {}, who, random);
    c.forward().gradient();
    score_call<T> counted = c;
    tensor<std::int64_t, 3> counts({1, 2, queries});
    for_each_row(counts.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      std::int64_t& count = *counts.row(b, h, i);
      for (count = 0; count < p.far_length && who.sees(b, h, i, count);) ++count;
    });
    counted.adjust = [&](arguments<T>& a) { a.seen = std::as_const(counts).view(); };
    counted.forward().gradient();
    EXPECT_TRUE(same_bits(c.written(), counted.written())) << label_of(p, who);
  }
}

// --------------------------------------------------------------------------------------------------------- by the rule

TYPED_TEST(Selection, IsThatOfTheTextbook) {
  using T = TypeParam;
  random_engine random(4);
  score_rules<T> rules;
  for (const kind kind : all_kinds)
    for (int times = 0; times < (kind == kind::lists ? 60 : 20); ++times) {
      problem p = random_problem(random, 2 * this->lanes + 5, times % 4 == 0 ? 3 * this->block : 80);
      const visibility who(p, kind, random, draw(random, 0, 2) == 0);
      score_terms terms{.shared = draw(random, 0, 1) == 1};
      if (times % 2 == 0) {
        p.options.softcap = draw_from(random, softcaps);
        p.options.sink_tokens = draw(random, 0, 3);
        terms.sinks = draw_from(random, all_sinks);
        terms.slopes = draw(random, 0, 2) == 0;
        terms.key_bias_heads = draw(random, 0, 2) == 0 ? p.sizes.kv_heads : 0;
        terms.far_bias_heads = draw(random, 0, 2) == 0 ? draw_divisor(random, p.sizes.heads) : 0;
      }
      score_call<T> c = call_of<T>(p, terms, who, random);
      rules.add(c, label_of(p, who));
    }
  rules.expect();
}

/// Few queries of more rows than one part has, and some of many short pieces.
TYPED_TEST(Selection, OfALongContext) {
  using T = TypeParam;
  random_engine random(5);
  score_rules<T> rules;
  for (const kind kind : {kind::evicted, kind::lists})
    for (const std::int64_t queries : {1, 3, 12}) {
      problem p{.entry = entry::attend,
                .sizes = {.heads = 4, .kv_heads = 2, .queries = queries, .keys = 12, .dim = 6, .value_dim = 4},
                .far_heads = 2,
                .far_length = 3 * detail::part_rows + 7,
                .options = {.window = 3}};
      visibility who(p, kind, random);
      for (const std::int64_t block_rows : {1, 7, 64}) {
        if (kind != kind::lists && block_rows > 1) continue;
        if (kind == kind::lists) {
          who.block_rows = block_rows, who.block_queries = 12;
          const std::int64_t blocks = p.far_length / block_rows;
          who.lists = tensor<std::int64_t>({1, 2, 1, blocks / 2});
          for_each_row(who.lists.view(), [&](std::int64_t b, std::int64_t h, std::int64_t q) {
            for (std::int64_t i = 0; i < blocks / 2; ++i) who.lists.row(b, h, q)[i] = 2 * i + draw(random, 0, 1);
          });
        }
        score_call<T> c = call_of<T>(p, {}, who, random);
        rules.add(c, label_of(p, who));
      }
    }
  rules.expect();
}

TEST(SelectionInDouble, HasTheGradientsThatItsResultsHave) {
  random_engine random(6);
  for (const kind kind : all_kinds) {
    problem p{.entry = entry::attend,
              .sizes = {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 4, .keys = 3, .dim = 2, .value_dim = 2},
              .far_heads = 1,
              .far_length = 5,
              .options = {.window = 2, .softcap = 2}};
    const visibility who(p, kind, random);
    score_call<double> c = call_of<double>(p, {.sinks = sinks::per_head, .slopes = true, .far_bias_heads = 2}, who, random);
    for (tensor<double>& operand : c.memory.operands) {
      tensor<double> plain(operand.view().extent);
      copy<double>(std::as_const(operand).view(), plain.view());
      operand = plain;
    }
    c.forward().gradient();
    for (std::size_t i = 0; i < 5; ++i)
      expect_slopes(c, c.memory.operands[i].view(), c.memory.results[i], label_of(p, who) + ", " + std::to_string(i));
    const auto textbook = c.textbook_gradient<double>();
    expect_slopes(c, with_dim(c.far_bias.numbers.view()), textbook.far_bias, label_of(p, who));
    expect_slopes(c, with_dim(c.slopes.numbers.view()), textbook.alibi_slopes, label_of(p, who));
  }
}

// ------------------------------------------------------------------------------------------------------------- NaNs

/// NaN in rows that a query does not see never reaches it; in one that it sees, it shows.
TYPED_TEST(Selection, KeepsNaNsFromThoseWhoDoNotSeeThem) {
  using T = TypeParam;
  random_engine random(7);
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  for (const kind kind : all_kinds)
    for (int times = 0; times < 20; ++times) {
      const problem p = random_problem(random, 2 * this->lanes, times % 4 == 0 ? 300 : 40);
      const visibility who(p, kind, random);
      score_call<T> c = call_of<T>(p, {}, who, random);
      for (const std::size_t i : {3u, 4u}) {  // no row is another's
        tensor<T>& operand = c.memory.operands[i];
        operand = tensor<T>(operand.view().extent).randomize(random);
      }
      c.forward().gradient();
      const auto seen_by_some = [&](std::int64_t b, std::int64_t far_head, std::int64_t j) {
        const std::int64_t sharing = p.sizes.heads / p.far_heads;
        for (std::int64_t h = far_head * sharing; h < (far_head + 1) * sharing; ++h)
          for (std::int64_t i = 0; i < p.sizes.queries; ++i)
            if (who.sees(b, h, i, j)) return true;
        return false;
      };
      score_call<T> poisoned = c;
      std::vector<std::array<std::int64_t, 3>> seen;
      for_each_row(c.memory.operands[3].view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
        if (seen_by_some(b, h, j)) return seen.push_back({b, h, j});
        std::fill_n(poisoned.memory.operands[3].row(b, h, j), p.sizes.dim, nan);
        std::fill_n(poisoned.memory.operands[4].row(b, h, j), p.sizes.value_dim, nan);
        for (std::int64_t d = 0; d < p.sizes.dim; ++d) ASSERT_EQ(c.memory.results[3].row(b, h, j)[d], 0);
      });
      poisoned.forward().gradient();
      ASSERT_TRUE(same_bits(c.written(), poisoned.written())) << label_of(p, who);
      if (seen.empty()) continue;
      const auto [b, far_head, j] = draw_from(random, seen);
      poisoned = c;
      poisoned.memory.operands[times % 2 == 0 ? 3 : 4].row(b, far_head, j)[0] = nan;
      poisoned.forward().gradient();
      const std::int64_t row = j, of = far_head, sequence = b, sharing = p.sizes.heads / p.far_heads;
      for_each_row(c.out().view(), [&](std::int64_t s, std::int64_t h, std::int64_t i) {
        const bool sees = s == sequence && h / sharing == of && who.sees(s, h, i, row);
        ASSERT_EQ(std::isnan(poisoned.out().row(s, h, i)[0]), sees) << label_of(p, who) << ", query " << i;
        ASSERT_EQ(std::isnan(poisoned.memory.results[0].row(s, h, i)[0]), sees) << label_of(p, who) << ", query " << i;
      });
    }
}

/// Values whose sum overflows have a mean.
TYPED_TEST(Selection, HasMeansOfLargeValues) {
  using T = TypeParam;
  random_engine random(12);
  const T large = std::numeric_limits<T>::max() / 2;
  for (const kind kind : {kind::unsorted, kind::lists, kind::lists, kind::lists, kind::lists, kind::lists})
    for (const std::int64_t heads : {1, 16}) {
      const problem p{.entry = entry::attend,
                      .sizes = {.heads = heads, .queries = this->lanes + 3, .keys = 0, .dim = 4, .value_dim = 3},
                      .far_length = 100,
                      .options = {}};
      const visibility who(p, kind, random);
      score_call<T> c = call_of<T>(p, {}, who, random);
      c.memory.operands[4].fill(large);
      c.forward();
      for_each_row(c.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::int64_t seen = 0;
        for (std::int64_t j = 0; j < p.far_length; ++j) seen += who.sees(b, h, i, j);
        const T got = *c.out().row(b, h, i), wanted = seen > 0 ? large : T(0);
        ASSERT_LE(std::abs(got - wanted), large / 10000) << label_of(p, who) << ", query " << i;
      });
    }
}

// ------------------------------------------------------------------------------------------------------------- bits

TYPED_TEST(Selection, IsTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(8);
  for (const kind kind : {kind::evicted, kind::lists, kind::lists, kind::lists}) {
    const problem p = random_problem(random, this->lanes + 9, 100);
    const visibility who(p, kind, random);
    score_call<T> c = call_of<T>(p, {.sinks = sinks::per_head, .far_bias_heads = 1}, who, random);
    c.forward().gradient();
    for (const auto& [name, run] : executors()) {
      score_call<T> again = c;
      again.forward(run).gradient(run);
      EXPECT_TRUE(same_bits(c.written(), again.written())) << label_of(p, who) << ", " << name;
    }
  }
}

/// Each sequence of a padded batch is as if called alone.
TYPED_TEST(Selection, OfSequencesOfTheirOwnLengths) {
  using T = TypeParam;
  random_engine random(9);
  for (int times = 0; times < 40; ++times) {
    problem p = random_problem(random, 2 * this->lanes + 9, 150);
    p.sizes.batch = 3;
    p.options.first_position = {};
    visibility who(p, times % 4 == 0 ? kind::evicted : kind::lists, random);
    std::array<std::int64_t, 3> queries{p.sizes.queries, 0, 0}, keys{}, rows{p.far_length, 0, 0}, lists{};
    for (std::size_t b = 0; b < 3; ++b) {
      if (b > 0) queries[b] = draw(random, 0, p.sizes.queries), rows[b] = draw(random, 0, p.far_length);
      keys[b] = draw(random, 0, p.sizes.keys);
      lists[b] = (queries[b] + who.block_queries - 1) / who.block_queries;
    }
    for_each_row(who.counts.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *who.counts.row(b, h, i) = std::min(*who.counts.row(b, h, i), rows[static_cast<std::size_t>(b)]);
    });
    for_each_row(who.lists.view(), [&](std::int64_t b, std::int64_t h, std::int64_t q) {
      std::int64_t* const list = who.lists.row(b, h, q);
      std::replace_if(
          list, list + who.lists.view().dim(),
          [&](std::int64_t which) { return which * who.block_rows >= rows[static_cast<std::size_t>(b)]; }, -1);
    });
    score_call<T> all = call_of<T>(p, {}, who, random);
    const auto with_lengths = [&](arguments<T> a) {
      a.operands[0].ends = a.seen.ends = queries.data();
      a.operands[1].ends = a.operands[2].ends = keys.data();
      a.operands[3].ends = a.operands[4].ends = a.visible_from.ends = a.visible_until.ends = rows.data();
      a.selected.blocks.ends = lists.data();
      for (std::size_t i = 5; i < a.operands.size(); ++i) a.operands[i].ends = queries.data();
      for (std::size_t i = 0; i < a.results.size(); ++i)
        a.results[i].ends = a.results.size() == 2 || i == 0 ? queries.data() : i < 3 ? keys.data() : rows.data();
      if (a.seen.data == nullptr) a.seen = {};
      if (a.visible_from.data == nullptr) a.visible_from = {};
      if (a.visible_until.data == nullptr) a.visible_until = {};
      if (a.selected.blocks.data == nullptr) a.selected = {};
      return a;
    };
    const auto one_of = [](const arguments<T>& a, std::int64_t b) {
      arguments<T> one = a;
      for (auto& view : one.operands) view = view.sequence(b);
      for (auto& view : one.results) view = view.sequence(b);
      for (auto* view : {&one.seen, &one.visible_from, &one.visible_until})
        if (view->data != nullptr) *view = view->sequence(b);
      if (one.selected.blocks.data != nullptr) one.selected.blocks = one.selected.blocks.sequence(b);
      return one;
    };
    score_call<T> alone = all;
    for (score_call<T>* c : {&all, &alone}) {
      arguments<T> a = c->gradient_arguments();
      a.results = {c->out().view(), c->lse().view()};
      a = with_lengths(a);
      arguments<T> grad = with_lengths(c->gradient_arguments());
      if (c == &all) {
        call(p, a, {3, thread_per_task});
        call_gradient(p, grad, {3, thread_per_task});
      }
      for (std::int64_t b = 0; b < (c == &all ? 0 : 3); ++b) {
        call(p, one_of(a, b));
        call_gradient(p, one_of(grad, b));
      }
    }
    EXPECT_TRUE(same_bits(all.written(), alone.written())) << label_of(p, who);
  }
}

// --------------------------------------------------------------------------------------------------------- refusals

/// The text of a refusal, before which nothing was written.
std::string refusal_of(const std::function<void(arguments<float>&)>& change) {
  random_engine random(10);
  const problem p{.entry = entry::attend,
                  .sizes = {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 9, .keys = 5, .dim = 3, .value_dim = 2},
                  .far_heads = 2,
                  .far_length = 20,
                  .options = {.window = 3}};
  static std::vector<std::int64_t> lists;
  lists.assign(2 * 2 * 3 * 4, -1);
  for (std::size_t i = 0; i < lists.size(); i += 4) lists[i] = 0, lists[i + 1] = 2, lists[i + 2] = 3;
  score_call<float> c(p, score_terms{}, random);
  c.adjust = [&](arguments<float>& a) {
    a.selected = {bhsd(std::as_const(lists).data(), 2, 2, 3, 4), 6, 4};
    change(a);
  };
  for (const bool backward : {false, true}) {
    std::string text = "none";
    try {
      if (backward)
        c.gradient();
      else
        c.forward();
    } catch (const std::invalid_argument& refused) {
      text = refused.what();
      for (tensor_view<float> written : c.written())
        EXPECT_TRUE(written.empty() || same_bits(*written.row(0, 0, 0), canary<float>())) << text;
    }
    if (backward || text == "none") return text;
  }
  return "";
}

TEST(SelectionRefusals, NameTheArgument) {
  static constexpr std::array<std::int64_t, 40> numbers{};
  const auto expect = [](const std::string& part, const std::function<void(arguments<float>&)>& change) {
    const std::string text = refusal_of(change);
    EXPECT_NE(text.find(part), std::string::npos) << text << " is not about " << part;
  };
  const auto entry = [](arguments<float>& a, std::int64_t i, std::int64_t block) {
    const_cast<std::int64_t*>(a.selected.blocks.row(1, 1, 2))[i] = block;
  };
  const auto rows = bhs(numbers.data(), 1, 2, 20);
  expect("none", [](arguments<float>&) {});
  expect("none", [&](arguments<float>& a) { a.selected = {}, a.visible_from = rows, a.seen = {}; });
  expect("far.seen: got extents", [](arguments<float>& a) { a.seen.extent[2] = -1; });
  expect("far.seen: got [0, 0, 0], wants", [](arguments<float>& a) { a.selected = {}, a.seen = {}; });
  expect("far.selected.blocks: got 4 at [1, 1, 2, 3], wants a block in [0, 4), or -1",
         [&](arguments<float>& a) { entry(a, 3, 4); });
  expect("far.selected.blocks: got -2 at [1, 1, 2, 0]", [&](arguments<float>& a) { entry(a, 0, -2); });
  expect("far.selected.blocks: got 2 at [1, 1, 2, 2], wants ascending", [&](arguments<float>& a) { entry(a, 2, 2); });
  expect("far.selected.blocks: got 3 at [1, 1, 2, 2], wants -1 behind", [&](arguments<float>& a) { entry(a, 1, -1); });
  expect("far.selected.block_rows: got 0, wants at least 1", [](arguments<float>& a) { a.selected.block_rows = 0; });
  expect("far.selected.block_queries: got -1", [](arguments<float>& a) { a.selected.block_queries = -1; });
  expect("far.selected.block_rows: got 6, wants 1: there are no", [](arguments<float>& a) { a.selected.blocks = {}; });
  expect("far.selected.blocks: got [2, 2, 3, 4], wants extents [2, 2, 5, 4]",
         [](arguments<float>& a) { a.selected.block_queries = 2; });
  expect("far.selected.blocks: got 3 heads, wants a divisor of the 4",
         [](arguments<float>& a) { a.selected.blocks.extent[1] = 3; });
  expect("far.selected.blocks: got strides", [](arguments<float>& a) { a.selected.blocks.stride[3] = 2; });
  expect("far.selected.blocks: got [2, 2, 3, 4], wants none", [&](arguments<float>& a) { a.visible_until = rows; });
  expect("far.visible_from: got [1, 2, 19], wants [1 or 2, 2, 20]", [](arguments<float>& a) {
    a.selected = {};
    a.visible_from = bhs(numbers.data(), 1, 2, 19);
  });
  expect("far.visible_until: got 3 heads", [](arguments<float>& a) {
    a.selected = {};
    a.visible_until = bhs(numbers.data(), 1, 3, 1);
  });
}

#if defined(CCA_TEST_UNITS)

// ----------------------------------------------------------------------------------------------------- matrix units

/// Weights are rounded to 16 bits: errors are far below 2 %, that of a row too many or too few is above.
template <class Element>
void check_unit(matrix_unit unit) {
  random_engine random(11);
  for (const kind kind : all_kinds)
    for (int times = 0; times < (unit == matrix_unit::amx ? 1 : 8); ++times) {  // AMX may be emulated
      problem p = random_problem(random, unit == matrix_unit::amx ? 30 : 150, unit == matrix_unit::amx ? 70 : 300);
      if (unit == matrix_unit::amx) p.sizes.batch = p.sizes.kv_heads = p.sizes.heads = p.far_heads = 1;
      p.options.unit = unit;
      p.sizes.dim = 32, p.sizes.value_dim = 24;
      const visibility who(p, kind, random);
      std::vector<tensor<Element>> operands;
      for (const extents& e : operand_extents(p)) operands.emplace_back(e).randomize(random, 0.5);
      tensor<float> out(result_extents(p)[0]), lse(result_extents(p)[1]);
      tensor<Element> grad_out = tensor<Element>(out.view().extent).randomize(random);
      unit_arguments<Element> a{.operands = {}, .seen = {}, .results = {out.view(), lse.view()}};
      for (const auto& t : operands) a.operands.push_back(t.view());
      who.put(a);
      call(p, a);
      std::vector<tensor<float>> grads;
      for (const extents& e : operand_extents(p)) grads.emplace_back(e);
      a.results.clear();
      for (auto& t : grads) a.results.push_back(t.view());
      a.out = out.view(), a.lse = without_dim(std::as_const(lse).view()), a.grad_out = std::as_const(grad_out).view();
      call_gradient(p, a);
      const inputs<Element> in{a.operands[0], a.operands[1], a.operands[2]};
      const far_context<Element> far_rows{a.operands[3], a.operands[4], a.seen, {}, {}, a.visible_from, a.visible_until,
                                          a.selected};
      const auto exact = reference::attend<double>(in, far_rows, p.options);
      const auto grad = reference::attend_gradient<double>(in, far_rows, incoming{a.grad_out}, p.options);
      const auto close = [&](const tensor<float>& got, const reference::tensor<double>& wanted) {
        double error = 0, size = 0;
        for_each_row(got.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          for (std::int64_t d = 0; d < got.view().dim(); ++d) {
            const double x = wanted.view().row(b, h, i)[d];
            if (std::isinf(x)) continue;
            error += std::pow(static_cast<double>(got.row(b, h, i)[d]) - x, 2);
            size += x * x;
          }
        });
        return std::sqrt(error) <= 0.02 * std::sqrt(size) + 1e-6;
      };
      EXPECT_TRUE(close(out, exact.out)) << label_of(p, who);
      EXPECT_TRUE(close(lse, exact.lse)) << label_of(p, who);
      EXPECT_TRUE(close(grads[0], grad.query)) << label_of(p, who);
      EXPECT_TRUE(close(grads[3], grad.far_key)) << label_of(p, who);
      EXPECT_TRUE(close(grads[4], grad.far_value)) << label_of(p, who);
    }
}

TEST(SelectionOfUnits, IsThatOfTheTextbook) {
  detail::matrix_units& present = detail::present_units();
  if (!present.amx_bf16 && install_amx_emulator()) present.amx_bf16 = present.amx_fp16 = true;
  for (const matrix_unit unit : {matrix_unit::none, matrix_unit::avx512_bf16, matrix_unit::amx}) {
    if (unit == matrix_unit::none || detail::has_unit<Eigen::bfloat16>(unit)) check_unit<Eigen::bfloat16>(unit);
    if (unit == matrix_unit::none || detail::has_unit<Eigen::half>(unit)) check_unit<Eigen::half>(unit);
  }
}
#endif

}}  // namespace cca::test
