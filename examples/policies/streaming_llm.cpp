// A stream of tokens by StreamingLLM: a prompt, then token by token, beside the definition in double.
#include "streaming_llm.hpp"

#include <algorithm>
#include <vector>

#include "textbook.hpp"

int main() {
  const std::int64_t length = 90, prompt = 40, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, sinks = 4, window = 12;
  const auto query = textbook::random_rows(heads, length, dim, 1),
             key = textbook::random_rows(kv_heads, length, dim, 2),
             value = textbook::random_rows(kv_heads, length, value_dim, 3);

  policies::rows<double> out(heads, length, value_dim), wanted = out;
  policies::streaming_llm<double> cache(
      {.batch = 1, .heads = heads, .kv_heads = kv_heads, .dim = dim, .value_dim = value_dim}, sinks, window);
  for (std::int64_t first = 0, count = prompt; first < length; first += count, count = 1)
    cache.attend(query.view().slice(first, count), key.view().slice(first, count), value.view().slice(first, count),
                 out.view().slice(first, count));

  // The textbook: for every token the list of what is in the cache, and its place in that list is its position.
  const policies::rope turn;
  std::vector<double> turned_query(static_cast<std::size_t>(dim)), turned_key = turned_query;
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t t = 0; t < length; ++t) {
      std::vector<std::int64_t> cached;
      for (std::int64_t j = 0; j <= t; ++j)
        if (j < sinks || j > t - window) cached.push_back(j);
      const auto last = static_cast<double>(cached.size()) - 1;
      turn.turn(query.row(h, t), turned_query.data(), dim, last);
      std::vector<textbook::seen_row> seen;
      for (std::size_t place = 0; place < cached.size(); ++place) {
        turn.turn(key.row(h / 2, cached[place]), turned_key.data(), dim, static_cast<double>(place));
        seen.push_back({textbook::score(turned_query.data(), turned_key.data(), dim), value.row(h / 2, cached[place])});
      }
      textbook::answer(seen, wanted.row(h, t), value_dim);
    }
  textbook::checks checks;
  checks.same("answers", out, wanted);

  const auto row_bytes = static_cast<double>((dim + value_dim) * static_cast<std::int64_t>(sizeof(double)));
  textbook::print_cost("StreamingLLM, last token", static_cast<double>(sinks + window),
                       static_cast<double>(cache.bytes()) / static_cast<double>(kv_heads));
  textbook::print_cost("dense attention, last token", static_cast<double>(length),
                       static_cast<double>(length) * row_bytes);
  return checks.failures();
}
