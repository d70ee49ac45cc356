// What of a cache can be taken back, after whatever steps and truncations.

#include "kv_cache_steps.hpp"

namespace cca::test { namespace {

constexpr std::array example_options{options{.group_size = 1, .window = 4}, options{.group_size = 4, .window = 4},
                                     options{.group_size = 16, .window = 4}, options{.group_size = 3, .window = 32},
                                     options{.group_size = 3, .window = 4, .sink_tokens = 5},
                                     options{.group_size = 3, .window = 70, .pool = pooling::select_by_mass}};

/// Speculative decoding whose drafts are refused again and again: the draft may be as long as the rewind, and as many
/// tokens before it can still be taken back, without a trace of the draft.
TEST(KvCacheRewind, RefusedDraftsCostNothing) {
  random_engine random(1);
  for (const options& options : example_options)
    for (const std::int64_t rewind : {1, 2, 5, 8}) {
      const cache_setup setup = example_cache(options, {.rewind = rewind});
      const std::int64_t settled = 2 * setup.raw_limit() + 3, more = options.window + options.group_size;
      const operands<float> prompt = random_tokens(setup, 1, settled + more, random);
      operands<float> draft = random_tokens(setup, 1, rewind, random);
      for (tensor<float>* t : {&draft.query, &draft.key, &draft.value})
        t->fill(std::numeric_limits<float>::quiet_NaN());
      const std::string label = describe(setup);

      kv_cache<float> cache = setup.make();
      append(cache, tokens_of(prompt, {0, settled}));
      for (int times = 0; times < 3; ++times) {
        attend(cache, views_of(draft));
        cache.truncate(0, settled);
        ASSERT_LE(cache.least_length(), settled - rewind) << label << ", refused " << times + 1 << " times";
      }
      cache.truncate(0, settled - rewind);
      kv_cache<float> clean = setup.make();
      append(clean, tokens_of(prompt, {0, settled - rewind}));
      const token_views<float> next = tokens_of(prompt, {settled - rewind, settled + more});
      ASSERT_TRUE(same_bits(attend(cache, next), attend(clean, next))) << label;
    }
}

/// Beside the cache a model that keeps numbers of tokens alone.
TEST(KvCacheRewind, IsAsFarAsSaidAfterAnySteps) {
  random_engine random(2);
  const operands<float> tokens = random_tokens(example_cache({}), 1, 40, random);
  for (int life = 0; life < 200; ++life) {
    const cache_setup setup = example_cache({.group_size = draw(random, 1, 9),
                                             .window = draw(random, 1, 12),
                                             .sink_tokens = draw(random, 0, 2) * draw(random, 0, 20)},
                                            {.rewind = draw(random, 0, 6)});
    const partition partition = partition_of(setup.options);
    const std::int64_t rewind = setup.shape.rewind;
    kv_cache<float> cache = setup.make();
    std::int64_t length = 0, longest = 0;
    for (int step = 0; step < 60; ++step) {
      if (draw(random, 0, 1) == 0) {
        const std::int64_t count = draw(random, 1, draw_from(random, std::array<std::int64_t, 3>{1, 6, 40}));
        append(cache, tokens_of(tokens, {0, count}));
        length += count;
        longest = std::max(longest, length);
      } else {
        length = draw(random, cache.least_length(), length);
        cache.truncate(0, length);
      }
      SCOPED_TRACE(describe(setup) + ", life " + std::to_string(life) + ", step " + std::to_string(step) + ", length " +
                   std::to_string(length) + " of " + std::to_string(longest));
      // What has left: all but the newest tokens of the longest that it was.
      const std::int64_t oldest = std::max<std::int64_t>(longest - setup.raw_limit(), 0);
      std::int64_t least = length;
      while (least > 0 && intersection(partition.raw(least - 1), {0, oldest}).empty()) --least;
      ASSERT_EQ(cache.least_length(), least);
      ASSERT_LE(least, std::max<std::int64_t>(longest - 2 * rewind, 0));
      ASSERT_LE(cache.raw_count(),
                setup.options.sink_tokens + setup.options.window + setup.options.group_size + 2 * rewind);
      ASSERT_THROW(cache.truncate(0, least - 1), std::invalid_argument);
    }
  }
}

}}  // namespace cca::test
