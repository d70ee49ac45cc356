// Recycled Attention: answers and gradients beside its definition in double.
#include "recycled_attention.hpp"

#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 90, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, stride = 7, count = 9;

/// What query t of a head of keys sees by the definition.
std::vector<std::int64_t> tokens_of(const rows<double>& query, const rows<double>& key, std::int64_t kv_head,
                                    std::int64_t t) {
  const std::int64_t full = t / stride * stride;
  std::vector<std::int64_t> tokens;
  if (t == full) {
    for (std::int64_t j = 0; j <= t; ++j) tokens.push_back(j);
    return tokens;
  }
  std::vector<double> mass(policies::index(full + 1));
  for (const std::int64_t h : {2 * kv_head, 2 * kv_head + 1}) {
    std::vector<textbook::seen_row> seen;
    for (std::int64_t j = 0; j <= full; ++j)
      seen.push_back({textbook::score(query.row(h, full), key.row(kv_head, j), dim), nullptr});
    const auto weights = textbook::weights(seen);
    for (std::size_t j = 0; j < mass.size(); ++j) mass[j] += weights[j];
  }
  tokens = textbook::largest(mass, count);
  for (std::int64_t j = full + 1; j <= t; ++j) tokens.push_back(j);
  return tokens;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };

  // The textbook, given what was chosen.
  std::vector<std::vector<std::int64_t>> chosen;
  double scores = 0;
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t t = 0; t < length; ++t) {
      chosen.push_back(tokens_of(query, key, h, t));
      scores += static_cast<double>(chosen.back().size()) / static_cast<double>(kv_heads * length);
    }
  const auto definition = [&] {
    rows<double> out(heads, length, value_dim);
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < length; ++t) {
        std::vector<textbook::seen_row> seen;
        for (const std::int64_t j : chosen[policies::index(h / 2 * length + t)])
          seen.push_back({textbook::score(query.row(h, t), key.row(h / 2, j), dim), value.row(h / 2, j)});
        textbook::answer(seen, out.row(h, t), value_dim);
      }
    return out;
  };

  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::recycled_attention<double> recycled(operand(query), operand(key), operand(value), stride, count);
  recycled.attend({out.view(), lse.numbers()});
  checks.same("answers", out, definition());

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  recycled.gradient({out.view(), lse.numbers()}, operand(grad_out), grad_query.view(), grad_key.view(),
                    grad_value.view());
  const auto loss = [&] { return textbook::product(definition(), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);

  const double row_bytes = static_cast<double>((dim + value_dim) * 8), kept = static_cast<double>(length) * row_bytes;
  textbook::print_cost("Recycled Attention, mean", scores, kept + static_cast<double>(count + stride) * row_bytes);
  textbook::print_cost("dense attention, mean", static_cast<double>(length + 1) / 2, kept);
  return checks.failures();
}
