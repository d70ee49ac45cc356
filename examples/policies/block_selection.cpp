// Quest and MoBA: answers and, as MoBA trains, gradients, beside their definitions in double.
#include "block_selection.hpp"

#include <algorithm>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 100, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, block = 8, count = 4;

/// The blocks that query t of head h sees by the definition, as a list of all of them with a yes or no.
std::vector<std::vector<bool>> choose(const rows<double>& query, const rows<double>& key, bool quest) {
  std::vector<std::vector<bool>> all;
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t t = 0; t < length; ++t) {
      std::vector<double> numbers;
      for (std::int64_t c = 0; c < t / block; ++c) {
        double number = 0;
        for (std::int64_t d = 0; d < dim; ++d) {
          double least = HUGE_VAL, most = -HUGE_VAL, sum = 0;
          for (std::int64_t j = c * block; j < (c + 1) * block; ++j) {
            const double product = query.row(h, t)[d] * key.row(h / 2, j)[d];
            least = std::min(least, product), most = std::max(most, product), sum += product;
          }
          number += quest ? most : sum / static_cast<double>(block);
        }
        numbers.push_back(number);
      }
      std::vector<bool> chosen(policies::index(length / block + 1));
      for (const std::int64_t c : textbook::largest(numbers, count - 1)) chosen[policies::index(c)] = true;
      chosen[policies::index(t / block)] = true;
      all.push_back(chosen);
    }
  return all;
}

rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value,
                        const std::vector<std::vector<bool>>& chosen) {
  return textbook::answers(query, key, value, [&](std::int64_t h, std::int64_t t, std::int64_t j) {
    return chosen[policies::index(h * length + t)][policies::index(j / block)];
  });
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const policies::quest_bounds<double> bounds(key.view(), block);
  const policies::moba_means<double> means(key.view(), block);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);

  const policies::block_selection quest(operand(query), 0, kv_heads, bounds, block, count);
  policies::attend_far(operand(query), quest.over(operand(key), operand(value)), {out.view(), lse.numbers()});
  checks.same("Quest", out, definition(query, key, value, choose(query, key, true)));

  // One step of decoding: the last query alone.
  const auto last = operand(query).slice(length - 1, 1);
  const policies::block_selection step(last, length - 1, kv_heads, bounds, block, count);
  rows<double> answer(heads, 1, value_dim), of_whole = answer;
  policies::attend_far(last, step.over(operand(key), operand(value)), {answer.view()}, length - 1);
  for (std::int64_t h = 0; h < heads; ++h) std::copy_n(out.row(h, length - 1), value_dim, of_whole.row(h, 0));
  checks.same("Quest, a step", answer, of_whole);

  const policies::block_selection moba(operand(query), 0, kv_heads, means, block, count);
  const auto context = moba.over(operand(key), operand(value));
  const auto chosen = choose(query, key, false);
  policies::attend_far(operand(query), context, {out.view(), lse.numbers()});
  checks.same("MoBA", out, definition(query, key, value, chosen));

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  policies::attend_far_gradient(operand(query), context, {out.view(), lse.numbers()}, operand(grad_out),
                                grad_query.view(), grad_key.view(), grad_value.view());
  const auto loss = [&] { return textbook::product(definition(query, key, value, chosen), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss, "MoBA, ");

  // A score with a pair of bounds reads two rows of keys, one with a mean reads one.
  const double rows_of_blocks = static_cast<double>(length / block), read = static_cast<double>(count * block),
               row_bytes = static_cast<double>((dim + value_dim) * 8), key_bytes = static_cast<double>(dim * 8),
               kept = static_cast<double>(length) * row_bytes;
  textbook::print_cost("Quest, last token", 2 * rows_of_blocks + read, kept + 2 * rows_of_blocks * key_bytes);
  textbook::print_cost("MoBA, last token", rows_of_blocks + read, kept + rows_of_blocks * key_bytes);
  textbook::print_cost("dense attention, last token", static_cast<double>(length), kept);
  return checks.failures();
}
