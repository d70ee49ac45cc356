// The ends of the number range: finite operands whose results are numbers give those numbers, whatever their size; a logit
// of -inf is masked; and no finite operand raises a floating-point exception that means a mistake.

#include "gradient_entry_points.hpp"
#include "kv_cache_life.hpp"
#include "score_calls.hpp"
#include "textbooks.hpp"
#if defined(CCA_TEST_UNITS)
#include "unit_entry_points.hpp"
#endif

// After support.hpp, which has a say in how Eigen is compiled.
#include <cfenv>
#include <cstdlib>
#include <stdexcept>

namespace cca::test { namespace {

template <class T>
constexpr T largest = std::numeric_limits<T>::max() * T(0.99);
/// Among the denormal numbers, with a few bits.
template <class T>
constexpr T tiny = std::numeric_limits<T>::denorm_min() * T(60000);
template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
class Range : public testing::Test {};
TYPED_TEST_SUITE(Range, precisions);

bool pools(entry entry) { return entry == entry::pool || entry == entry::attention; }

/// Few queries and many; contexts of a row, of some, of several blocks, and such as are cut into splits; groups shorter and
/// longer than the rows that are taken at once.
std::vector<problem> problems(entry entry) {
  const std::array<sizes, 5> all_sizes{
      {{.queries = 1, .keys = 1, .dim = 3, .value_dim = 3},
       {.queries = 3, .keys = 40, .dim = 5, .value_dim = 6},
       {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 20, .keys = 20, .dim = 9, .value_dim = 7},
       {.queries = 300, .keys = 300, .dim = 6, .value_dim = 6},
       {.heads = 2, .queries = 2, .keys = 5000, .dim = 6, .value_dim = 6}}};
  std::vector<problem> all;
  for (const sizes& s : all_sizes) {
    if (pools(entry) && s.keys > 1000) continue;
    all.push_back(example(entry, s));
    if (entry == entry::attend || entry == entry::local) {
      all.push_back(all.back());
      all.back().options.window = s.keys;
    }
  }
  for (const std::int64_t g : {2, 31, 40, 200, 1000})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads) {
        const bool paper = pool == pooling::last_query && cores == core_heads::per_query_head;
        if (!pools(entry) || (entry == entry::attention && (g == 1000 || (g > 2 && !paper)))) continue;
        problem p = example(entry, {.heads = 2, .kv_heads = 1, .keys = 2 * g + 1, .dim = 6, .value_dim = 6});
        p.options.group_size = g;
        p.options.pool = pool;
        p.options.core_heads = cores;
        if (entry == entry::pool) p.options.window = pool_window(pool, 40);
        all.push_back(p);
      }
  return all;
}

// ------------------------------------------------------------------------------------------------- what numbers

/// Whether `f(b, h, i)` holds for every row of a view.
template <class View, class F>
bool all_rows(const View& view, const F& f) {
  bool all = true;
  for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) { all = all && f(b, h, i); });
  return all;
}

/// How the numbers of rows are spoilt. Those of one dim in three may differ from the others.
enum class numbers { large, alternating, one_large, large_dim, tiny, tiny_dim, large_and_tiny_dims };
constexpr std::array all_numbers{numbers::large, numbers::alternating, numbers::one_large,          numbers::large_dim,
                                 numbers::tiny,  numbers::tiny_dim,    numbers::large_and_tiny_dims};

/// `most` is what is large.
template <class T>
void spoil(tensor<T>& t, numbers kind, T most = largest<T>) {
  for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < t.view().dim(); ++d) {
      T& x = t.row(b, h, i)[d];
      const T large = most / (1 + std::abs(x) / 32), small = x * tiny<T>;
      const bool of_dim = d % 3 == 0;
      switch (kind) {
        case numbers::large:
          x = large;
          break;
        case numbers::alternating:
          x = (i + d) % 2 == 0 ? large : -large;
          break;
        case numbers::one_large:
          if (i == t.view().length() / 2) x = large;
          break;
        case numbers::large_dim:
          if (of_dim) x = large;
          break;
        case numbers::tiny:
          x = small;
          break;
        case numbers::tiny_dim:
          if (of_dim) x = small;
          break;
        case numbers::large_and_tiny_dims:
          x = of_dim ? large : d % 3 == 1 ? small : x;
      }
    }
  });
}

template <class T>
void times(tensor<T>& t, T factor) {
  for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < t.view().dim(); ++d) t.row(b, h, i)[d] *= factor;
  });
}

template <class T>
tensor_view<T> column(tensor_view<T> view, std::int64_t d) {
  if (view.data != nullptr) view.data += d;  // an empty tensor has no memory
  view.extent[3] = 1;
  return view;
}

/// The error rule of each dim in three by itself: large numbers in one leave no room to the others.
template <class T>
class column_rules {
 public:
  template <class Textbook, class Exact>
  void add(tensor_view<const T> kernel, const reference::tensor<Textbook>& textbook,
           const reference::tensor<Exact>& exact, const std::string& label) {
    for (std::int64_t d = 0; d < exact.extent[3]; ++d)
      rules_[static_cast<std::size_t>(d % 3)].add(column(kernel, d), column(textbook.view(), d),
                                                  column(exact.view(), d), label);
    used_ = std::max(used_, exact.extent[3]);
  }

  void expect(const std::string& label) const {
    for (std::int64_t d = 0; d < std::min<std::int64_t>(used_, 3); ++d)
      EXPECT_TRUE(rules_[static_cast<std::size_t>(d)].holds()) << label << ", dims " << d << " mod 3";
  }

 private:
  std::array<error_rule<T>, 3> rules_;
  std::int64_t used_ = 0;
};

template <class T>
std::string name(const T& x) {
  std::ostringstream text;
  text << x;
  return text.str();
}
std::string name(entry entry, numbers kind) { return name(entry) + ", numbers " + name(static_cast<int>(kind)); }

/// Rules of all results of calls.
template <class T>
struct result_rules {
  std::array<column_rules<T>, 5> of;
  std::size_t used = 0;

  template <class Textbook, class Exact>
  void add(const std::vector<tensor_view<T>>& got, const Textbook& textbook, const Exact& exact,
           const std::string& label) {
    for (std::size_t i = 0; i < exact.size(); ++i) of[i].add(got[i], textbook[i], exact[i], label);
    used = std::max(used, exact.size());
  }

  void expect(const std::string& label) const {
    for (std::size_t i = 0; i < used; ++i) of[i].expect(label + ", result " + std::to_string(i));
  }
};

/// Calls an entry point, and adds its results to the rules.
template <class T>
void add_call(const problem& p, argument_memory<T>& memory, result_rules<T>& rules) {
  const arguments<T> a = memory.arguments();
  call(p, a);
  rules.add(a.results, textbook_forward<T>(p, a.operands, a.seen),
            textbook_forward<exact_type<T>>(p, a.operands, a.seen), name(p));
}

/// Calls the gradient for the textbook's output and log-sum-exps.
template <class T>
void add_gradient(gradient_memory<T>& memory, result_rules<T>& rules) {
  const std::size_t first = memory.forward_operands();
  if (memory.problem.entry != entry::pool) {
    arguments<T> of_forward = memory.arguments();
    of_forward.operands.resize(first);
    const auto results = textbook_forward<T>(memory.problem, of_forward.operands, of_forward.seen);
    for (std::size_t i = 0; i < 2; ++i) copy<T>(results[i].view(), memory.operands[first + i].view());
  }
  const arguments<T> a = memory.gradient().arguments();
  rules.add(a.results, textbook_gradient<T>(memory.problem, a), textbook_gradient<exact_type<T>>(memory.problem, a),
            name(memory.problem));
}

/// The operands whose means are taken: values, or the outputs that are merged.
std::vector<std::size_t> value_operands(entry entry) {
  if (entry == entry::merge) return {0, 2};
  if (entry == entry::attend) return {2, 4};
  return {2};
}

// ------------------------------------------------------------------------------------------- means of any numbers

TYPED_TEST(Range, MeansOfValues) {
  using T = TypeParam;
  random_engine random(1);
  for (const entry entry : all_entries)
    for (const numbers kind : all_numbers) {
      result_rules<T> rules;
      for (const problem& p : problems(entry)) {
        argument_memory<T> memory = argument_memory<T>(p).randomize(random);
        for (const std::size_t i : value_operands(entry)) spoil(memory.operands[i], kind);
        add_call(p, memory, rules);
      }
      rules.expect(name(entry, kind));
    }
}

/// Where the sum of one query's values overflows it is taken again, held back, and so is that of all queries beside it. Those
/// keep what they had, to the bit: tiny values would lose theirs. What was held back has its share of a sum with a sink.
TYPED_TEST(Range, MeansBesideOneThatOverflows) {
  using T = TypeParam;
  random_engine random(12);
  tensor<T, 3> sinks({1, 2, 1});
  sinks.fill(T(0.5));
  for (const std::int64_t length : {6, 40, 100})
    for (const bool with_sinks : {false, true}) {
      SCOPED_TRACE(testing::Message() << "length " << length << ", sinks " << with_sinks);
      const problem p =
          example(entry::dense, {.heads = 2, .queries = length, .keys = length, .dim = 4, .value_dim = 5});
      argument_memory<T> memory = argument_memory<T>(p).randomize(random);
      memory.operands[1].fill(T(1));  // of one query all weigh the same
      times(memory.operands[2], std::numeric_limits<T>::min() * 1000);
      argument_memory<T> overflows = memory;
      for (std::int64_t h = 0; h < p.sizes.kv_heads; ++h)
        for (std::int64_t t : {length - 2, length - 1})
          for (std::int64_t d = 0; d < 5; ++d) overflows.operands[2].row(0, h, t)[d] = largest<T>;
      for (argument_memory<T>* of : {&memory, &overflows}) {
        arguments<T> a = of->arguments();
        if (with_sinks) a.sinks = std::as_const(sinks).view();
        call(p, a);
      }
      EXPECT_TRUE(same_bits(memory.results[1].view(), overflows.results[1].view()));
      for_each_row(memory.results[0].view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        const double lse = static_cast<double>(*overflows.results[1].row(b, h, t));
        const double seen = with_sinks ? 1 - std::exp(0.5 - lse) : 1.0;  // the share of all but the sink
        for (std::int64_t d = 0; d < 5; ++d) {
          const T x = overflows.results[0].row(b, h, t)[d];
          if (t < length - 2) {
            EXPECT_TRUE(same_bits(x, memory.results[0].row(b, h, t)[d])) << t;
          } else {
            EXPECT_NEAR(static_cast<double>(x / largest<T>),
                        static_cast<double>(t - length + 3) * seen / static_cast<double>(t + 1), 1e-5)
                << t;
          }
        }
      });
    }
}

/// Keys are means, too, where groups are pooled: of equal weights, whatever the keys, and of unequal ones.
TYPED_TEST(Range, MeansOfKeys) {
  using T = TypeParam;
  random_engine random(2);
  for (const entry entry : {entry::pool, entry::attention})
    for (const numbers kind : all_numbers)
      for (const bool weighed : {false, true}) {
        result_rules<T> rules;
        for (const problem& p : problems(entry)) {
          argument_memory<T> memory = argument_memory<T>(p).randomize(random);
          spoil(memory.operands[1], kind, weighed ? largest<T> / 64 : largest<T>);
          const bool tiny_ones = kind == numbers::tiny || kind == numbers::tiny_dim;
          times(memory.operands[0], weighed ? tiny_ones ? T(1) : 64 / largest<T> : T(0));
          add_call(p, memory, rules);
        }
        rules.expect(name(entry, kind) + (weighed ? ", weighed" : ", not weighed"));
      }
}

/// Prompts, chunks, and single tokens of a cache, with groups that are pooled from one step or from many.
TYPED_TEST(Range, MeansInACache) {
  using T = TypeParam;
  random_engine random(3);
  for (const std::int64_t group_size : {3, 40})
    for (const pooling pool : all_poolings)
      for (const numbers kind : all_numbers) {
        const cache_setup setup = example_cache({.group_size = group_size, .window = 9, .pool = pool});
        auto cache = setup.make<T>();
        operands<T> tokens = random_tokens<T>(setup, 1, 150, random);
        spoil(tokens.value, kind);
        result_rules<T> rules;
        std::int64_t length = 0;
        for (const std::int64_t count : {1, 2, 70, 1, 9, 1, 30, 1, 1}) {
          const results<T> got = attend(cache, tokens_of(tokens, {length, length + count}));
          length += count;
          const auto textbook = cca::test::textbook(tokens_of(tokens, {0, length}), count, setup.options);
          const auto plain = textbook.template operator()<T>();
          const auto exact = textbook.template operator()<exact_type<T>>();
          rules.of[0].add(got.out.view(), plain.out, exact.out, "length " + std::to_string(length));
          rules.of[1].add(with_dim(got.lse.view()), plain.lse, exact.lse, "length " + std::to_string(length));
          rules.used = 2;
        }
        rules.expect(describe(setup) + ", numbers " + name(static_cast<int>(kind)));
      }
}

/// Gradients that are numbers, of values and of incoming gradients that are large or tiny.
TYPED_TEST(Range, Gradients) {
  using T = TypeParam;
  random_engine random(4);
  for (const entry entry : gradient_entries)
    for (const numbers kind : all_numbers)
      for (const bool of_values : {true, false}) {
        const bool has_large = kind != numbers::tiny && kind != numbers::tiny_dim;
        // Their product is about 1, and so is the sum of large gradients over many queries a number.
        const T most = largest<T> / (of_values ? 64 : 4096), other = has_large ? 1 / most : T(1);
        result_rules<T> rules;
        for (const problem& p : problems(entry)) {
          if (p.sizes.keys > 1000) continue;
          gradient_memory<T> memory(p);
          memory.randomize(random);
          std::vector<std::size_t> values = value_operands(entry), incoming{memory.operands.size() - 2};
          if (entry == entry::pool) incoming = {3, 4};
          for (const std::size_t i : of_values ? values : incoming) spoil(memory.operands[i], kind, most);
          for (const std::size_t i : of_values ? incoming : values) times(memory.operands[i], other);
          // With keys of their usual size the gradient of a core's key would be as large as that of its value.
          if (entry == entry::pool && !of_values) times(memory.operands[1], other);
          add_gradient(memory, rules);
        }
        rules.expect(name(entry, kind) + (of_values ? ", values" : ", incoming"));
      }
}

// -------------------------------------------------------------------------------------------------------- scales

bool names_the_scale(const std::invalid_argument& refusal) {
  return std::string(refusal.what()).find("softmax_scale") != std::string::npos;
}

/// Scales up to the largest number: right, or refused by name where the scale itself is beyond what is computed in.
TYPED_TEST(Range, LargeScales) {
  using T = TypeParam;
  random_engine random(5);
  constexpr T max = std::numeric_limits<T>::max();
  for (const entry entry : gradient_entries)
    for (const T scale : {max / T(1e8), max / T(1.5), max / T(1.44), max, -max}) {
      result_rules<T> forward, backward;
      for (problem p : problems(entry))
        for (const bool zeros : {true, false}) {
          if (p.options.pool != pooling::last_query || p.sizes.keys > 1000) continue;
          p.options.softmax_scale = static_cast<double>(scale);
          argument_memory<T> memory = argument_memory<T>(p).randomize(random);
          gradient_memory<T> gradient(p);
          const auto right_or_refused = [&](const auto& f) {
            try {
              f();
            } catch (const std::invalid_argument& refusal) {
              EXPECT_TRUE(names_the_scale(refusal)) << refusal.what();
              EXPECT_GT(std::abs(scale), max / std::numbers::log2e_v<T>) << "a scale that is no trouble is refused";
            }
          };
          right_or_refused([&] { gradient.randomize(random); });
          // Logits are 0, or about 1.
          const T of_query = zeros ? T(0) : 1 / std::sqrt(std::abs(scale));
          for (tensor<T>* t : {&memory.operands[0], &gradient.operands[0]}) times(*t, of_query);
          for (auto* operands : {&memory.operands, &gradient.operands})
            for (const std::size_t i : {std::size_t{1}, std::size_t{3}})
              if (i == 1 || entry == entry::attend) times((*operands)[i], 1 / std::sqrt(std::abs(scale)));
          right_or_refused([&] { add_call(p, memory, forward); });
          right_or_refused([&] {
            // Gradients of queries and keys are as large as the scale.
            times(gradient.operands[gradient.operands.size() - 2], 1 / std::sqrt(std::abs(scale)));
            gradient.operands.back().fill(0);
            if (entry != entry::pool) add_gradient(gradient, backward);
          });
        }
      forward.expect(name(entry) + ", scale " + name(scale));
      backward.expect(name(entry) + ", gradient, scale " + name(scale));
    }
}

TYPED_TEST(Range, LargeScalesOfACache) {
  using T = TypeParam;
  random_engine random(6);
  constexpr T max = std::numeric_limits<T>::max();
  for (const T scale : {max / T(1e8), max / T(1.44), max}) {
    cache_setup setup = example_cache({.group_size = 4, .window = 6, .softmax_scale = static_cast<double>(scale)});
    operands<T> tokens = random_tokens<T>(setup, 1, 60, random);
    times(tokens.query, 1 / std::sqrt(scale));
    times(tokens.key, 1 / std::sqrt(scale));
    try {
      auto cache = setup.make<T>();
      for (const range part : {range{0, 50}, range{50, 51}, range{51, 60}}) {
        attention_rule<T> rule;
        rule.add(attend(cache, tokens_of(tokens, part)),
                 textbook(tokens_of(tokens, {0, part.end}), part.size(), setup.options));
        EXPECT_TRUE(rule.holds()) << scale;
      }
    } catch (const std::invalid_argument& refusal) {
      EXPECT_TRUE(names_the_scale(refusal)) << refusal.what();
      EXPECT_GT(scale, max / std::numbers::log2e_v<T>) << "a scale that is no trouble is refused";
    }
  }
}

/// Queries and keys as powers of two times ordinary numbers, and a scale that makes ordinary logits of them.
struct product_case {
  const char* what;
  int query, key, scale;  // exponents
  std::int64_t dim;
  bool aligned;  // products of one sign
  bool sums;     // whether the sum `q . k` is a number
};

template <class T>
std::vector<product_case> product_cases() {
  constexpr int e = std::numeric_limits<T>::max_exponent;
  constexpr int least = std::numeric_limits<T>::min_exponent - std::numeric_limits<T>::digits;  // below all but 0
  return {{"scale * q overflows", e - 4, -e, 5, 6, false, true},
          {"scale * log2(e) * q overflows", e, -e + 2, 0, 1, true, true},
          {"scale * q is denormal", -e + 18, e - 3, least + 2 + e - 18, 2048, false, true},
          {"q . k overflows", e / 2 + 1, e / 2 + 1, -e + 2, 6, false, false}};
}

/// Where scale * (q . k) is an ordinary number, it does not matter in which order one would compute it.
TYPED_TEST(Range, ProductsInAnyOrder) {
  using T = TypeParam;
  using Exact = exact_type<T>;
  random_engine random(7);
  for (const product_case& c : product_cases<T>())
    for (const entry entry : gradient_entries) {
      result_rules<T> forward, backward;
      for (problem p : problems(entry)) {
        if (p.options.pool != pooling::last_query || p.sizes.keys * c.dim > 200000) continue;
        p.sizes.dim = c.dim;
        p.options.softmax_scale = std::ldexp(1.0, c.scale);
        gradient_memory<T> memory(p);
        memory.randomize(random);
        for (std::size_t i = 0; i < memory.forward_operands(); ++i) {
          if (i == 2 || i == 4) continue;
          const int exponent = i == 0 ? c.query : c.key;
          for_each_row(memory.operands[i].view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
            for (std::int64_t d = 0; d < c.dim; ++d) {
              T& x = memory.operands[i].row(b, h, t)[d];
              // Below 1, where exponents are near the largest.
              if (c.aligned) x = 1 - std::min(std::abs(x), T(4)) / 8;
              x = std::ldexp(x, exponent);
            }
          });
        }
        arguments<T> a = memory.arguments();
        a.operands.resize(memory.forward_operands());
        argument_memory<T> plain(p);
        a.results = plain.arguments().results;
        call(p, a);
        // The textbook sums first. Where it cannot, it takes the same problem in ordinary numbers.
        problem same = p;
        gradient_memory<T> ordinary = memory;
        if (!c.sums) {
          for (std::size_t i = 0; i < memory.forward_operands(); ++i)
            if (i != 2 && i != 4) times(ordinary.operands[i], std::ldexp(T(1), i == 0 ? -c.query : -c.key));
          same.options.softmax_scale = std::ldexp(1.0, c.scale + c.query + c.key);
        }
        arguments<T> b = ordinary.arguments();
        b.operands.resize(memory.forward_operands());
        auto textbook = textbook_forward<T>(same, b.operands, b.seen);
        if (!c.sums && entry == entry::pool)
          for (T& x : textbook[0].data) x = std::ldexp(x, c.key);
        forward.add(a.results, textbook, textbook_forward<Exact>(p, a.operands, a.seen), name(p));
        // Gradients of queries and keys are numbers, too.
        // (Of keys that are denormal they have fewer digits than a textbook without vectors leaves.)
        const bool denormal = c.key < std::numeric_limits<T>::min_exponent;
        if (!c.sums || c.dim > 6 || denormal || entry == entry::pool) continue;
        times(memory.operands[memory.operands.size() - 2], T(0x1p-12));
        times(memory.operands.back(), T(0x1p-12));
        add_gradient(memory, backward);
      }
      forward.expect(name(entry) + ", " + c.what);
      backward.expect(name(entry) + ", gradient, " + c.what);
    }
}

// ------------------------------------------------------------------------------------------------ logits of -inf

/// Sets the first dim of some keys to -inf, and of all queries to positive numbers: those keys are masked.
template <class T, class Masked>
void mask(tensor<T>& query, tensor<T>& key, const Masked& masked) {
  for_each_row(query.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    T& x = *query.row(b, h, i);
    x = static_cast<T>(std::abs(static_cast<compute_type<T>>(x)) + compute_type<T>(0.1f));
  });
  for_each_row(key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
    if (masked(j)) *key.row(b, h, j) = static_cast<T>(-infinity<compute_type<T>>);
  });
}

constexpr std::array raw_entries{entry::dense, entry::local, entry::attend};

/// Out 0, log-sum-exp -inf and gradients 0 where all that a query sees is masked.
TYPED_TEST(Range, AllLogitsMasked) {
  using T = TypeParam;
  random_engine random(8);
  const auto all_zero = [](const tensor<T>& t) {
    return all_rows(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      return std::all_of(t.row(b, h, i), t.row(b, h, i) + t.view().dim(), [](T x) { return x == 0; });
    });
  };
  for (const entry entry : raw_entries)
    for (const problem& p : problems(entry)) {
      gradient_memory<T> memory(p);
      memory.randomize(random);
      mask(memory.operands[0], memory.operands[1], [](std::int64_t) { return true; });
      if (entry == entry::attend) mask(memory.operands[0], memory.operands[3], [](std::int64_t) { return true; });
      memory.forward();
      const tensor<T>&out = memory.operands[memory.forward_operands()],
            &lse = memory.operands[memory.forward_operands() + 1];
      EXPECT_TRUE(all_zero(out)) << p;
      EXPECT_TRUE(all_rows(lse.view(), [&](auto... row) { return *lse.row(row...) == -infinity<T>; })) << p;
      memory.gradient();
      for (std::size_t g = 0; g < memory.results.size(); ++g)
        EXPECT_TRUE(all_zero(memory.results[g])) << p << ", gradient " << g;
    }
}

/// Masked rows among others, and a whole block of them before the others.
TYPED_TEST(Range, SomeLogitsMasked) {
  using T = TypeParam;
  random_engine random(9);
  for (const entry entry : raw_entries)
    for (const bool first_ones : {false, true}) {
      result_rules<T> rules;
      for (const problem& p : problems(entry)) {
        argument_memory<T> memory = argument_memory<T>(p).randomize(random);
        const auto masked = [&](std::int64_t j) { return first_ones ? j < p.sizes.keys - 2 : j % 3 == 0; };
        mask(memory.operands[0], memory.operands[1], masked);
        if (entry == entry::attend) mask(memory.operands[0], memory.operands[3], masked);
        add_call(p, memory, rules);
      }
      rules.expect(name(entry) + (first_ones ? ", the first" : ", one in three"));
    }
}

/// The textbook masks as the library does.
TYPED_TEST(Range, TheTextbookMasks) {
  using T = TypeParam;
  reference::vector<T> none(0), all(2), some(3), not_a_number(2);
  all << -infinity<T>, -infinity<T>;
  some << -infinity<T>, T(1), T(1);
  not_a_number << -infinity<T>, std::numeric_limits<T>::quiet_NaN();
  EXPECT_EQ(reference::softmax(none), -infinity<T>);
  EXPECT_EQ(reference::softmax(all), -infinity<T>);
  EXPECT_TRUE(all(0) == 0 && all(1) == 0);
  EXPECT_NEAR(reference::softmax(some), 1 + std::log(T(2)), T(1e-6));
  EXPECT_TRUE(some(0) == 0 && some(1) == T(0.5));
  EXPECT_TRUE(std::isnan(reference::softmax(not_a_number)));
  EXPECT_TRUE(std::isnan(not_a_number(0)) && std::isnan(not_a_number(1)));
}

template <class T>
bool all_nan(const T* row, std::int64_t n) {
  return std::all_of(row, row + n, [](T x) { return std::isnan(x); });
}

/// A core is taken for its group's tokens, so it is NaN where it cannot be weighed. The other groups' are as they were.
TYPED_TEST(Range, AGroupThatIsMaskedIsNan) {
  using T = TypeParam;
  random_engine random(10);
  for (const std::int64_t g : {2, 31, 40, 100, 1000})
    for (const core_heads cores : all_core_heads) {
      problem p = example(entry::pool, {.heads = 4, .kv_heads = 2, .keys = 3 * g, .dim = 5, .value_dim = 4});
      p.options.group_size = g;
      p.options.core_heads = cores;
      gradient_memory<T> clean(p);
      clean.randomize(random);
      mask(clean.operands[0], clean.operands[1], [](std::int64_t) { return false; });
      gradient_memory<T> spoilt = clean;
      for_each_row(spoilt.operands[1].view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
        if (j / g == 1) *spoilt.operands[1].row(b, h, j) = -infinity<T>;
      });
      /// Of a result with rows for tokens or for groups: those of the group are NaN, the others the same.
      const auto only_the_group = [](const tensor<T>& got, const tensor<T>& want, std::int64_t rows_of_group) {
        const std::int64_t dim = got.view().dim();
        return all_rows(got.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
          const T* x = got.row(b, h, j);
          return j / rows_of_group == 1 ? all_nan(x, dim) : std::equal(x, x + dim, want.row(b, h, j));
        });
      };
      const auto forward = [&](const gradient_memory<T>& of) {
        argument_memory<T> memory(p);
        for (std::size_t i = 0; i < 3; ++i) copy(of.operands[i].view(), memory.operands[i].view());
        call(p, memory.arguments());
        return memory.results;
      };
      const auto got = forward(spoilt), want = forward(clean);
      EXPECT_TRUE(only_the_group(got[0], want[0], 1)) << p;
      EXPECT_TRUE(only_the_group(got[1], want[1], 1)) << p;
      clean.gradient();
      spoilt.gradient();
      EXPECT_TRUE(only_the_group(spoilt.results[1], clean.results[1], g)) << p << ", gradient of keys";
      EXPECT_TRUE(only_the_group(spoilt.results[2], clean.results[2], g)) << p << ", gradient of values";
    }
}

/// Masked rows in a group that has others: those weigh.
TYPED_TEST(Range, AGroupThatIsMaskedInPart) {
  using T = TypeParam;
  random_engine random(11);
  for (const std::int64_t g : {2, 31, 40, 100, 1000}) {
    problem p = example(entry::pool, {.heads = 2, .kv_heads = 1, .keys = 2 * g, .dim = 5, .value_dim = 4});
    p.options.group_size = g;
    argument_memory<T> memory = argument_memory<T>(p).randomize(random);
    mask(memory.operands[0], memory.operands[1], [g](std::int64_t j) { return j % g < g - 1; });
    const arguments<T> a = memory.arguments();
    call(p, a);
    const auto exact = textbook_forward<exact_type<T>>(p, a.operands, a.seen),
               plain = textbook_forward<exact_type<T>>(p, a.operands, a.seen);
    error_rule<T> rule;
    rule.add(a.results[1], plain[1].view(), exact[1].view(), name(p));
    EXPECT_TRUE(rule.holds()) << p;
  }
}

/// NaN reaches the queries that see the masked group as a core, in `attention` and in a cache, and no other.
TYPED_TEST(Range, QueriesOfAMaskedGroup) {
  using T = TypeParam;
  random_engine random(12);
  for (const std::int64_t g : {4, 40}) {
    const std::int64_t length = 3 * g, s = g / 2;
    const cache_setup setup = example_cache({.group_size = g, .window = s});
    operands<T> tokens = random_tokens<T>(setup, 1, length, random);
    mask(tokens.query, tokens.key, [](std::int64_t) { return false; });
    // The last query of the group alone is infinite, and the first element of its keys below 0.
    for (std::int64_t h = 0; h < setup.shape.heads; ++h) *tokens.query.row(0, h, 2 * g - 1) = infinity<T>;
    for_each_row(tokens.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
      T& x = *tokens.key.row(b, h, j);
      x = -std::abs(x) - T(0.1);
    });
    const sizes size = setup.step(1, length);
    tensor<T> whole({1, size.heads, length, size.value_dim});
    tensor<T, 3> lse({1, size.heads, length});
    const problem p{.entry = entry::attention, .sizes = size, .options = setup.options};
    call(p, arguments<T>{.operands = {tokens.query.view(), tokens.key.view(), tokens.value.view()},
                         .results = {whole.view(), with_dim(lse.view())},
                         .seen = {}});
    auto cache = setup.make<T>();
    for (std::int64_t t = 0; t < length; ++t) {
      const results<T> one = attend(cache, tokens_of(tokens, {t, t + 1}));
      const bool sees_core = 2 * g <= t + 1 - s;
      for (std::int64_t h = 0; h < size.heads; ++h)
        for (const T* out : {std::as_const(whole).row(0, h, t), one.out.row(0, h, 0)}) {
          if (t == 2 * g - 1)
            continue;  // the infinite query itself: what it sees raw is masked, the core of group 0 too
          ASSERT_EQ(all_nan(out, size.value_dim), sees_core) << describe(setup) << ", query " << t;
          ASSERT_TRUE(sees_core || std::all_of(out, out + size.value_dim, [](T x) { return std::isfinite(x); }))
              << describe(setup) << ", query " << t;
        }
    }
  }
}

// --------------------------------------------------------------------------------------- floating-point exceptions

/// Which of the exceptions that mean a mistake a call raises.
template <class F>
std::string raised(const F& f) {
  std::feclearexcept(FE_ALL_EXCEPT);
  f();
  const int flags = std::fetestexcept(FE_INVALID | FE_DIVBYZERO);
  return std::string(flags & FE_INVALID ? "invalid " : "") + (flags & FE_DIVBYZERO ? "division by zero" : "");
}

/// Problems with rows, queries and parts that are empty, as well.
std::vector<problem> problems_with_nothing(entry entry) {
  std::vector<problem> all = problems(entry);
  for (const std::int64_t queries : {3, 20, 100}) {
    problem p = example(entry, {.heads = 2, .queries = queries, .keys = 50, .dim = 20, .value_dim = 17});
    all.push_back(p);
    if (pools(entry) || entry == entry::merge) continue;
    p.options.first_position = -5;  // some see nothing
    all.push_back(p);
    p.options.first_position = -200;  // none sees anything
    all.push_back(p);
    p.sizes.keys = 0;
    p.options.first_position.reset();
    all.push_back(p);
  }
  return all;
}

/// Calls everything with finite operands: `check(label, call)` makes the calls.
template <class T, class Check>
void for_each_finite_call(const Check& check) {
  random_engine random(13);
  for (const entry entry : all_entries)
    for (const problem& p : problems_with_nothing(entry)) {
      argument_memory<T> memory = argument_memory<T>(p).randomize(random);
      if (entry == entry::merge)  // of parts of which one is empty, or both
        for_each_row(memory.operands[1].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          if (i % 3 == 0) *memory.operands[1].row(b, h, i) = -infinity<T>;
          if (i % 2 == 0) *memory.operands[3].row(b, h, i) = -infinity<T>;
        });
      const arguments<T> a = memory.arguments();
      check(name(p), [&] { call(p, a); });
      if (entry == entry::merge) continue;
      gradient_memory<T> gradient(p);
      gradient.randomize(random);
      const arguments<T> of_gradient = gradient.arguments();
      check(name(p) + ", gradient", [&] { call_gradient(p, of_gradient); });
    }
  for (const options& o : {options{}, options{.window = 5}, options{.group_size = 4, .window = 9},
                           options{.group_size = 40, .window = 3, .pool = pooling::mean},
                           options{.group_size = 4, .window = 9, .pool = pooling::max}}) {
    const cache_setup setup = example_cache(o);
    const operands<T> tokens = random_tokens<T>(setup, 1, 120, random);
    std::int64_t length = 0;
    auto cache = setup.make<T>();
    for (const std::int64_t count : {1, 1, 2, 9, 70, 1, 20, 3}) {
      const token_views<T> step = tokens_of(tokens, {length, length + count});
      length += count;
      tensor<T> out({1, setup.shape.heads, count, setup.value_dim()});
      tensor<T, 3> lse({1, setup.shape.heads, count});
      check(describe(setup) + ", " + std::to_string(count), [&] { attend(cache, step, out.view(), lse.view()); });
    }
  }
}

TYPED_TEST(Range, FiniteOperandsRaiseNothing) {
  for_each_finite_call<TypeParam>([](const std::string& label, const auto& f) { EXPECT_EQ(raised(f), "") << label; });
}

/// Slopes without a softcap, and the other way round: what is not asked for is not divided by.
TYPED_TEST(Range, FiniteShiftsRaiseNothing) {
  random_engine random(14);
  for (const entry entry : {entry::dense, entry::attention})
    for (const double softcap : {0.0, 3.0})
      for (const bool slopes : {false, true}) {
        problem p = example(entry, {.heads = 2, .queries = 40, .keys = 50, .dim = 20, .value_dim = 17});
        p.options.softcap = softcap;
        score_call<TypeParam> c(p, score_terms{.slopes = slopes}, random);
        EXPECT_EQ(raised([&] { c.forward(); }), "") << label_of(p, c.terms);
        EXPECT_EQ(raised([&] { c.gradient(); }), "") << label_of(p, c.terms) << ", gradient";
      }
}

#if defined(__GLIBC__) && defined(__x86_64__)
TYPED_TEST(Range, FiniteOperandsDoNotTrap) {
  const auto all = [] {
    std::feclearexcept(FE_ALL_EXCEPT);
    for_each_finite_call<TypeParam>([](const std::string& label, const auto& f) {
      std::fprintf(stderr, "trapped in %s\n", label.c_str());  // shown where it was the last
      feenableexcept(FE_INVALID | FE_DIVBYZERO);
      f();
      fedisableexcept(FE_ALL_EXCEPT);
    });
    std::_Exit(0);
  };
  EXPECT_EXIT(all(), testing::ExitedWithCode(0), "");
}
#endif

// ---------------------------------------------------------------------------------------------------- matrix units

#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone

/// Operands of 16 bits, with and without a unit; what is emulated takes no part.
template <class Element>
class UnitRange : public testing::Test {
 protected:
  void SetUp() override {
    for (const matrix_unit unit : {matrix_unit::avx512_bf16, matrix_unit::amx})
      if (detail::find_matrix_units().amx_bf16 || unit != matrix_unit::amx)
        if (detail::has_unit<Element>(unit)) units.push_back(unit);
  }

  /// Problems of enough queries for a unit, and of few.
  static std::vector<problem> unit_problems(entry entry) {
    std::vector<problem> all;
    for (const problem& p : problems(entry))
      if (p.sizes.keys < 1000) all.push_back(p);
    return all;
  }

  struct arguments_of {
    std::vector<tensor<Element>> operands;
    std::vector<tensor<float>> results, grad_operands;
    tensor<Element> grad_out;
    tensor<std::int64_t, 3> seen;

    arguments_of(const problem& p, random_engine& random)
        : grad_out(result_extents(p)[0]),
          seen({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0}) {
      for (const extents& e : operand_extents(p)) {
        operands.emplace_back(e).randomize(random);
        grad_operands.emplace_back(e);
      }
      for (const extents& e : result_extents(p)) results.emplace_back(e);
      grad_out.randomize(random);
      for_each_row(seen.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        *seen.row(b, h, i) = seen_count(p, b, h, i);
      });
    }

    [[nodiscard]] unit_arguments<Element> forward() {
      unit_arguments<Element> a{.operands = {}, .seen = seen.view(), .results = {}};
      for (const tensor<Element>& t : operands) a.operands.push_back(t.view());
      for (tensor<float>& t : results) a.results.push_back(t.view());
      return a;
    }
    [[nodiscard]] unit_arguments<Element> backward() {
      unit_arguments<Element> a = forward();
      a.out = a.results[0];
      a.lse = without_dim(a.results[1]);
      a.grad_out = grad_out.view();
      a.results.clear();
      for (tensor<float>& t : grad_operands) a.results.push_back(t.view());
      return a;
    }
  };

  std::vector<matrix_unit> units{matrix_unit::none};
};
using unit_elements = testing::Types<Eigen::bfloat16, Eigen::half>;
TYPED_TEST_SUITE(UnitRange, unit_elements);

/// The largest distance of results from exact ones, where that of dim `d` counts in units of `unit(d)`.
template <class Unit>
double worst(tensor_view<const float> got, const reference::tensor<double>& exact, const Unit& unit) {
  long double worst = 0;
  for_each_row(got, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < got.dim(); ++d)
      worst = std::max(worst, distance(got.row(b, h, i)[d], exact.view().row(b, h, i)[d]) / unit(d));
  });
  return static_cast<double>(worst);
}

/// Large values in all dims, or in one in three: each dim is as accurate as its weights, which are rounded to 16 bits.
TYPED_TEST(UnitRange, MeansOfValues) {
  random_engine random(14);
  const auto most = static_cast<float>(std::numeric_limits<TypeParam>::max()) * 0.98f;
  for (const entry entry : unit_entries)
    for (const bool one_dim : {false, true})
      for (problem p : this->unit_problems(entry))
        for (const matrix_unit unit : this->units) {
          p.options.unit = unit;
          typename TestFixture::arguments_of call_of(p, random);
          for (const std::size_t i : value_operands(entry))
            for_each_row(call_of.operands[i].view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
              for (std::int64_t d = 0; d < p.sizes.value_dim; ++d)
                if (!one_dim || d % 3 == 0) call_of.operands[i].row(b, h, t)[d] = TypeParam(most);
            });
          const unit_arguments<TypeParam> a = call_of.forward();
          call(p, a);
          const auto size = [&](std::int64_t d) { return !one_dim || d % 3 == 0 ? most : 4.0f; };
          EXPECT_LT(worst(a.results[0], textbook_forward<double>(p, a.operands, a.seen)[0], size), 0.02)
              << p << ", unit " << static_cast<int>(unit);
        }
}

TYPED_TEST(UnitRange, LargeScales) {
  random_engine random(15);
  for (const entry entry : unit_entries)
    for (problem p : this->unit_problems(entry))
      for (const matrix_unit unit : this->units)
        for (const double scale : {1e30, 2.4e38, 3.4e38}) {
          if (p.options.pool != pooling::last_query) continue;
          p.options.unit = unit;
          p.options.softmax_scale = scale;
          typename TestFixture::arguments_of call_of(p, random);
          call_of.operands[0].fill(TypeParam(0.0f));
          const unit_arguments<TypeParam> a = call_of.forward();
          try {
            call(p, a);
            EXPECT_LT(worst(a.results[0], textbook_forward<double>(p, a.operands, a.seen)[0],
                            [](std::int64_t) { return 4.0f; }),
                      0.02)
                << p << ", unit " << static_cast<int>(unit);
          } catch (const std::invalid_argument& refusal) {
            EXPECT_TRUE(names_the_scale(refusal)) << refusal.what();
            EXPECT_GT(scale, 2.3e38) << "a scale that is no trouble is refused";
          }
        }
}

TYPED_TEST(UnitRange, LogitsMasked) {
  random_engine random(16);
  for (const entry entry : {entry::local, entry::attend})
    for (problem p : this->unit_problems(entry))
      for (const matrix_unit unit : this->units)
        for (const bool all : {true, false}) {
          p.options.unit = unit;
          typename TestFixture::arguments_of call_of(p, random);
          // A whole block of a unit comes before the others.
          mask(call_of.operands[0], call_of.operands[1], [&](std::int64_t j) { return all || j < p.sizes.keys - 2; });
          if (entry == entry::attend) mask(call_of.operands[0], call_of.operands[3], [](std::int64_t) { return true; });
          const unit_arguments<TypeParam> a = call_of.forward();
          call(p, a);
          const auto exact = textbook_forward<double>(p, a.operands, a.seen);
          for (std::size_t r = 0; r < 2; ++r)
            EXPECT_LT(worst(a.results[r], exact[r], [](std::int64_t) { return 4.0f; }), 0.02)
                << p << ", unit " << static_cast<int>(unit) << ", result " << r;
        }
}

TYPED_TEST(UnitRange, FiniteOperandsRaiseNothing) {
  random_engine random(17);
  for (const entry entry : unit_entries)
    for (problem p : problems_with_nothing(entry))
      for (const matrix_unit unit : this->units) {
        if (p.sizes.keys >= 1000) continue;
        p.options.unit = unit;
        typename TestFixture::arguments_of call_of(p, random);
        const unit_arguments<TypeParam> a = call_of.forward();
        EXPECT_EQ(raised([&] { call(p, a); }), "") << p << ", unit " << static_cast<int>(unit);
        const unit_arguments<TypeParam> of_gradient = call_of.backward();
        EXPECT_EQ(raised([&] { call_gradient(p, of_gradient); }), "")
            << p << ", gradient, unit " << static_cast<int>(unit);
      }
}

#endif

}}  // namespace cca::test
