// A prompt, a draft of tokens of which some are refused, and what the cache holds meanwhile; its answers are those of
// attention over the whole sequence.
#include <algorithm>
#include <cca/cca.hpp>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  const std::int64_t length = 300, heads = 4, kv_heads = 2, dim = 16;
  const cca::options options{.group_size = 8, .window = 32};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto tokens = [&](std::int64_t h) {
    std::vector<float> data(static_cast<std::size_t>(length * h * dim));
    for (float& x : data) x = normal(random);
    return data;
  };
  const std::vector<float> q = tokens(heads), k = tokens(kv_heads), v = tokens(kv_heads);
  std::vector<float> whole(q.size()), answers(q.size());
  const auto query = cca::bshd(q.data(), 1, length, heads, dim), key = cca::bshd(k.data(), 1, length, kv_heads, dim),
             value = cca::bshd(v.data(), 1, length, kv_heads, dim);
  const auto out = cca::bshd(answers.data(), 1, length, heads, dim);
  cca::attention(query, key, value, cca::bshd(whole.data(), 1, length, heads, dim), options);

  cca::kv_cache<float> cache({.batch = 1, .heads = heads, .kv_heads = kv_heads, .dim = dim, .rewind = 4}, options);
  const auto append = [&](const char* what, std::int64_t count) {
    const std::int64_t first = cache.length();
    cache.attend(query.slice(first, count), key.slice(first, count), value.slice(first, count),
                 out.slice(first, count));
    std::printf("%-16s %3lld tokens: %2lld cores, %2lld raw, %5zu bytes of keys and values\n", what,
                static_cast<long long>(cache.length()), static_cast<long long>(cache.core_count()),
                static_cast<long long>(cache.raw_count()), cache.bytes());
  };
  append("a prompt of 200,", 200);
  append("a draft of 5,", 5);
  cache.truncate(0, cache.length() - 3);
  append("3 refused, 1 on,", 1);
  append("the rest,", length - cache.length());

  float difference = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) difference = std::max(difference, std::abs(whole[i] - answers[i]));
  std::printf("answers as of the whole sequence: %s\n", difference < 1e-5f ? "yes" : "no");
}
