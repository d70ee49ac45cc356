// Who is seen besides the window and the cores: sink tokens, a lookahead and a prefix, forward and backward, by rules that
// are spelled out token by token here, and against the textbook.

#include "executors.hpp"
#include "gradient_entry_points.hpp"
#include "textbooks.hpp"

namespace cca::test { namespace {

/// In which form a query sees a token.
enum class form { unseen, raw, core };

/// The rule in words: a query sees the prefix; of the tokens up to its lookahead the sink tokens, those of its window, and
/// behind the sink tokens those of the group that reaches into it; and groups before its window as cores.
form form_of(std::int64_t token, std::int64_t t, const options& o) {
  if (token < o.prefix) return form::raw;
  if (static_cast<long double>(token) > static_cast<long double>(t) + static_cast<long double>(o.lookahead))
    return form::unseen;
  if (token < o.sink_tokens) return form::raw;
  const std::int64_t g = std::max<std::int64_t>(o.group_size, 1), b = (token - o.sink_tokens) / g;
  const std::int64_t last_of_group = o.sink_tokens + b * g + g - 1;
  if (o.window == unlimited || last_of_group >= t + 1 - o.window) return form::raw;
  return o.group_size > 0 ? form::core : form::unseen;
}

/// Whether the query sees the token. `local` sees no cores.
bool is_seen(const problem& p, std::int64_t token, std::int64_t i) {
  const std::int64_t t = detail::first_position(p.options, p.sizes.queries, p.sizes.keys) + i;
  const form form = form_of(token, t, p.options);
  return form == form::raw || (form == form::core && p.entry == entry::attention);
}

std::string label_of(const problem& p) {
  std::ostringstream label;
  label << p;
  return label.str();
}

/// Options of all kinds for a sequence of `keys` tokens, drawn: sink tokens with groups and a window, and all three without
/// groups. Queries fit them: with groups there are as many as keys.
problem random_problem(std::int64_t keys, random_engine& random) {
  problem p{.entry = entry::attention, .sizes = {.queries = keys, .keys = keys}, .options = {}};
  options& o = p.options;
  o.window = draw(random, 0, 4) == 0 ? unlimited : draw(random, 1, keys + 2);
  o.sink_tokens = draw_from(random, std::array{std::int64_t{0}, draw(random, 0, keys + 3), unlimited});
  if (o.window != unlimited && draw(random, 0, 1) == 0) {
    o.group_size = draw(random, 1, 7);
    return p;
  }
  p.sizes.queries = draw(random, 1, keys);
  o.lookahead = draw_from(random, std::array<std::int64_t, 5>{0, 1, 3, keys, unlimited});
  o.prefix = draw_from(random, std::array{std::int64_t{0}, draw(random, 0, keys + 3), unlimited});
  if (draw(random, 0, 1) == 0) o.first_position = draw(random, -5, keys + 5);
  return p;
}

template <class T>
class Sources : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block;
};
TYPED_TEST_SUITE(Sources, precisions);

// ------------------------------------------------------------------------------------------------- who sees what

/// Queries of zeros give every token and every core the same weight: with the identity for values output j is the share of
/// token j, and the log-sum-exp counts the entries of the softmax. Returns what differs from the rule.
template <class T>
std::string difference(problem p) {
  p.sizes.value_dim = p.sizes.keys;
  random_engine random(1);
  argument_memory<T> memory(p);
  memory.randomize(random);
  memory.operands[0].fill(0);
  memory.operands[2].fill(0);
  for (std::int64_t j = 0; j < p.sizes.keys; ++j) memory.operands[2].row(0, 0, j)[j] = 1;
  call(p, memory.arguments());
  std::ostringstream text;
  for (std::int64_t i = 0; i < p.sizes.queries; ++i) {
    const std::int64_t t = detail::first_position(p.options, p.sizes.queries, p.sizes.keys) + i;
    const auto group_size = static_cast<double>(p.options.group_size);
    std::vector<double> weights;
    double entries = 0;
    for (std::int64_t j = 0; j < p.sizes.keys; ++j) {
      const form form = form_of(j, t, p.options);
      weights.push_back(form == form::raw ? 1 : form == form::core && p.entry == entry::attention ? 1 / group_size : 0);
      entries += weights.back();
    }
    const auto got = static_cast<double>(std::exp(*memory.results[1].row(0, 0, i)));
    if (!(std::abs(got - entries) <= 1e-4 * (1 + entries)))
      text << "query " << i << " sees " << got << " entries, not " << entries << "\n";
    for (std::int64_t j = 0; j < p.sizes.keys; ++j) {
      const auto share = static_cast<double>(memory.results[0].row(0, 0, i)[j]);
      const double wanted = entries == 0 ? 0 : weights[static_cast<std::size_t>(j)] / entries;
      if (!(std::abs(share - wanted) <= 1e-5) || (wanted == 0 && share != 0))
        text << "query " << i << " has " << share << " of token " << j << ", not " << wanted << "\n";
    }
  }
  return text.str();
}

TYPED_TEST(Sources, AreSeenByTheRule) {
  const std::int64_t keys = 9;
  for (const std::int64_t queries : {keys, keys - 4})
    for (const std::int64_t g : {0, 1, 2, 3})
      for (const std::int64_t s : {std::int64_t{1}, std::int64_t{2}, std::int64_t{5}, keys, unlimited})
        for (const std::int64_t m : {0, 1, 2, 5, 11})
          for (const std::int64_t ahead : {std::int64_t{0}, std::int64_t{2}, unlimited})
            for (const std::int64_t prefix : {0, 3, 20}) {
              const bool groups = g > 0 && s != unlimited;
              if ((g > 1 && s == unlimited) || (groups && (queries < keys || ahead > 0 || prefix > 0))) continue;
              problem p{.entry = entry::attention, .sizes = {.queries = queries, .keys = keys}, .options = {}};
              p.options = {.group_size = g, .window = s, .sink_tokens = m, .lookahead = ahead, .prefix = prefix};
              if (g > 0 && queries < keys) continue;
              ASSERT_EQ(difference<TypeParam>(p), "") << p;
              p.entry = entry::local;
              ASSERT_EQ(difference<TypeParam>(p), "") << p;
            }
}

TYPED_TEST(Sources, OfAnyLengthAreSeenByTheRule) {
  random_engine random(2);
  for (const std::int64_t keys : {std::int64_t{1}, std::int64_t{4}, std::int64_t{8}, std::int64_t{9}, this->lanes - 1,
                                  this->lanes + 3, 2 * this->lanes + 5, this->block - 1, this->block, this->block + 7})
    for (int times = 0; times < 25; ++times) {
      problem p = random_problem(keys, random);
      ASSERT_EQ(difference<TypeParam>(p), "") << p;
      p.entry = entry::local;
      ASSERT_EQ(difference<TypeParam>(p), "") << p;
    }
}

/// Nothing overflows, wherever the queries are.
TYPED_TEST(Sources, PositionsMayBeAsLargeAsTheyGet) {
  constexpr std::int64_t edge = std::int64_t{1} << 62;
  for (const std::int64_t queries : {2, 40})
    for (const std::int64_t position : {-edge, -edge / 2, edge / 2, edge - 40, edge})
      for (const options& options : {cca::options{.lookahead = unlimited},
                                     {.lookahead = 5},
                                     {.prefix = 3},
                                     {.window = 4, .sink_tokens = 2},
                                     {.window = unlimited - 1, .sink_tokens = unlimited, .prefix = unlimited},
                                     {.window = 1, .sink_tokens = 7, .lookahead = unlimited - 1, .prefix = 2}}) {
        problem p{.entry = entry::attention, .sizes = {.queries = queries, .keys = 40}, .options = options};
        p.options.first_position = position;
        EXPECT_EQ(difference<TypeParam>(p), "") << p;
      }
}

// --------------------------------------------------------------------------------------------------------- by the rule

/// Judges results and all gradients of calls, in a workspace of the size that is asked for.
template <class T>
class judge {
 public:
  void add(const problem& p, random_engine& random) {
    gradient_memory<T> memory(
        p, [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); });
    memory.randomize(random);
    const std::string label = label_of(p);
    arguments<T> a = memory.arguments();
    std::vector<std::byte> workspace(gradient_workspace_size(p, a));
    call_gradient(p, a, {}, workspace);
    EXPECT_TRUE(memory.canaries_intact()) << label;
    const auto plain = textbook_gradient<T>(p, a);
    const auto exact = textbook_gradient<exact_type<T>>(p, a);
    for (std::size_t i = 0; i < plain.size(); ++i)
      rule_[2 + i].add(std::as_const(memory.results[i]).view(), plain[i].view(), exact[i].view(), label);

    argument_memory<T> forward(p);
    arguments<T> f = forward.arguments();
    f.operands.assign(a.operands.begin(), a.operands.begin() + std::ssize(f.operands));
    f.seen = a.seen;
    workspace.resize(workspace_size(p, f));
    call(p, f, {}, workspace);
    const auto plain_results = textbook_forward<T>(p, f.operands, f.seen);
    const auto exact_results = textbook_forward<exact_type<T>>(p, f.operands, f.seen);
    for (std::size_t i = 0; i < 2; ++i)
      rule_[i].add(std::as_const(forward.results[i]).view(), plain_results[i].view(), exact_results[i].view(), label);
    used_ = std::max(used_, 2 + plain.size());
  }

  void expect() const {
    for (std::size_t i = 0; i < used_; ++i) EXPECT_TRUE(rule_[i].holds()) << "result " << i;
  }

 private:
  std::array<error_rule<T>, 7> rule_;
  std::size_t used_ = 0;
};

TYPED_TEST(Sources, AreThoseOfTheTextbook) {
  random_engine random(3);
  for (const entry entry : {entry::local, entry::attention, entry::attend, entry::pool}) {
    judge<TypeParam> judge;
    for (const std::int64_t keys :
         {std::int64_t{3}, std::int64_t{8}, std::int64_t{20}, this->lanes + 1, 2 * this->lanes + 7, this->block + 11})
      for (int times = 0; times < 12; ++times) {
        const problem drawn = random_problem(keys, random);
        if (entry == entry::pool && drawn.options.group_size == 0) continue;
        problem p = example(entry, {.batch = 2,
                                    .heads = 4,
                                    .kv_heads = 2,
                                    .queries = drawn.sizes.queries,
                                    .keys = keys,
                                    .dim = 5,
                                    .value_dim = 3});
        p.options = drawn.options;
        if (entry == entry::pool) p.options.window = unlimited;
        p.options.softmax_scale = 0.4;
        if (drawn.options.group_size > 0 && (entry == entry::attention || entry == entry::pool)) {
          p.options.core_heads = draw_from(random, all_core_heads);
        }
        judge.add(p, random);
      }
    judge.expect();
  }
}

/// Few queries after many sink tokens: a source that is cut into parts of its own.
TYPED_TEST(Sources, MayBeLong) {
  random_engine random(4);
  judge<TypeParam> judge;
  for (const std::int64_t queries : {3, 20}) {
    problem p{.entry = entry::attention,
              .sizes = {.heads = 2, .kv_heads = 1, .queries = queries, .keys = 3 * detail::part_rows, .dim = 4},
              .options = {.window = 5}};
    for (const std::int64_t count : {detail::part_rows + 1, 2 * detail::part_rows + 9, 4 * detail::part_rows}) {
      p.options.sink_tokens = count;
      p.options.prefix = 0;
      judge.add(p, random);
      std::swap(p.options.sink_tokens, p.options.prefix);
      judge.add(p, random);
    }
  }
  judge.expect();
}

// ------------------------------------------------------------------------------------------------------------- identities

/// The results of a call whose operands are drawn from the same numbers whatever the options.
template <class T>
argument_memory<T> run(const problem& p) {
  random_engine random(5);
  argument_memory<T> memory(p);
  memory.randomize(random);
  call(p, memory.arguments());
  return memory;
}

/// Groups of one, a window that holds everything, and lengths below a window and a group behind the sink tokens: plain
/// causal attention. So are sink tokens without a window.
TYPED_TEST(Sources, WithoutAnythingPooledAreDense) {
  using T = TypeParam;
  for (const std::int64_t keys : {std::int64_t{7}, std::int64_t{40}, this->block + 5})
    for (const std::int64_t m : {std::int64_t{1}, std::int64_t{4}, keys + 1})
      for (const options& options : {cca::options{.group_size = 1, .window = 2, .sink_tokens = m},
                                     {.group_size = 3, .window = keys, .sink_tokens = m},
                                     {.window = keys, .sink_tokens = m},
                                     {.group_size = keys, .window = 1, .sink_tokens = m},
                                     {.sink_tokens = m}}) {
        const sizes s{.heads = 2, .queries = keys, .keys = keys, .dim = 4, .value_dim = 3};
        const argument_memory<T> got = run<T>({.entry = entry::attention, .sizes = s, .options = options});
        const problem dense{.entry = entry::dense, .sizes = s, .options = {}};
        const std::vector<tensor_view<const T>> in{got.operands[0].view(), got.operands[1].view(),
                                                   got.operands[2].view()};
        const auto plain = textbook_forward<T>(dense, in, {});
        const auto exact = textbook_forward<exact_type<T>>(dense, in, {});
        for (std::size_t i = 0; i < 2; ++i) {
          error_rule<T> rule;
          rule.add(got.results[i].view(), plain[i].view(), exact[i].view(), describe(options));
          EXPECT_TRUE(rule.holds()) << describe(options) << ", keys " << keys;
        }
      }
}

/// Everything seen is what queries behind the last key see, to the bit.
TYPED_TEST(Sources, WithAnUnlimitedLookaheadAreBidirectional) {
  for (const std::int64_t queries : {3, 50}) {
    const sizes s{.heads = 2, .queries = queries, .keys = 50, .dim = 4, .value_dim = 3};
    const auto of = [&](const options& options) {
      return run<TypeParam>({.entry = entry::dense, .sizes = s, .options = options});
    };
    const auto last = of({.first_position = 49});
    for (const options& options : {cca::options{.lookahead = unlimited},
                                   {.lookahead = 49},
                                   {.lookahead = unlimited, .first_position = -(std::int64_t{1} << 61)}}) {
      const auto all = of(options);
      for (std::size_t i = 0; i < 2; ++i)
        EXPECT_TRUE(same_bits(all.results[i].view(), last.results[i].view())) << describe(options);
    }
  }
}

// ------------------------------------------------------------------------------------- what is not seen leaves no trace

/// Problems of all options, of queries few and many.
template <class F>
void for_problems(std::uint64_t seed, std::int64_t lanes, const F& f) {
  random_engine random(seed);
  for (const std::int64_t keys : {std::int64_t{6}, std::int64_t{21}, lanes + 9})
    for (int times = 0; times < 12; ++times) {
      problem p = random_problem(keys, random);
      if (p.options.group_size == 0 && times % 3 == 0) p.entry = entry::local;
      p.sizes.dim = 4;
      p.sizes.value_dim = 3;
      f(p, random);
    }
}

/// A NaN shows in the queries that see its token, and no bit of the others changes. Inside the sink tokens, too.
TYPED_TEST(Sources, NaNsShowExactlyWhereTheyAreSeen) {
  using T = TypeParam;
  for_problems(6, this->lanes, [](const problem& p, random_engine& random) {
    const argument_memory<T> clean = run<T>(p);
    for (int times = 0; times < 8; ++times) {
      const std::int64_t token = draw(random, 0, p.sizes.keys - 1);
      argument_memory<T> memory = clean;
      const std::size_t operand = 1 + static_cast<std::size_t>(times % 2);
      std::fill_n(memory.operands[operand].row(0, 0, token), memory.operands[operand].view().dim(),
                  std::numeric_limits<T>::quiet_NaN());
      call(p, memory.arguments());
      for (std::int64_t i = 0; i < p.sizes.queries; ++i)
        for (std::int64_t d = 0; d < 3; ++d) {
          const T got = memory.results[0].row(0, 0, i)[d];
          if (is_seen(p, token, i))
            ASSERT_TRUE(std::isnan(got)) << p << ": query " << i << ", token " << token;
          else
            ASSERT_TRUE(same_bits(got, clean.results[0].row(0, 0, i)[d]))
                << p << ": query " << i << ", token " << token;
        }
    }
  });
}

/// The output of one query alone: the tokens that it does not see have gradients of exactly 0, the others of their values
/// have some.
TYPED_TEST(Sources, GradientsGoToWhatIsSeen) {
  using T = TypeParam;
  for_problems(7, this->lanes, [](const problem& p, random_engine& random) {
    const gradient_memory<T> whole = gradient_memory<T>(p).randomize(random);
    for (int times = 0; times < 6; ++times) {
      const std::int64_t query = draw(random, 0, p.sizes.queries - 1);
      gradient_memory<T> memory = whole;
      for (const std::size_t incoming : {memory.operands.size() - 2, memory.operands.size() - 1})
        for_each_row(memory.operands[incoming].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          if (i != query)
            std::fill_n(memory.operands[incoming].row(b, h, i), memory.operands[incoming].view().dim(), T(0));
        });
      memory.gradient();
      for (std::int64_t j = 0; j < p.sizes.keys; ++j) {
        const T *key = memory.results[1].row(0, 0, j), *value = memory.results[2].row(0, 0, j);
        const auto zero = [](T x) { return x == 0; };
        if (is_seen(p, j, query))
          ASSERT_FALSE(std::all_of(value, value + 3, zero)) << p << ": query " << query << ", token " << j;
        else
          ASSERT_TRUE(std::all_of(value, value + 3, zero) && std::all_of(key, key + 4, zero))
              << p << ": query " << query << ", token " << j;
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------------------- executors

/// Two sources add to the same keys and values: turns keep the order of the sums.
TYPED_TEST(Sources, AreTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(8);
  for (const options& options : {cca::options{.group_size = 3, .window = 9, .sink_tokens = 70},
                                 {.window = 9, .sink_tokens = 5},
                                 {.window = 20, .sink_tokens = 100, .lookahead = 60},
                                 {.window = 9, .sink_tokens = 30, .prefix = 80}}) {
    const problem p{
        .entry = entry::attention,
        .sizes = {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 150, .keys = 150, .dim = 4, .value_dim = 3},
        .options = options};
    const gradient_memory<T> fresh = gradient_memory<T>(p).randomize(random);
    gradient_memory<T> serial = fresh;
    serial.gradient();
    const argument_memory<T> forward = run<T>(p);
    for (const named_executor& executor : executors()) {
      gradient_memory<T> memory = fresh;
      memory.gradient(executor.run);
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(same_bits(memory.results[i].view(), serial.results[i].view())) << executor.name << ", " << p;
      argument_memory<T> again = forward;
      call(p, again.arguments(), executor.run);
      EXPECT_TRUE(same_bits(again.results[0].view(), forward.results[0].view())) << executor.name << ", " << p;
    }
  }
}

}}  // namespace cca::test
