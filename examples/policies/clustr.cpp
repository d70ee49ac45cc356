// ClusTR's attention of an image's tokens to their clusters: answers and gradients beside the definition in double.
#include "clustr.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::index;
using policies::rows;
const std::int64_t length = 60, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, count = 9, neighbours = 5;

/// The distance of two tokens, all heads side by side.
double apart(const rows<double>& key, std::int64_t i, std::int64_t j) {
  double sum = 0;
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t d = 0; d < dim; ++d) sum += std::pow(key.row(h, i)[d] - key.row(h, j)[d], 2);
  return std::sqrt(sum / static_cast<double>(kv_heads * dim));
}

/// The tokens of every cluster.
std::vector<std::vector<std::int64_t>> clusters_of(const rows<double>& key) {
  std::vector<double> density, peak;
  double farthest = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    std::vector<double> nearness;
    for (std::int64_t j = 0; j < length; ++j) {
      nearness.push_back(-apart(key, i, j));
      farthest = std::max(farthest, apart(key, i, j));
    }
    double sum = 0;
    for (const std::int64_t j : textbook::largest(nearness, neighbours)) sum += std::pow(apart(key, i, j), 2);
    density.push_back(std::exp(-sum / static_cast<double>(neighbours)));
  }
  for (std::int64_t i = 0; i < length; ++i) {
    double to_denser = farthest;
    for (std::int64_t j = 0; j < length; ++j)
      if (density[index(j)] > density[index(i)]) to_denser = std::min(to_denser, apart(key, i, j));
    peak.push_back(density[index(i)] * to_denser);
  }
  const auto centres = textbook::largest(peak, count);
  std::vector<std::vector<std::int64_t>> clusters(centres.size());
  for (std::int64_t i = 0; i < length; ++i) {
    std::size_t nearest = 0;  // a centre's own cluster is its own, though another centre may be alike
    for (std::size_t c = 1; c < centres.size(); ++c)
      if (centres[c] == i || (centres[nearest] != i && apart(key, i, centres[c]) < apart(key, i, centres[nearest])))
        nearest = c;
    clusters[nearest].push_back(i);
  }
  return clusters;
}

std::vector<double> sum_of(const rows<double>& of, std::int64_t h, const std::vector<std::int64_t>& tokens,
                           const rows<double>& score) {
  std::vector<double> y(index(of.dim));
  double sum = 0;
  for (const std::int64_t j : tokens) sum += std::exp(*score.row(0, j));
  for (const std::int64_t j : tokens)
    for (std::int64_t d = 0; d < of.dim; ++d) y[index(d)] += std::exp(*score.row(0, j)) / sum * of.row(h, j)[d];
  return y;
}

rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value,
                        const rows<double>& score, const std::vector<std::vector<std::int64_t>>& clusters) {
  rows<double> out(heads, length, value_dim);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<std::vector<double>> keys, values;
    for (const auto& tokens : clusters) {
      keys.push_back(sum_of(key, h / 2, tokens, score));
      values.push_back(sum_of(value, h / 2, tokens, score));
    }
    for (std::int64_t t = 0; t < length; ++t) {
      std::vector<textbook::seen_row> seen;
      for (std::size_t c = 0; c < keys.size(); ++c)
        seen.push_back({textbook::score(query.row(h, t), keys[c].data(), dim), values[c].data()});
      textbook::answer(seen, out.row(h, t), value_dim);
    }
  }
  return out;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3), score = textbook::random_rows(1, length, 1, 4);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  // Two tokens in the middle of all others, alike: both are centres.
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (const std::int64_t j : {3, 30}) std::fill_n(key.row(h, j), dim, 0.0);
  const auto clusters = clusters_of(key);

  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::clustered_tokens<double> tokens(operand(key), score.data, count, neighbours);
  const rows<double> pooled_key = tokens.pooled(operand(key)), pooled_value = tokens.pooled(operand(value));
  const cca::options both_ways{.lookahead = cca::unlimited};
  policies::kernels::attention<double>({operand(query), pooled_key.view(), pooled_value.view()},
                                       {out.view(), lse.numbers()}, both_ways);
  checks.same("answers", out, definition(query, key, value, score, clusters));
  rows<double> great = score;
  for (double& s : great.data) s += 1024;
  const policies::clustered_tokens<double> same_weights(operand(key), great.data, count, neighbours);
  checks.same("values by great scores", same_weights.pooled(operand(value)), pooled_value);

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 5);
  rows<double> grad_query = query, grad_key = key, grad_value = value, grad_score = score, grad_pooled_key = pooled_key,
               grad_pooled_value = pooled_value;
  policies::kernels::attention_gradient<double>(
      {operand(query), pooled_key.view(), pooled_value.view()}, {out.view(), lse.numbers()}, {grad_out.view()},
      {grad_query.view(), grad_pooled_key.view(), grad_pooled_value.view()}, both_ways);
  tokens.gradient(operand(key), operand(value), operand(grad_pooled_key), operand(grad_pooled_value), grad_key,
                  grad_value, grad_score.data);
  const auto loss = [&] { return textbook::product(definition(query, key, value, score, clusters), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);
  checks.derivative("gradient of the scores", score, grad_score, loss);

  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), all = static_cast<double>(length);
  textbook::print_cost("ClusTR", static_cast<double>(count), static_cast<double>(count) * row_bytes);
  textbook::print_cost("dense attention, both ways", all, all * row_bytes);
  return checks.failures();
}
