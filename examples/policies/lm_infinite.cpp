// LM-Infinite: answers and gradients beside its definition in double.
#include "lm_infinite.hpp"

#include <algorithm>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 80, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, sinks = 5, trained_length = 16;

/// Every pair of a query and a key is turned by its own distance.
rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value) {
  const policies::rope turn;
  rows<double> out(heads, length, value_dim);
  std::vector<double> turned(policies::index(dim));
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t t = 0; t < length; ++t) {
      std::vector<textbook::seen_row> seen;
      for (std::int64_t j = 0; j <= t; ++j) {
        if (j >= sinks && t - j >= trained_length) continue;
        turn.turn(query.row(h, t), turned.data(), dim, static_cast<double>(std::min(t - j, trained_length)));
        seen.push_back({textbook::score(turned.data(), key.row(h / 2, j), dim), value.row(h / 2, j)});
      }
      textbook::answer(seen, out.row(h, t), value_dim);
    }
  return out;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::lm_infinite<double> policy(operand(query), operand(key), operand(value), sinks, trained_length);
  policy.attend({out.view(), lse.numbers()});
  checks.same("answers", out, definition(query, key, value));

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  policy.gradient({out.view(), lse.numbers()}, operand(grad_out), grad_query, grad_key, grad_value);
  const auto loss = [&] { return textbook::product(definition(query, key, value), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);

  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), kept = static_cast<double>(sinks + trained_length);
  textbook::print_cost("LM-Infinite, last token", kept, kept * row_bytes);
  textbook::print_cost("dense attention, last token", static_cast<double>(length),
                       static_cast<double>(length) * row_bytes);
  return checks.failures();
}
