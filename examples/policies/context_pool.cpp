// ContextPool before causal attention: answers and gradients, those of weights and widths too, beside the definition
// in double.
#include "context_pool.hpp"

#include <cmath>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 50, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, reach = 10;

/// One pooled row, by the formula as it reads.
std::vector<double> pooled(const rows<double>& x, std::int64_t h, std::int64_t i, const rows<double>& weight,
                           const rows<double>& width) {
  std::vector<double> y(policies::index(x.dim));
  double sum = 0;
  for (std::int64_t j = 0; j <= i; ++j) {
    if (i - j >= reach) continue;
    const double w =
        *weight.row(0, j) * std::exp(-std::pow(static_cast<double>(i - j), 2) / (2 * std::pow(*width.row(0, i), 2)));
    for (std::int64_t d = 0; d < x.dim; ++d) y[policies::index(d)] += w * x.row(h, j)[d];
    sum += w;
  }
  for (double& number : y) number /= sum;
  return y;
}

rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value,
                        const rows<double>& weight, const rows<double>& width) {
  rows<double> out(heads, length, value_dim);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<std::vector<double>> keys, values;
    for (std::int64_t t = 0; t < length; ++t) {
      keys.push_back(pooled(key, h / 2, t, weight, width));
      values.push_back(pooled(value, h / 2, t, weight, width));
      std::vector<textbook::seen_row> seen;
      for (std::size_t j = 0; j < keys.size(); ++j)
        seen.push_back({textbook::score(query.row(h, t), keys[j].data(), dim), values[j].data()});
      textbook::answer(seen, out.row(h, t), value_dim);
    }
  }
  return out;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3), weight = textbook::random_rows(1, length, 1, 4),
       width = textbook::random_rows(1, length, 1, 5);
  for (double& w : weight.data) w = std::exp(w);
  for (double& s : width.data) s = 1 + 4 / (1 + std::exp(s));
  const auto operand = [](const rows<double>& r) { return r.view(); };

  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::context_pool<double> pool(weight.data, width.data, reach);
  const rows<double> pooled_key = pool.pooled(operand(key)), pooled_value = pool.pooled(operand(value));
  policies::kernels::attention<double>({operand(query), pooled_key.view(), pooled_value.view()},
                                       {out.view(), lse.numbers()});
  checks.same("answers", out, definition(query, key, value, weight, width));

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 6);
  rows<double> grad_query = query, grad_key = key, grad_value = value, grad_pooled_key = key, grad_pooled_value = value,
               grad_weight = weight, grad_width = width;
  policies::kernels::attention_gradient<double>({operand(query), pooled_key.view(), pooled_value.view()},
                                                {out.view(), lse.numbers()}, {grad_out.view()},
                                                {grad_query.view(), grad_pooled_key.view(), grad_pooled_value.view()});
  pool.gradient(operand(key), operand(value), grad_pooled_key, grad_pooled_value, grad_key, grad_value,
                grad_weight.data, grad_width.data);
  const auto loss = [&] { return textbook::product(definition(query, key, value, weight, width), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);
  checks.derivative("gradient of the weights", weight, grad_weight, loss);
  checks.derivative("gradient of the widths", width, grad_width, loss);

  // As much as dense attention, and the tokens that the next one still pools.
  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), all = static_cast<double>(length);
  textbook::print_cost("ContextPool, last token", all, (all + static_cast<double>(reach - 1)) * row_bytes);
  textbook::print_cost("dense attention, last token", all, all * row_bytes);
  return checks.failures();
}
