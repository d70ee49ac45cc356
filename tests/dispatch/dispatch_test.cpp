// Kernels chosen at run time give the bits of those that a program would have been compiled with, on every path; and
// they are those that the processor runs.

#include <cca/dispatch.hpp>
#include <cstdlib>

#include "executors.hpp"
#include "kv_cache_steps.hpp"
#include "passes.hpp"
#include "ragged.hpp"
#include "score_calls.hpp"

namespace cca::test { namespace {

#define CCA_NAME_OF(target) #target
#define CCA_NAME(target) CCA_NAME_OF(target)

/// What this translation unit, and with it the kernels of the other tests, is compiled for.
constexpr std::string_view own_architecture = CCA_NAME(CCA_VECTORS);

/// Uses an architecture for a while.
class using_architecture {
 public:
  explicit using_architecture(std::string_view name) : before_(dispatch::architecture()) { dispatch::use(name); }
  ~using_architecture() { dispatch::use(before_); }
  using_architecture(const using_architecture&) = delete;
  using_architecture& operator=(const using_architecture&) = delete;

 private:
  std::string_view before_;
};

/// `call` of entry_points.hpp through the dispatch; without log-sum-exps where `lse` says so.
template <class T>
void dispatched_call(const problem& p, const arguments<T>& a, const any_executor& run = {},
                     std::span<std::byte> memory = {}, bool lse = true) {
  const auto& in = a.operands;
  const tensor_view<T> first = a.results[0], second = a.results[1];
  cca::results<T> to{first};
  if (lse) to.lse = without_dim(second);
  switch (p.entry) {
    case entry::dense:
    case entry::attention:
      return dispatch::attention(inputs_of(a), to, p.options, {run, memory});
    case entry::local:
      return dispatch::attend(inputs_of(a), detail::no_far_context(inputs_of(a)), to, p.options, {run, memory});
    case entry::attend:
      return dispatch::attend(inputs_of(a), far_of(a), to, p.options, {run, memory});
    case entry::pool:
      return dispatch::pool(inputs_of(a), cores{first, second}, p.options, {run, memory});
    case entry::merge:
      return dispatch::merge<T>({in[0], without_dim(in[1])}, {in[2], without_dim(in[3])}, to, run);
  }
}

template <class T>
std::size_t dispatched_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  if (p.entry == entry::merge) return 0;
  if (p.entry == entry::attend) return dispatch::workspace_size(inputs_of(a), far_of(a), p.options, run);
  return dispatch::workspace_size(inputs_of(a), p.options, run);
}

/// `call_gradient` of gradient_entry_points.hpp through the dispatch.
template <class T>
void dispatched_gradient(const problem& p, const arguments<T>& a, const any_executor& run = {},
                         std::span<std::byte> memory = {}, bool grad_lse = true) {
  const auto& in = a.operands;
  gradients<T> to{a.results[0], a.results[1], a.results[2]};
  to.sink_logits = a.grad_sinks;
  to.alibi_slopes = a.grad_slopes;
  to.key_bias = a.grad_key_bias;
  to.far_bias = a.grad_far_bias;
  if (p.entry == entry::pool)
    return dispatch::pool_gradient<T>(inputs_of(a), {in[3], in[4]}, to, p.options, {run, memory});
  const std::size_t first = in.size() - 4;
  const dispatch::read<T> of{in[first], without_dim(in[first + 1])};
  incoming<T> from{in[first + 2]};
  if (grad_lse) from.grad_lse = without_dim(in[first + 3]);
  if (p.entry == entry::dense || p.entry == entry::attention)
    return dispatch::attention_gradient(inputs_of(a), of, from, to, p.options, {run, memory});
  const far_context<T> context = p.entry == entry::attend ? far_of(a) : detail::no_far_context(inputs_of(a));
  to.far_key = {p.entry == entry::attend ? a.results[3].data : nullptr, context.key.extent,
                p.entry == entry::attend ? a.results[3].stride : context.key.stride};
  to.far_value = {p.entry == entry::attend ? a.results[4].data : nullptr, context.value.extent,
                  p.entry == entry::attend ? a.results[4].stride : context.value.stride};
  dispatch::attend_gradient(inputs_of(a), context, of, from, to, p.options, {run, memory});
}

template <class T>
std::size_t dispatched_gradient_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  if (p.entry == entry::attend) return dispatch::gradient_workspace_size(inputs_of(a), far_of(a), p.options, run);
  return dispatch::gradient_workspace_size(inputs_of(a), p.options, run);
}

constexpr sizes example_sizes{
    .batch = 2, .heads = 4, .kv_heads = 2, .queries = 41, .keys = 53, .dim = 19, .value_dim = 21};

/// The entry point with options none of which is the default, where it takes them.
problem odd_example(entry entry) {
  problem p = example(entry, example_sizes);
  if (entry == entry::merge) return p;
  p.options.softmax_scale = 0.3;
  p.options.sink_tokens = 2;
  if (entry == entry::dense || entry == entry::attend) p.options.lookahead = 3, p.options.prefix = 5;
  if (entry == entry::attention || entry == entry::pool) p.options.core_heads = core_heads::per_kv_head;
  if (entry == entry::attention || entry == entry::pool) p.options.pooling_scale = 2;
  if (entry == entry::dense || entry == entry::local || entry == entry::attend) p.options.first_position = 9;
  return p;
}

template <class T>
class Dispatch : public testing::Test {
 protected:
  using_architecture own_{own_architecture};
};
TYPED_TEST_SUITE(Dispatch, precisions);

TYPED_TEST(Dispatch, GivesTheBitsOfTheProgramsOwnKernels) {
  random_engine random(1);
  for (const entry entry : all_entries)
    for (const bool odd : {false, true})
      for (const bool lse : {true, false}) {
        if (!lse && (entry == entry::pool || entry == entry::merge)) continue;
        const problem p = odd ? odd_example(entry) : example(entry, example_sizes);
        SCOPED_TRACE(testing::Message() << p << (lse ? "" : ", no lse"));
        argument_memory<TypeParam> own(
            p, [&](bool operand) { return operand ? random_operand_layout(random) : random_layout(random); });
        own.randomize(random);
        argument_memory<TypeParam> dispatched = own;
        auto expected = own.arguments();
        call(p, expected);
        // Nothing may be written to log-sum-exps that are not asked for.
        if (!lse) expected.results.pop_back();
        dispatched_call(p, dispatched.arguments(), {}, {}, lse);
        EXPECT_TRUE(dispatched.canaries_intact());
        auto written = dispatched.arguments().results;
        if (!lse) {
          EXPECT_TRUE(same_bits(written.back(), argument_memory<TypeParam>(p).arguments().results.back()));
          written.pop_back();
        }
        EXPECT_TRUE(same_bits(written, expected.results));
      }
}

TYPED_TEST(Dispatch, GivesTheBitsOfTheProgramsOwnGradients) {
  random_engine random(2);
  for (const entry entry : gradient_entries)
    for (const bool grad_lse : {true, false}) {
      const problem p = odd_example(entry);
      SCOPED_TRACE(testing::Message() << p << (grad_lse ? "" : ", no grad_lse"));
      gradient_memory<TypeParam> own(
          p, [&](bool operand) { return operand ? random_operand_layout(random) : random_layout(random); });
      own.randomize(random);
      gradient_memory<TypeParam> dispatched = own;
      auto expected = own.arguments();
      if (!grad_lse && entry != entry::pool) expected.operands.back() = {};
      call_gradient(p, expected);
      dispatched_gradient(p, dispatched.arguments(), {}, {}, grad_lse);
      EXPECT_TRUE(same_bits(dispatched.arguments().results, expected.results));
      EXPECT_TRUE(dispatched.canaries_intact());
    }
}

/// Sink logits, slopes, and biases of keys, far rows and cores.
TYPED_TEST(Dispatch, TakesWhatIsAddedToScores) {
  random_engine random(4);
  for (const entry entry : score_entries)
    for (const bool shared : {true, false}) {
      problem p = odd_example(entry);
      score_terms terms{
          .sinks = shared ? sinks::per_head : sinks::per_query, .slopes = true, .far_bias_heads = 0, .shared = shared};
      if (entry == entry::attention) p.options.core_bias = core_bias::entropy;
      if (entry != entry::attention) terms.key_bias_heads = shared ? 1 : 4;
      if (entry == entry::attend) terms.far_bias_heads = 2;
      SCOPED_TRACE(label_of(p, terms));
      score_call<TypeParam> own(p, terms, random), dispatched = own;
      own.forward().gradient();
      arguments<TypeParam> a = dispatched.gradient_arguments();
      a.results = {dispatched.out().view(), dispatched.lse().view()};
      dispatched_call(p, a);
      dispatched_gradient(p, dispatched.gradient_arguments());
      EXPECT_TRUE(same_bits(own.written(), dispatched.written()));
    }

  const cache_setup setup =
      example_cache({.group_size = 3, .window = 4, .core_bias = core_bias::entropy}, {.batch = 2});
  const operands<TypeParam> all = random_tokens<TypeParam>(setup, 2, 30, random);
  tensor<TypeParam, 3> logits({2, 4, 30}), slopes({1, 4, 1});
  logits.randomize(random);
  slopes.fill(TypeParam(0.2));
  kv_cache<TypeParam> own = setup.template make<TypeParam>();
  dispatch::kv_cache<TypeParam> dispatched(setup.shape, setup.options);
  for (const range part : {range{0, 20}, {20, 23}, {23, 30}}) {
    token_views<TypeParam> tokens = tokens_of(all, part);
    tokens.sinks = tokens_of(std::as_const(logits).view(), part);
    tokens.slopes = std::as_const(slopes).view();
    const results<TypeParam> got =
        collect<TypeParam>(setup.step(2, part.size()), [&](tensor_view<TypeParam> out, lse_view<TypeParam> lse) {
          dispatched.attend({tokens.query, tokens.key, tokens.value, tokens.sinks, tokens.slopes}, {out, lse});
        });
    EXPECT_TRUE(same_bits(attend(own, tokens), got));
  }
}

TYPED_TEST(Dispatch, TakesTheCallersExecutorAndWorkspace) {
  random_engine random(3);
  for (const entry entry : all_entries) {
    const problem p = example(entry, example_sizes);
    gradient_memory<TypeParam> gradients(entry == entry::merge ? example(entry::dense, example_sizes) : p);
    gradients.randomize(random);
    argument_memory<TypeParam> memory(p);
    memory.randomize(random);
    const argument_memory<TypeParam> expected = [&] {
      argument_memory<TypeParam> own = memory;
      call(p, own.arguments());
      return own;
    }();
    for (const named_executor& executor : executors()) {
      SCOPED_TRACE(testing::Message() << p << ", " << executor.name);
      const std::size_t bytes = workspace_size(p, memory.arguments(), executor.run);
      EXPECT_EQ(dispatched_workspace_size(p, memory.arguments(), executor.run), bytes);
      EXPECT_EQ(dispatched_gradient_workspace_size(gradients.problem, gradients.arguments(), executor.run),
                gradient_workspace_size(gradients.problem, gradients.arguments(), executor.run));

      argument_memory<TypeParam> dispatched = memory;
      std::vector<std::byte> workspace(bytes);
      dispatched_call(p, dispatched.arguments(), executor.run, workspace);
      for (std::size_t i = 0; i < dispatched.results.size(); ++i)
        EXPECT_TRUE(same_bits(dispatched.results[i].view(), expected.results[i].view()));

      // Of one byte, where any is needed.
      const std::span<std::byte> too_small = std::span(workspace).first(std::min<std::size_t>(bytes, 1));
      const std::string refused = refusal_of([&] { call(p, memory.arguments(), executor.run, too_small); });
      EXPECT_EQ(refusal_of([&] { dispatched_call(p, memory.arguments(), executor.run, too_small); }), refused);
      EXPECT_EQ(refused == "none", bytes == 0);
    }
  }
}

TYPED_TEST(Dispatch, ThrowsWhatTheKernelsThrow) {
  for (const entry entry : all_entries) {
    problem p = example(entry, example_sizes);
    SCOPED_TRACE(testing::Message() << p);
    argument_memory<TypeParam> memory(p);
    const auto same_refusal = [&] {
      const std::string own = refusal_of([&] { call(p, memory.arguments()); });
      EXPECT_NE(own, "none");
      EXPECT_EQ(refusal_of([&] { dispatched_call(p, memory.arguments()); }), own);
    };
    if (entry != entry::merge) {
      p.options.pool = static_cast<pooling>(7);
      same_refusal();
      p.options = example(entry, example_sizes).options;
    }
    memory.operands[0] = tensor<TypeParam>({2, 4, 41, 0});
    same_refusal();
  }
}

/// Views carry the lengths of their sequences.
TYPED_TEST(Dispatch, SequencesKeepTheirLengths) {
  using Pass = forward_pass<TypeParam>;
  random_engine random(6);
  for (const entry entry : all_entries) {
    problem p = example(entry, example_sizes);
    const alone<Pass> want(p, {{7, 7, 4}, {0, 0, 3}, {40, 40, 0}, {1, 1, 9}}, random);
    for (const ragged_layout layout : all_ragged_layouts) {
      const together<Pass> got(want, [&] { return layout; });
      dispatched_call(got.p, got.arguments());
      EXPECT_TRUE(got.same_as(want)) << p;
    }
  }
}

/// Each architecture that runs here obeys the rule for errors, whatever this test is compiled for.
TYPED_TEST(Dispatch, EveryArchitectureIsExact) {
  for (const std::string_view name : dispatch::architectures()) {
    const using_architecture used(name);
    EXPECT_EQ(dispatch::architecture(), name);
    random_engine random(5);
    attention_rule<TypeParam> rule;
    for (const std::int64_t length : {1, 17, 70, 133}) {
      const sizes s{
          .batch = 2, .heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 33, .value_dim = 9};
      const options options{.group_size = 3, .window = 10};
      const auto o = random_operands<TypeParam>(s, random);
      const auto r = collect<TypeParam>(s, [&](tensor_view<TypeParam> out, lse_view<TypeParam> lse) {
        dispatch::attention<TypeParam>({o.query.view(), o.key.view(), o.value.view()}, {out, lse}, options);
      });
      rule.add(r, [&]<class Scalar>() {
        return reference::attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, options);
      });
    }
    EXPECT_TRUE(rule.holds()) << name;
  }
}

TEST(DispatchArchitecture, IsTheNewestThatRunsHere) {
  const std::vector<std::string_view> all = dispatch::architectures();
  ASSERT_FALSE(all.empty());
  EXPECT_EQ(dispatch::architecture(), all.front());
  // Emulators that lack what this machine has are told by emulated.sh what to find.
  const char* expected = std::getenv("CCA_EXPECTED_ARCHITECTURE");
  if (expected != nullptr) {
    EXPECT_EQ(all.front(), expected);
  }
  // The tests that go through the dispatch are run for all of them: see detect_archs.cmake.
  if (const char* tested = std::getenv("CCA_TESTED_ARCHITECTURES"); tested != nullptr) {
    std::string names;  // the oldest first
    for (const std::string_view name : all) names = std::string(name) + (names.empty() ? "" : " ") + names;
    EXPECT_EQ(names, tested);
  }
  // This program runs here, hence what it is compiled for does.
  EXPECT_NE(std::find(all.begin(), all.end(), own_architecture), all.end()) << own_architecture;
#if defined(__x86_64__)
  const std::vector<std::string_view> known{"avx512", "avx2_fma", "sse4_2", "sse2"};
  ASSERT_LE(all.size(), known.size());
  EXPECT_TRUE(std::equal(all.rbegin(), all.rend(), known.rbegin())) << "each has what the older ones have";
#endif
}

TEST(DispatchArchitecture, RefusesOneThatDoesNotRunHere) {
  const std::string_view before = dispatch::architecture();
  for (const std::string_view name : {"", "avx", "avx1024", "neon65"}) {
    const std::string message = refusal_of([&] { dispatch::use(name); });
    EXPECT_NE(message.find(std::string(before)), std::string::npos) << message;
  }
  EXPECT_EQ(dispatch::architecture(), before);
}

constexpr options cache_options{.group_size = 3, .window = 7};

template <class Element>
class DispatchCacheOf : public testing::Test {};
using cached_elements = testing::Types<float, q8>;
TYPED_TEST_SUITE(DispatchCacheOf, cached_elements);

TYPED_TEST(DispatchCacheOf, AnswersWithTheBitsOfTheProgramsOwn) {
  const using_architecture own_kernels(own_architecture);
  random_engine random(6);
  const cache_setup setup = example_cache(cache_options, {.batch = 2, .rewind = 4});
  kv_cache<TypeParam> own = setup.template make<TypeParam>();
  dispatch::kv_cache<TypeParam> dispatched(setup.shape, setup.options);
  EXPECT_EQ(dispatched.shape(), own.shape());
  EXPECT_EQ(dispatched.options().group_size, cache_options.group_size);
  EXPECT_EQ(dispatched.options().window, cache_options.window);

  const auto same_content = [&] {
    std::ostringstream stream;
    save(dispatched, stream);
    EXPECT_EQ(stream.str(), content(own));
    for (const std::int64_t b : {0, 1}) {
      EXPECT_EQ(dispatched.length(b), own.length(b));
      EXPECT_EQ(dispatched.core_count(b), own.core_count(b));
      EXPECT_EQ(dispatched.raw_count(b), own.raw_count(b));
      EXPECT_EQ(dispatched.least_length(b), own.least_length(b));
    }
    for (const std::int64_t b : {-1, 2}) {
      EXPECT_THROW((void)dispatched.length(b), std::invalid_argument);
      EXPECT_THROW((void)dispatched.core_count(b), std::invalid_argument);
      EXPECT_THROW((void)dispatched.raw_count(b), std::invalid_argument);
      EXPECT_THROW((void)dispatched.least_length(b), std::invalid_argument);
    }
    EXPECT_EQ(dispatched.bytes(), own.bytes());
    EXPECT_EQ(dispatched.allocated_bytes(), own.allocated_bytes());
  };
  for (const std::int64_t count : {20, 1, 1, 5}) {
    const auto all = random_tokens(setup, 2, count, random), one = random_tokens(setup, 1, count, random);
    const results<float> expected = attend(own, views_of(all)), expected_one = attend(own, 1, views_of(one));
    const results<float> r = collect<float>(setup.step(2, count), [&](tensor_view<float> out, lse_view<float> lse) {
      dispatched.attend({all.query.view(), all.key.view(), all.value.view()}, {out, lse});
    });
    const results<float> r1 = collect<float>(setup.step(1, count), [&](tensor_view<float> out, lse_view<float> lse) {
      dispatched.attend(1, {one.query.view(), one.key.view(), one.value.view()}, {out, lse});
    });
    EXPECT_TRUE(same_bits(r, expected));
    EXPECT_TRUE(same_bits(r1, expected_one));
    append(own, views_of(all));
    append(own, 0, views_of(one));
    dispatched.append(all.query.view(), all.key.view(), all.value.view());
    dispatched.append(0, one.query.view(), one.key.view(), one.value.view());
    same_content();
  }
  own.truncate(0, own.length(0) - 2);
  dispatched.truncate(0, own.length(0));
  same_content();
  own.fork(0, 1);
  dispatched.fork(0, 1);
  same_content();
  own.reset(0);
  dispatched.reset(0);
  same_content();
  own.reset();
  dispatched.reset();
  same_content();
}

TEST(DispatchCache, StaysWithItsKernelsAndMovesByFile) {
  random_engine random(7);
  const cache_setup setup = example_cache(cache_options);
  const auto tokens = random_tokens(setup, 1, 30, random);
  for (const std::string_view writer : dispatch::architectures())
    for (const std::string_view reader : dispatch::architectures()) {
      SCOPED_TRACE(testing::Message() << writer << " to " << reader);
      using_architecture used(writer);
      dispatch::kv_cache<float> cache(setup.shape, setup.options);
      const using_architecture then(reader);
      cache.append(tokens.query.view(), tokens.key.view(), tokens.value.view());
      std::stringstream stream;
      save(cache, stream);
      const std::string written = stream.str();
      const auto read = dispatch::load<float>(stream);
      std::ostringstream again;
      save(read, again);
      EXPECT_EQ(again.str(), written);
      EXPECT_EQ(read.length(), 30);
    }
}

TEST(DispatchCache, ComputesInDouble) {
  random_engine random(8);
  const sizes s = example_cache(cache_options).step(1, 60);
  const auto o = random_operands<double>(s, random);
  dispatch::kv_cache<double> cache(example_cache(cache_options).shape, cache_options);
  const results<double> r = collect<double>(s, [&](tensor_view<double> out, lse_view<double> lse) {
    cache.attend({o.query.view(), o.key.view(), o.value.view()}, {out, lse});
  });
  attention_rule<double> rule;
  rule.add(r, [&]<class Scalar>() {
    return reference::attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, cache_options);
  });
  EXPECT_TRUE(rule.holds());
}

/// Scales go through to who refuses them beside floats.
TEST(DispatchCall, PassesScalesOver) {
  const tensor<float> rows({1, 1, 3, 4});
  tensor<float> out({1, 1, 3, 4});
  const tensor<float, 3> scales({1, 1, 3});
  const tensor<std::int64_t, 3> seen({1, 1, 3});
  inputs<float> in{rows.view(), rows.view(), rows.view()};
  far_context<float> context{rows.view(), rows.view(), seen.view()};
  const auto refusal = [&] {
    return refusal_of([&] { dispatch::attend(in, context, cca::results<float>{out.view()}); });
  };
  in.key_scales = scales.view();
  EXPECT_EQ(refusal(), "cca: key_scales: got [1, 1, 3], wants none: key has no elements of 8 bits");
  in.key_scales = {};
  in.value_scales = scales.view();
  EXPECT_EQ(refusal(), "cca: value_scales: got [1, 1, 3], wants none: value has no elements of 8 bits");
  in.value_scales = {};
  context.key_scales = scales.view();
  EXPECT_EQ(refusal(), "cca: far.key_scales: got [1, 1, 3], wants none: far.key has no elements of 8 bits");
  context.key_scales = {};
  context.value_scales = scales.view();
  EXPECT_EQ(refusal(), "cca: far.value_scales: got [1, 1, 3], wants none: far.value has no elements of 8 bits");
}

TEST(DispatchCache, ThrowsWhatTheKernelsThrow) {
  const cache_setup setup = example_cache(cache_options);
  kv_cache<float> own = setup.make();
  dispatch::kv_cache<float> dispatched(setup.shape, setup.options);
  const auto same_refusal = [&](const auto& step) {
    const std::string expected = refusal_of([&] { step(own); });
    EXPECT_NE(expected, "none");
    EXPECT_EQ(refusal_of([&] { step(dispatched); }), expected);
  };
  same_refusal([](auto& cache) { cache.truncate(1, 0); });
  same_refusal([](auto& cache) { cache.truncate(0, 1); });
  same_refusal([](auto& cache) { cache.reset(-1); });
  same_refusal([](auto& cache) { cache.fork(0, 3); });
  EXPECT_EQ(refusal_of([&] { dispatch::kv_cache<double>({.heads = 3, .kv_heads = 2, .dim = 4}, cache_options); }),
            refusal_of([&] { kv_cache<double>({.heads = 3, .kv_heads = 2, .dim = 4}, cache_options); }));
  std::istringstream foreign("not a cache");
  EXPECT_THROW((void)dispatch::load<float>(foreign), std::runtime_error);
}

}}  // namespace cca::test
