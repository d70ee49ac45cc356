// Dynamic Group Attention: importance by the latest queries, answers and gradients, beside its definition in double.
#include "dga.hpp"

#include <algorithm>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 90, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, focal = 20, group_size = 4,
                   latest = 12;

/// One row: its tokens with their weights, and the positions `[from, until)` that see it.
struct pooled_row {
  std::vector<std::int64_t> tokens;
  std::vector<double> weights;
  std::int64_t from, until;
};

/// What the latest queries give to each token of a head of keys, in dense attention.
std::vector<double> importance_of(const rows<double>& query, const rows<double>& key, std::int64_t kv_head) {
  std::vector<double> sums(policies::index(length));
  for (const std::int64_t h : {2 * kv_head, 2 * kv_head + 1})
    for (std::int64_t t = length - latest; t < length; ++t) {
      std::vector<textbook::seen_row> seen;
      for (std::int64_t j = 0; j <= t; ++j)
        seen.push_back({textbook::score(query.row(h, t), key.row(kv_head, j), dim), nullptr});
      const auto weights = textbook::weights(seen);
      for (std::size_t j = 0; j < weights.size(); ++j) sums[j] += weights[j];
    }
  return sums;
}

std::vector<pooled_row> rows_of(const std::vector<double>& importance) {
  const auto raw = textbook::largest(importance, focal);
  std::vector<pooled_row> all;
  pooled_row group{};
  for (std::int64_t j = 0; j < length; ++j) {
    all.push_back({{j}, {1}, j, cca::unlimited});
    if (std::find(raw.begin(), raw.end(), j) != raw.end()) continue;
    group.tokens.push_back(j);
    group.weights.push_back(importance[policies::index(j)]);
    if (std::ssize(group.tokens) < group_size) continue;
    double sum = 0;
    for (const double w : group.weights) sum += w;
    for (double& w : group.weights) w /= sum;
    for (const std::int64_t i : group.tokens)
      for (pooled_row& row : all)
        if (row.tokens == std::vector{i}) row.until = j + 1;
    all.push_back({group.tokens, group.weights, j + 1, cca::unlimited});
    group = {};
  }
  return all;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  std::vector<std::vector<pooled_row>> groups;  // the textbook's, which stay as they are under differences
  for (std::int64_t h = 0; h < kv_heads; ++h) groups.push_back(rows_of(importance_of(query, key, h)));
  const auto definition = [&] {
    const auto pooled = [](const rows<double>& from, std::int64_t h, const pooled_row& row) {
      std::vector<double> sum(policies::index(from.dim));
      for (std::size_t i = 0; i < row.tokens.size(); ++i)
        for (std::int64_t d = 0; d < from.dim; ++d)
          sum[policies::index(d)] += row.weights[i] * from.row(h, row.tokens[i])[d];
      return sum;
    };
    rows<double> out(heads, length, value_dim);
    for (std::int64_t h = 0; h < heads; ++h) {
      std::vector<std::vector<double>> keys, values;
      const auto& all = groups[policies::index(h / 2)];
      for (const pooled_row& row : all) {
        keys.push_back(pooled(key, h / 2, row));
        values.push_back(pooled(value, h / 2, row));
      }
      for (std::int64_t t = 0; t < length; ++t) {
        std::vector<textbook::seen_row> seen;
        for (std::size_t j = 0; j < all.size(); ++j)
          if (all[j].from <= t && t < all[j].until)
            seen.push_back({textbook::score(query.row(h, t), keys[j].data(), dim), values[j].data()});
        textbook::answer(seen, out.row(h, t), value_dim);
      }
    }
    return out;
  };

  // Dense attention of the latest queries says what matters.
  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1), importance(kv_heads, length, 1);
  const auto asking = operand(query).slice(length - latest, latest);
  const auto their_lse = lse.numbers().slice(length - latest, latest);
  policies::kernels::attention<double>({asking, operand(key), operand(value)},
                                       {out.view().slice(length - latest, latest), their_lse});
  policies::add_mass<double>(asking, operand(key), their_lse, length - latest, importance);

  const policies::dynamic_groups<double> dga(operand(key), operand(value), importance, focal, group_size);
  policies::attend_far(operand(query), dga.context(), {out.view(), lse.numbers()});
  checks.same("answers", out, definition());

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = dga.rows_like_keys(), grad_value = dga.rows_like_values();
  policies::attend_far_gradient(operand(query), dga.context(), {out.view(), lse.numbers()}, operand(grad_out),
                                grad_query.view(), grad_key.view(), grad_value.view());
  const auto of_tokens = [&](rows<double>& grad) {
    dga.to_tokens(grad);
    rows<double> first(grad.heads, length, grad.dim);
    policies::add_rows<double>(operand(grad).slice(0, length), first.view());
    return first;
  };
  const auto loss = [&] { return textbook::product(definition(), grad_out); };
  checks.derivatives(query, grad_query, key, of_tokens(grad_key), value, of_tokens(grad_value), loss);

  // What the last query sees is all that a cache keeps then.
  const auto seen = static_cast<double>(dga.seen(0, length - 1)),
             row_bytes = static_cast<double>((dim + value_dim) * 8);
  textbook::print_cost("DGA, last token", seen, seen * row_bytes);
  textbook::print_cost("dense attention, last token", static_cast<double>(length),
                       static_cast<double>(length) * row_bytes);
  return checks.failures();
}
