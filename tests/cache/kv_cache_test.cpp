// A cache of cores and window answers like attention over the whole sequence, however the sequence came to be.

#include "allocations.hpp"
#include "kv_cache_life.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <stdexcept>

namespace cca::test { namespace {

/// Calls that run the tasks in other orders, and on several threads.
std::vector<any_executor> executors() {
  std::vector<any_executor> all;
  for (const int threads : {1, 2, 3, 7}) {
#if defined(_OPENMP)
    all.push_back({threads, openmp_executor{threads}});
#endif
    all.push_back({threads, [](std::int64_t n, const auto& f) {
                     for (std::int64_t i = n; i-- > 0;) f(i);
                   }});
  }
  return all;
}

// ----------------------------------------------------------------------------------------------- random operations

template <class T>
class KvCacheOf : public testing::Test {};
using ElementTypes = testing::Types<float, double, q8>;
TYPED_TEST_SUITE(KvCacheOf, ElementTypes);  // mixed_types_test.cpp has those whose cores are of another type

TYPED_TEST(KvCacheOf, AnswersLikeRecomputationAfterAnyOperations) {
  expect_answers_like_recomputation<TypeParam, TypeParam>();
}

// ---------------------------------------------------------------------------------------------------------- chunks

const std::array<options, 14> example_options{{{.group_size = 1, .window = 1},
                                              {.window = 5},
                                              {.group_size = 3, .window = 4},
                                              {.group_size = 4, .window = 2},
                                              {.group_size = 5, .window = 1, .core_heads = core_heads::per_kv_head},
                                              {.group_size = 2, .window = 7, .pool = pooling::mean},
                                               {.group_size = 4, .window = 8, .pool = pooling::max},
                                               {.window = 4, .sink_tokens = 3},
                                               {.group_size = 3, .window = 2, .sink_tokens = 7},
                                               {.group_size = 5, .window = 3, .pool = pooling::select},
                                               {.group_size = 3,
                                                .window = 4,
                                                .pool = pooling::select,
                                                .core_heads = core_heads::per_kv_head},
                                               {.group_size = 4, .window = 2, .pooling_scale = 5},
                                               {.group_size = 3, .window = 7, .pool = pooling::select_by_mass},
                                               {.group_size = 2,
                                                .window = 5,
                                                .sink_tokens = 3,
                                                .pool = pooling::select_by_mass,
                                                .core_heads = core_heads::per_kv_head}}};

/// Enough for the window to pass the end of its memory at every offset.
std::int64_t example_length(const options& options) {
  return options.sink_tokens + 3 * (options.window + options.group_size) + 1;
}

/// The second part of the prompt asks for everything that the first left behind.
TEST(KvCache, APromptMayBeCutAnywhere) {
  random_engine random(1);
  for (const options& options : example_options)
    for (const std::int64_t capacity : {std::int64_t{0}, example_length(options)}) {
      const std::int64_t length = example_length(options);
      const cache_setup setup = example_cache(options, {.capacity = capacity});
      const operands<float> prompt = random_tokens(setup, 1, length, random);
      attention_rule<float> rule;
      for (std::int64_t cut = 0; cut <= length; ++cut)
        for (const bool attending : {false, true}) {
          kv_cache<float> cache = setup.make();
          const token_views<float> first = tokens_of(prompt, {0, cut}), second = tokens_of(prompt, {cut, length});
          const std::string label = describe(setup) + ", cut at " + std::to_string(cut);
          if (attending)
            rule.add(attend(cache, first), textbook(first, cut, options), label);
          else
            append(cache, first);
          rule.add(attend(cache, second), textbook(views_of(prompt), length - cut, options), label);
        }
      EXPECT_TRUE(rule.holds());
    }
}

TEST(KvCache, TokensMayComeOneByOneOrInAnyChunks) {
  random_engine random(2);
  for (const options& options : example_options) {
    const cache_setup setup = example_cache(options);
    const std::int64_t length = example_length(options);
    const operands<float> prompt = random_tokens(setup, 1, length, random);
    attention_rule<float> rule;
    for (std::int64_t chunk = 1; chunk < length; ++chunk) {
      kv_cache<float> cache = setup.make();
      for (std::int64_t done = 0; done < length; done += chunk) {
        const range part{done, std::min(done + chunk, length)};
        rule.add(attend(cache, tokens_of(prompt, part)),
                 textbook(tokens_of(prompt, {0, part.end}), part.size(), options),
                 describe(setup) + ", chunks of " + std::to_string(chunk));
      }
    }
    EXPECT_TRUE(rule.holds());
  }
}

/// What observers found out, and the tokens that they select, are the same to the bit however a sequence was cut: the
/// cache holds the same.
TEST(KvCache, ObserversFindOutTheSameInAnyChunks) {
  random_engine random(20);
  for (const std::int64_t sinks : {0, 3})
    for (const core_heads cores : all_core_heads) {
      const cache_setup setup = example_cache({.group_size = 5,
                                               .window = 100,
                                               .sink_tokens = sinks,
                                               .pool = pooling::select_by_mass,
                                               .core_heads = cores});
      const std::int64_t length = 400;
      const operands<float> prompt = random_tokens(setup, 1, length, random);
      kv_cache<float> whole = setup.make();
      append(whole, views_of(prompt));
      EXPECT_EQ(whole.core_count(), (length + 1 - sinks - 100) / 5);
      for (const std::int64_t chunk : {1, 2, 7, 33, 99, 250}) {
        kv_cache<float> cache = setup.make();
        for (std::int64_t done = 0; done < length; done += chunk) {
          const token_views<float> part = tokens_of(prompt, {done, std::min(done + chunk, length)});
          if (done % 2 == 0)
            append(cache, part);
          else
            attend(cache, part);
        }
        EXPECT_EQ(content(cache), content(whole)) << "chunks of " << chunk;
      }
    }
}

TEST(KvCache, IsADenseCacheWithoutAWindow) {
  random_engine random(3);
  const cache_setup setup = example_cache({});
  const operands<float> prompt = random_tokens(setup, 1, 50, random);
  const auto dense = [&](std::int64_t first, std::int64_t end) {
    return [&, first, end]<class Scalar>() {
      return reference::attention<Scalar>(
          inputs{tokens_of(prompt.query.view(), {first, end}), tokens_of(prompt.key.view(), {0, end}),
                 tokens_of(prompt.value.view(), {0, end})},
          options{});
    };
  };
  kv_cache<float> cache = setup.make();
  attention_rule<float> rule;
  rule.add(attend(cache, tokens_of(prompt, {0, 30})), dense(0, 30));
  for (std::int64_t t = 30; t < 50; ++t) rule.add(attend(cache, tokens_of(prompt, {t, t + 1})), dense(t, t + 1));
  EXPECT_TRUE(rule.holds());
  EXPECT_EQ(cache.core_count(), 0);
  EXPECT_EQ(cache.raw_count(), 50);
  EXPECT_EQ(cache.least_length(), 0);
}

TEST(KvCache, NoTokensAreAStep) {
  random_engine random(4);
  const cache_setup setup = example_cache({.group_size = 3, .window = 4}, {.batch = 2});
  kv_cache<float> cache = setup.make();
  const operands<float> none = random_tokens(setup, 2, 0, random);
  attend(cache, views_of(none));
  EXPECT_EQ(cache.length(1), 0);
  kv_cache<float> without_sequences = example_cache({}, {.batch = 0}).make();
  attend(without_sequences, views_of(random_tokens(setup, 0, 3, random)));
  EXPECT_EQ(without_sequences.bytes(), 0U);
}

/// Each option has its effect on prompts, few queries and single ones.
TEST(KvCache, EveryOptionChangesTheOutputOfEveryStep) {
  random_engine random(5);
  const options common{.group_size = 3, .window = 4};
  std::vector<options> changed(10, common);
  changed[0].group_size = 2;
  changed[1].window = 7;
  changed[2].pool = pooling::mean;
  changed[3].pool = pooling::max;
  changed[4].core_heads = core_heads::per_kv_head;
  changed[5].softmax_scale = 0.4;
  changed[6].sink_tokens = 1;
  changed[7].sink_tokens = 40;
  changed[8].pool = pooling::select;
  changed[9].pooling_scale = 2;
  const operands<float> prompt = random_tokens(example_cache(common), 1, 60, random);
  for (const std::int64_t count : {1, 5, 20, 60})
    for (const options& options : changed) {
      kv_cache<float> one = example_cache(common).make(), other = example_cache(options).make();
      for (kv_cache<float>* cache : {&one, &other}) append(*cache, tokens_of(prompt, {0, 60 - count}));
      const token_views<float> last = tokens_of(prompt, {60 - count, 60});
      EXPECT_FALSE(same_bits(attend(one, last), attend(other, last)))
          << describe(options) << ", " << count << " queries";
    }
}

// ------------------------------------------------------------------------------------------------ what comes back

/// Of tokens that were taken back nothing is left, were they NaN.
TEST(KvCache, TokensTakenBackLeaveNoTrace) {
  random_engine random(6);
  constexpr std::int64_t rewind = 3;
  for (const options& options : example_options) {
    const cache_setup setup = example_cache(options, {.rewind = rewind});
    const std::int64_t length = example_length(options), more = options.group_size + options.window;
    const operands<float> prompt = random_tokens(setup, 1, length + more, random);
    operands<float> nans = random_tokens(setup, 1, length, random);
    for (tensor<float>* t : {&nans.query, &nans.key, &nans.value}) t->fill(std::numeric_limits<float>::quiet_NaN());
    for (std::int64_t kept = 0; kept <= length; ++kept)
      for (const std::int64_t taken : {std::int64_t{1}, rewind, length}) {
        kv_cache<float> clean = setup.make(), cache = setup.make();
        append(clean, tokens_of(prompt, {0, kept}));
        if (taken == length) {
          append(cache, views_of(nans));
          cache.reset();
          append(cache, tokens_of(prompt, {0, kept}));
        } else {
          append(cache, tokens_of(prompt, {0, kept}));
          attend(cache, tokens_of(nans, {0, taken}));
          cache.truncate(0, kept);
        }
        for (const range part : {range{kept, kept + 1}, {kept + 1, kept + more}}) {
          const token_views<float> next = tokens_of(prompt, part);
          ASSERT_TRUE(same_bits(attend(cache, next), attend(clean, next)))
              << describe(setup) << ", " << taken << " tokens after " << kept;
        }
      }
  }
}

TEST(KvCache, TakesBackTheRewindAndRefusesWhatHasLeft) {
  random_engine random(7);
  for (const options& options : example_options)
    for (const std::int64_t rewind : {0, 1, 7}) {
      const cache_setup setup = example_cache(options, {.rewind = rewind});
      const std::int64_t most = 3 * setup.raw_limit();
      const operands<float> prompt = random_tokens(setup, 1, most, random);
      attention_rule<float> rule;  // of all lengths: one has few numbers
      for (std::int64_t length = 1; length <= most; ++length) {
        kv_cache<float> cache = setup.make();
        append(cache, tokens_of(prompt, {0, length}));
        const std::int64_t least = cache.least_length();
        ASSERT_LE(least, std::max<std::int64_t>(length - rewind, 0)) << describe(setup) << ", length " << length;
        ASSERT_EQ(least == 0, length <= options.sink_tokens + setup.raw_limit())
            << describe(setup) << ", length " << length;
        const std::string before = content(cache);
        for (const std::int64_t refused : {least - 1, length + 1}) {
          std::string message;
          try {
            cache.truncate(0, refused);
          } catch (const std::invalid_argument& error) {
            message = error.what();
          }
          ASSERT_NE(message.find("cca: length: got " + std::to_string(refused)), std::string::npos) << message;
        }
        ASSERT_EQ(content(cache), before);
        cache.truncate(0, least);
        rule.add(attend(cache, tokens_of(prompt, {least, length})),
                 textbook(tokens_of(prompt, {0, length}), length - least, options), describe(setup));
      }
      ASSERT_TRUE(rule.holds());
    }
}

/// No core shows a later token, and no query sees one: a NaN appears where it is, not before.
TEST(KvCache, NothingShowsTheFuture) {
  random_engine random(8);
  for (const options& options : example_options) {
    const cache_setup setup = example_cache(options);
    const std::int64_t length = example_length(options);
    const operands<float> prompt = random_tokens(setup, 1, length, random);
    kv_cache<float> clean = setup.make();
    const results<float> expected = attend(clean, views_of(prompt));
    for (std::int64_t t = 0; t < length; ++t) {
      operands<float> changed = prompt;
      for (tensor<float>* all : {&changed.query, &changed.key, &changed.value})
        for (std::int64_t h = 0; h < all->view().heads(); ++h)
          std::fill_n(all->row(0, h, t), all->view().dim(), std::numeric_limits<float>::quiet_NaN());
      kv_cache<float> cache = setup.make();
      const results<float> got = attend(cache, views_of(changed));
      const auto before = [t](const results<float>& all) { return tokens_of(all.out.view(), {0, t}); };
      ASSERT_TRUE(same_bits(before(got), before(expected))) << describe(setup) << ", token " << t;
      ASSERT_TRUE(std::isnan(*got.out.row(0, 0, t))) << describe(setup) << ", token " << t;
    }
  }
}

/// Whatever befalls one of them, the other answers as if it were alone; wherever the window lies in its memory, and
/// whatever the target held before.
TEST(KvCache, AForkIsIndependentOfItsSource) {
  random_engine random(9);
  for (const options& options : example_options) {
    const std::int64_t length = example_length(options), more = options.window + options.group_size;
    for (const std::int64_t capacity : {std::int64_t{0}, 2 * length}) {
      const cache_setup setup = example_cache(options, {.batch = 2, .capacity = capacity});
      const operands<float> prompt = random_tokens(setup, 1, length + more, random);
      operands<float> nans = random_tokens(setup, 1, length, random);
      for (tensor<float>* t : {&nans.query, &nans.key, &nans.value}) t->fill(std::numeric_limits<float>::quiet_NaN());
      for (std::int64_t forked = 0; forked <= length; ++forked)
        for (const std::int64_t before : {std::int64_t{0}, std::int64_t{2}, length}) {
          kv_cache<float> alone = setup.make(), cache = setup.make();
          append(alone, 0, tokens_of(prompt, {0, forked}));
          append(cache, 0, tokens_of(prompt, {0, forked}));
          append(cache, 1, tokens_of(nans, {0, before}));
          cache.fork(0, 1);
          const std::int64_t harmed = forked % 2, other = 1 - harmed;
          append(cache, harmed, views_of(nans));
          const token_views<float> next = tokens_of(prompt, {forked, forked + more});
          ASSERT_TRUE(same_bits(attend(cache, other, next), attend(alone, 0, next)))
              << describe(setup) << ", forked after " << forked << " over " << before;
        }
    }
  }
}

// ------------------------------------------------------------------------------------------- executors and batches

/// The same bits from any executor, and for each sequence as if it were alone. The window is longer than what few
/// queries see at a time.
TEST(KvCache, ResultsDependOnTheSequenceAlone) {
  random_engine random(10);
  const options options{.group_size = 4, .window = detail::part_rows + 50};
  constexpr std::array<std::int64_t, 3> lengths{30, 700, 2 * detail::part_rows + 77};
  const cache_setup setup = example_cache(options, {.batch = 3}), single = example_cache(options);
  std::vector<operands<float>> prompts;
  for (const std::int64_t length : lengths) prompts.push_back(random_tokens(setup, 1, length, random));
  const operands<float> token = random_tokens(setup, 3, 1, random), few = random_tokens(setup, 3, 5, random),
                        many = random_tokens(setup, 3, 70, random);
  const std::array chunks{views_of(token), views_of(few), views_of(many), views_of(token)};

  std::vector<std::vector<results<float>>> expected(3);  // of each sequence alone
  for (std::size_t b = 0; b < 3; ++b) {
    kv_cache<float> cache = single.make();
    expected[b].push_back(attend(cache, views_of(prompts[b])));
    for (const auto& chunk : chunks)
      expected[b].push_back(attend(cache, sequence_of(chunk, static_cast<std::int64_t>(b))));
  }
  for (const any_executor& run : executors()) {
    kv_cache<float> cache = setup.make();
    for (std::size_t b = 0; b < 3; ++b)
      EXPECT_TRUE(same_bits(attend(cache, static_cast<std::int64_t>(b), views_of(prompts[b]), run), expected[b][0]));
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      const results<float> all = attend(cache, chunks[i], run);
      for (std::size_t b = 0; b < 3; ++b)
        EXPECT_TRUE(same_bits(sequence_of(all, static_cast<std::int64_t>(b)), expected[b][i + 1]))
            << run.threads << " threads, chunk " << i << ", sequence " << b;
    }
  }
}

// ------------------------------------------------------------------------------------------------------- failures

/// A cache of two sequences, and what may be done to it next.
struct prepared_cache {
  cache_setup setup;
  operands<float> tokens;
  std::array<std::int64_t, 2> lengths;
  kv_cache<float> cache;

  explicit prepared_cache(std::int64_t capacity = 0, std::array<std::int64_t, 2> held = {14, 5})
      : setup(example_cache({.group_size = 3, .window = 4}, {.batch = 2, .capacity = capacity, .rewind = 2})),
        tokens([this] {
          random_engine random(11);
          return random_tokens(setup, 2, 64, random);
        }()),
        lengths(held),
        cache(setup.make()) {
    for (std::int64_t b = 0; b < 2; ++b)
      append(cache, b, sequence_of(tokens_of(tokens, {0, lengths[static_cast<std::size_t>(b)]}), b));
  }

  /// Tokens that are new to both sequences.
  [[nodiscard]] token_views<float> next(std::int64_t count) const { return tokens_of(tokens, {32, 32 + count}); }
};

struct named_step {
  std::string name;
  std::function<void(prepared_cache&, const any_executor&)> take;
};

/// Every kind of step. Results go where memory is already.
std::vector<named_step> steps() {
  std::vector<named_step> all;
  for (const std::int64_t count : {1, 20}) {
    const std::string of = " of " + std::to_string(count);
    const auto out = std::make_shared<tensor<float>>(extents{2, 4, count, 3});
    const auto lse = std::make_shared<tensor<float, 3>>(std::array<std::int64_t, 3>{2, 4, count});
    all.push_back({"append" + of, [=](prepared_cache& p, const any_executor& run) {
                     append(p.cache, 1, sequence_of(p.next(count), 1), run);
                   }});
    all.push_back({"append to all" + of,
                   [=](prepared_cache& p, const any_executor& run) { append(p.cache, p.next(count), run); }});
    all.push_back({"attend" + of, [=](prepared_cache& p, const any_executor& run) {
                     attend(p.cache, 0, sequence_of(p.next(count), 0), sequence_of(out->view(), 0),
                            sequence_of(lse->view(), 0), run);
                   }});
    all.push_back({"attend all" + of, [=](prepared_cache& p, const any_executor& run) {
                     attend(p.cache, p.next(count), out->view(), lse->view(), run);
                   }});
  }
  return all;
}

/// After a failure the cache holds and answers what an untouched one does.
void expect_untouched(prepared_cache& failed, const std::string& what) {
  prepared_cache untouched(failed.setup.shape.capacity, failed.lengths);
  EXPECT_EQ(content(failed.cache), content(untouched.cache)) << what;
  const token_views<float> next = failed.next(6);
  EXPECT_TRUE(same_bits(attend(failed.cache, next), attend(untouched.cache, next))) << what;
  EXPECT_EQ(content(failed.cache), content(untouched.cache)) << what;
}

/// Whether the call ran out of memory.
template <class F>
bool fails_to_allocate(std::int64_t allowed, const F& f) {
  const allocation_limit limit(allowed);
  try {
    f();
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

TEST(KvCache, IsAsItWasWhenMemoryIsOut) {
  std::vector<named_step> all = steps();
  all.push_back({"fork", [](prepared_cache& p, const any_executor&) { p.cache.fork(0, 1); }});
  all.push_back({"fork to the longer", [](prepared_cache& p, const any_executor&) { p.cache.fork(1, 0); }});
  for (const named_step& step : all) {
    std::int64_t allowed = 0;
    for (bool failed = true; failed; ++allowed) {
      prepared_cache p;
      const any_executor run{.threads = 3};  // scratch memory has to grow with them
      failed = fails_to_allocate(allowed, [&] { step.take(p, run); });
      if (failed) expect_untouched(p, step.name + ", allocation " + std::to_string(allowed));
    }
    EXPECT_GT(allowed, 1) << step.name << " allocates nothing: nothing is tested";
  }
}

/// An executor that gives up: whatever it has run till then, the cache is as it was.
TEST(KvCache, IsAsItWasWhenTheExecutorThrows) {
  for (const named_step& step : steps())
    for (std::int64_t allowed = 0;; ++allowed) {
      prepared_cache p;
      std::int64_t left = allowed;
      const any_executor run{1, [&](std::int64_t n, const auto& f) {
                               for (std::int64_t i = 0; i < n; ++i) f(i);
                               if (left-- == 0) throw std::runtime_error("gives up");
                             }};
      bool failed = false;
      try {
        step.take(p, run);
      } catch (const std::runtime_error&) {
        failed = true;
      }
      if (!failed) break;
      expect_untouched(p, step.name + ", call " + std::to_string(allowed) + " of the executor");
    }
}

TEST(KvCache, AllocatesNothingWithinItsCapacity) {
  for (const named_step& step : steps()) {
    prepared_cache p(64, {14, 5});
    const any_executor run;
    step.take(p, run);
    for (std::int64_t b = 0; b < 2; ++b) p.cache.truncate(b, p.cache.least_length(b));
    const std::int64_t before = allocation_count();
    step.take(p, run);
    EXPECT_EQ(allocation_count() - before, 0) << step.name;
    p.cache.fork(0, 1);
    p.cache.reset();
    EXPECT_EQ(allocation_count() - before, 0) << step.name << ", then fork and reset";
  }
}

TEST(KvCache, RefusesWhatDoesNotFitAndStaysAsItWas) {
  prepared_cache p(20, {14, 5});
  const token_views<float> good = p.next(2);
  tensor<float> out({2, 4, 2, 3});
  tensor<float, 3> lse({2, 4, 2});
  const auto expect_refused = [&](const std::string& argument, const auto& step) {
    const std::string message = refusal_of(step);
    EXPECT_EQ(message.find("cca: " + argument + ": got "), 0U) << argument << ": " << message;
    expect_untouched(p, argument);
    p = prepared_cache(20, {14, 5});
  };
  // Every kind of step, with tokens that are changed.
  const auto expect_tokens_refused = [&](const std::string& argument, const auto& change) {
    token_views<float> tokens = good;
    change(tokens);
    expect_refused(argument, [&] { append(p.cache, tokens); });
    expect_refused(argument, [&] { attend(p.cache, tokens, out.view(), lse.view()); });
    tokens = sequence_of(good, 0);
    change(tokens);
    expect_refused(argument, [&] { append(p.cache, 1, tokens); });
  };
  for (const std::size_t extent : {0U, 1U, 2U, 3U})
    for (const std::int64_t wrong : {0, 7, -1}) {
      expect_tokens_refused("key", [&](auto& tokens) { tokens.key.extent[extent] = wrong; });
      expect_tokens_refused("value", [&](auto& tokens) { tokens.value.extent[extent] = wrong; });
    }
  for (const std::size_t extent : {1U, 3U})
    expect_tokens_refused("query", [&](auto& tokens) { tokens.query.extent[extent] = 2; });
  expect_tokens_refused("query", [](auto& tokens) { tokens.query.data = nullptr; });
  expect_tokens_refused("key", [](auto& tokens) { tokens.key.data = nullptr; });
  expect_tokens_refused("value", [](auto& tokens) { tokens.value.stride[3] = 2; });
  expect_refused("query", [&] { append(p.cache, sequence_of(good, 0)); });
  expect_refused("query", [&] { attend(p.cache, sequence_of(good, 0), out.view(), lse.view()); });

  for (const std::int64_t b : {0, 1}) {
    expect_refused("query", [&] { append(p.cache, b, good); });
    expect_refused("query", [&] { attend(p.cache, b, good, out.view(), lse.view()); });
  }

  for (const std::size_t extent : {0U, 1U, 2U, 3U}) {
    tensor_view<float> wrong = out.view();
    ++wrong.extent[extent];
    expect_refused("out", [&] { attend(p.cache, good, wrong, lse.view()); });
  }
  lse_view<float> wrong = lse.view();
  wrong.extent[2] = 1;
  expect_refused("lse", [&] { attend(p.cache, good, out.view(), wrong); });
  wrong = lse.view();
  wrong.stride[1] = 0;
  expect_refused("lse", [&] { attend(p.cache, good, out.view(), wrong); });

  for (const std::int64_t b : {-1, 2}) {
    expect_refused("b", [&] { append(p.cache, b, sequence_of(good, 0)); });
    expect_refused("b", [&] { attend(p.cache, b, sequence_of(good, 0), sequence_of(out.view(), 0), lse_view<>{}); });
    expect_refused("b", [&] { p.cache.truncate(b, 0); });
    expect_refused("b", [&] { p.cache.reset(b); });
    expect_refused("from", [&] { p.cache.fork(b, 0); });
    expect_refused("to", [&] { p.cache.fork(0, b); });
    expect_refused("b", [&] { (void)p.cache.length(b); });
    expect_refused("b", [&] { (void)p.cache.core_count(b); });
    expect_refused("b", [&] { (void)p.cache.raw_count(b); });
    expect_refused("b", [&] { (void)p.cache.least_length(b); });
  }
  expect_refused("length", [&] { p.cache.truncate(0, -1); });
  expect_refused("length", [&] { p.cache.truncate(0, 15); });
  // Sequence 0 has room for 6 tokens.
  expect_refused("key", [&] { append(p.cache, p.next(7)); });
  expect_refused("key", [&] { append(p.cache, 0, sequence_of(p.next(7), 0)); });
  append(p.cache, p.next(6));
}

TEST(KvCache, RefusesLengthsPerSequence) {
  tensor<float> out({2, 4, 3, 3});
  tensor<float, 3> lse({2, 4, 3});
  const std::array<std::int64_t, 2> lengths{3, 2};
  const auto expect_refused = [&](const std::string& name, auto part) {
    for (const bool answers : {false, true}) {
      prepared_cache p;
      token_views<float> tokens = p.next(3);
      tokens.*part = (tokens.*part).with_lengths(lengths);
      EXPECT_EQ(
          refusal_of([&] { answers ? attend(p.cache, tokens, out.view(), lse.view()) : append(p.cache, tokens); }),
          "cca: " + name +
              ": got lengths per sequence, wants as many tokens for each; the calls of one sequence take any number");
      expect_untouched(p, name);
    }
  };
  expect_refused("query", &token_views<float>::query);
  expect_refused("key", &token_views<float>::key);
  expect_refused("value", &token_views<float>::value);
  prepared_cache p;
  const token_views<float> tokens = p.next(3);
  EXPECT_EQ(refusal_of([&] { attend(p.cache, tokens, out.view().with_lengths(lengths), lse.view()); }),
            "cca: out: got length 2 of sequence 1, wants length 3");
  expect_untouched(p, "out");
}

/// Views that repeat one token need no memory, but what they would make of a cache does.
TEST(KvCache, RefusesMoreTokensThanMemoryCouldHold) {
  prepared_cache p;
  token_views<float> tokens = p.next(1);
  for (tensor_view<const float>* view : {&tokens.query, &tokens.key, &tokens.value}) {
    view->stride[2] = 0;
    // Of four heads of dim 5 or 3: with 2^54 the views themselves can be counted, but not what a cache would hold.
    view->extent[2] = std::int64_t{1} << 54;
  }
  const allocation_limit limit(1000, std::size_t{1} << 24);
  EXPECT_EQ(refusal_of([&] { append(p.cache, tokens); }).find("cca: key: got "), 0U);
}

TEST(KvCache, RefusesShapesAndOptionsThatMakeNoSense) {
  const auto expect_refused = [](const std::string& argument, const auto& change) {
    cache_setup setup = example_cache({.group_size = 3, .window = 4});
    change(setup);
    const std::string message = refusal_of([&] { (void)setup.make(); });
    EXPECT_EQ(message.find("cca: " + argument + ": got "), 0U) << argument << ": " << message;
  };
  expect_refused("shape.batch", [](auto& s) { s.shape.batch = -1; });
  expect_refused("shape.heads", [](auto& s) { s.shape.heads = 0; });
  expect_refused("shape.kv_heads", [](auto& s) { s.shape.kv_heads = 0; });
  expect_refused("shape.kv_heads", [](auto& s) { s.shape.kv_heads = 3; });
  expect_refused("shape.dim", [](auto& s) { s.shape.dim = 0; });
  expect_refused("shape.value_dim", [](auto& s) { s.shape.value_dim = -1; });
  expect_refused("shape.capacity", [](auto& s) { s.shape.capacity = -1; });
  expect_refused("shape.capacity", [](auto& s) { s.shape.capacity = std::int64_t{1} << 57; });
  expect_refused("shape.rewind", [](auto& s) { s.shape.rewind = -1; });
  expect_refused("options.group_size", [](auto& s) { s.options.group_size = -1; });
  expect_refused("options.group_size", [](auto& s) { s.options.window = unlimited; });
  expect_refused("options.window", [](auto& s) { s.options.window = 0; });
  expect_refused("options.pool", [](auto& s) { s.options.pool = static_cast<pooling>(7); });
  expect_refused("options.pool", [](auto& s) { s.options.group_size = 0, s.options.pool = pooling::mean; });
  expect_refused("options.core_heads", [](auto& s) { s.options.core_heads = static_cast<cca::core_heads>(7); });
  expect_refused("options.softmax_scale", [](auto& s) { s.options.softmax_scale = NAN; });
  expect_refused("options.pooling_scale", [](auto& s) { s.options.pooling_scale = -1; });
  expect_refused("options.pooling_scale", [](auto& s) { s.options.pooling_scale = 2, s.options.pool = pooling::mean; });
  expect_refused("options.pooling_scale", [](auto& s) { s.options.pooling_scale = 2, s.options.group_size = 0; });
  expect_refused("options.softcap", [](auto& s) { s.options.softcap = -1; });
  expect_refused("options.first_position", [](auto& s) { s.options.first_position = 0; });
  expect_refused("options.sink_tokens", [](auto& s) { s.options.sink_tokens = -1; });
  // A cache does not know the tokens to come, were nothing pooled.
  expect_refused("options.lookahead", [](auto& s) { s.options = {.lookahead = 1}; });
  expect_refused("options.prefix", [](auto& s) { s.options = {.prefix = 1}; });
}

/// Groups, windows and rewinds beyond any length: everything stays raw.
TEST(KvCache, NumbersMayBeAsLargeAsTheyGet) {
  random_engine random(12);
  constexpr std::int64_t huge = unlimited;
  for (const auto& [group_size, window, sinks, rewind] :
       std::array<std::array<std::int64_t, 4>, 8>{{{1, 2, 0, huge},
                                                   {huge, 2, 0, 0},
                                                   {huge, 2, 0, 1},
                                                   {huge, huge - 1, 0, huge},
                                                   {3, huge - 1, 0, 2},
                                                   {3, huge - 4, 0, 0},
                                                   {3, 2, huge, 0},
                                                   {3, 2, huge - 1, huge}}}) {
    const cache_setup setup =
        example_cache({.group_size = group_size, .window = window, .sink_tokens = sinks}, {.rewind = rewind});
    const operands<float> prompt = random_tokens(setup, 1, 12, random);
    kv_cache<float> cache = setup.make();
    append(cache, tokens_of(prompt, {0, 10}));
    cache.truncate(0, 7);
    attention_rule<float> rule;
    rule.add(attend(cache, tokens_of(prompt, {7, 12})), textbook(views_of(prompt), 5, setup.options), describe(setup));
    EXPECT_TRUE(rule.holds());
    EXPECT_EQ(cache.raw_count(), 12);
    EXPECT_EQ(cache.least_length(), 0);
  }
}

}}  // namespace cca::test
