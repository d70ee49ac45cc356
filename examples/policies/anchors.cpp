// Anchor attention over segments of their own lengths: answers and gradients beside its definition in double.
#include "anchors.hpp"

#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 70, heads = 4, kv_heads = 2, dim = 8, value_dim = 6;
const std::vector<std::int64_t> anchors{0, 1, 9, 20, 21, 38, 60};

/// Token j ends a segment, or there is no end of one in `[j, t)`.
bool sees(std::int64_t t, std::int64_t j) {
  bool ended = false;
  for (const std::int64_t anchor : anchors) {
    if (anchor == j) return j <= t;
    ended = ended || (j < anchor && anchor < t);
  }
  return j <= t && !ended;
}

rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value) {
  return textbook::answers(query, key, value, [](std::int64_t, std::int64_t t, std::int64_t j) { return sees(t, j); });
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::evictions policy = policies::anchor_attention(anchors, kv_heads, length);
  const auto context = policy.over(operand(key), operand(value), heads);
  policies::attend_far(operand(query), context, {out.view(), lse.numbers()});
  checks.same("answers", out, definition(query, key, value));

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  policies::attend_far_gradient(operand(query), context, {out.view(), lse.numbers()}, operand(grad_out),
                                grad_query.view(), grad_key.view(), grad_value.view());
  const auto loss = [&] { return textbook::product(definition(query, key, value), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);

  double seen = 0;
  for (std::int64_t j = 0; j < length; ++j) seen += length - 1 < *policy.until.row(0, j) ? 1 : 0;
  const auto row_bytes = static_cast<double>((dim + value_dim) * 8);
  textbook::print_cost("AnchorCoder, last token", seen, seen * row_bytes);
  textbook::print_cost("dense attention, last token", static_cast<double>(length),
                       static_cast<double>(length) * row_bytes);
  return checks.failures();
}
