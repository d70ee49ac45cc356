// SEC: attention within clusters of the same size, answers and gradients beside the definition in double.
#include "sec.hpp"

#include <cmath>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::index;
using policies::rows;
const std::int64_t length = 50, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, count = 4;

/// The cluster of each token, `[kv_heads * length]`: by the number of tokens that are less like the mean.
std::vector<std::int64_t> clusters_of(const rows<double>& key) {
  std::vector<std::int64_t> clusters;
  for (std::int64_t h = 0; h < kv_heads; ++h) {
    std::vector<double> mean(index(dim)), cosine;
    for (std::int64_t j = 0; j < length; ++j)
      for (std::int64_t d = 0; d < dim; ++d) mean[index(d)] += key.row(h, j)[d] / static_cast<double>(length);
    for (std::int64_t j = 0; j < length; ++j)
      cosine.push_back(
          textbook::dot(mean.data(), key.row(h, j), dim) /
          std::sqrt(textbook::dot(mean.data(), mean.data(), dim) * textbook::dot(key.row(h, j), key.row(h, j), dim)));
    for (std::int64_t j = 0; j < length; ++j) {
      std::int64_t before = 0, cluster = 0;
      for (const double other : cosine) before += other < cosine[index(j)];
      while ((cluster + 1) * length / count <= before) ++cluster;
      clusters.push_back(cluster);
    }
  }
  return clusters;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  const auto clusters = clusters_of(key);
  const auto definition = [&] {
    rows<double> out(heads, length, value_dim);
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < length; ++t) {
        std::vector<textbook::seen_row> seen;
        const std::int64_t* const cluster = clusters.data() + h / 2 * length;
        for (std::int64_t j = 0; j < length; ++j)
          if (cluster[j] == cluster[t])
            seen.push_back({textbook::score(query.row(h, t), key.row(h / 2, j), dim), value.row(h / 2, j)});
        textbook::answer(seen, out.row(h, t), value_dim);
      }
    return out;
  };

  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1);
  const policies::equitable_clusters<double> sec(operand(key), count);
  sec.attend(operand(query), operand(key), operand(value), {out.view(), lse.numbers()});
  checks.same("answers", out, definition());

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  sec.gradient(operand(query), operand(key), operand(value), {out.view(), lse.numbers()}, operand(grad_out),
               grad_query.view(), grad_key.view(), grad_value.view());
  const auto loss = [&] { return textbook::product(definition(), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);

  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), all = static_cast<double>(length);
  textbook::print_cost("SEC, mean", all / static_cast<double>(count), all * row_bytes);
  textbook::print_cost("dense attention, both ways", all, all * row_bytes);
  return checks.failures();
}
