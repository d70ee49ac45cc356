// An image's tokens merged as in PACT, and a text behind them: answers beside the definition in double.
#include "pact.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::index;
using policies::rows;
const std::int64_t image = 60, text = 20, heads = 4, kv_heads = 2, dim = 8, value_dim = 6, kept = 50;
const double radius = 0.4;

/// Tokens that lie around eight points.
rows<double> image_tokens(std::int64_t width, unsigned seed) {
  rows<double> tokens = textbook::random_rows(kv_heads, image, width, seed);
  const rows<double> points = textbook::random_rows(kv_heads, 8, width, seed + 1);
  for (std::int64_t h = 0; h < kv_heads; ++h)
    for (std::int64_t j = 0; j < image; ++j)
      for (std::int64_t d = 0; d < width; ++d)
        tokens.row(h, j)[d] = points.row(h, j % 8)[d] + 0.7 * tokens.row(h, j)[d];
  return tokens;
}

double cosine_distance(const rows<double>& key, std::int64_t i, std::int64_t j) {
  const auto all = [&](std::int64_t a, std::int64_t b) {
    return textbook::dot(key.row(0, a), key.row(0, b), dim) + textbook::dot(key.row(1, a), key.row(1, b), dim);
  };
  return 1 - all(i, j) / std::sqrt(all(i, i) * all(j, j));
}

/// The tokens of every cluster, the densest first.
std::vector<std::vector<std::int64_t>> clusters_of(const rows<double>& key, const std::vector<double>& importance) {
  const auto tokens = textbook::largest(importance, kept);
  std::vector<double> density(index(image), -1.0);
  for (const std::int64_t i : tokens) {
    density[index(i)] = 0;
    for (const std::int64_t j : tokens) density[index(i)] += std::exp(-cosine_distance(key, i, j) / radius);
  }
  std::vector<std::int64_t> centres;
  for (;;) {  // the densest token that is far enough from all centres, as long as there is one
    std::int64_t best = -1;
    for (const std::int64_t i : tokens) {
      bool far_enough = true;
      for (const std::int64_t c : centres) far_enough = far_enough && cosine_distance(key, i, c) > radius;
      if (far_enough && (best < 0 || density[index(i)] > density[index(best)])) best = i;
    }
    if (best < 0) break;
    centres.push_back(best);
  }
  std::vector<std::vector<std::int64_t>> clusters(centres.size());
  for (const std::int64_t i : tokens) {
    std::size_t nearest = 0;
    for (std::size_t c = 1; c < centres.size(); ++c)
      if (cosine_distance(key, i, centres[c]) < cosine_distance(key, i, centres[nearest])) nearest = c;
    clusters[nearest].push_back(i);
  }
  return clusters;
}

std::vector<double> mean_of(const rows<double>& of, std::int64_t h, const std::vector<std::int64_t>& tokens) {
  std::vector<double> sum(index(of.dim));
  for (const std::int64_t j : tokens)
    for (std::int64_t d = 0; d < of.dim; ++d) sum[index(d)] += of.row(h, j)[d] / static_cast<double>(tokens.size());
  return sum;
}

}  // namespace

int main() {
  const auto image_key = image_tokens(dim, 10), image_value = image_tokens(value_dim, 20);
  const auto query = textbook::random_rows(heads, text, dim, 1), key = textbook::random_rows(kv_heads, text, dim, 2),
             value = textbook::random_rows(kv_heads, text, value_dim, 3),
             importance = textbook::random_rows(1, image, 1, 4);

  textbook::checks checks;
  rows<double> out(heads, text, value_dim), wanted = out;
  const policies::merged_prefix<double> merged(image_key.view(), image_value.view(), importance.data, kept, radius);
  policies::kernels::attend<double>({query.view(), key.view(), value.view()}, merged.context(), {out.view()});

  const auto clusters = clusters_of(image_key, importance.data);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<std::vector<double>> keys, values;
    for (const auto& tokens : clusters) {
      keys.push_back(mean_of(image_key, h / 2, tokens));
      values.push_back(mean_of(image_value, h / 2, tokens));
    }
    for (std::int64_t t = 0; t < text; ++t) {
      std::vector<textbook::seen_row> seen;
      for (std::size_t c = 0; c < clusters.size(); ++c)
        seen.push_back(
            {textbook::score(query.row(h, t), keys[c].data(), dim) + std::log(static_cast<double>(clusters[c].size())),
             values[c].data()});
      for (std::int64_t j = 0; j <= t; ++j)
        seen.push_back({textbook::score(query.row(h, t), key.row(h / 2, j), dim), value.row(h / 2, j)});
      textbook::answer(seen, wanted.row(h, t), value_dim);
    }
  }
  checks.same("answers", out, wanted);

  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), seen = static_cast<double>(merged.size() + text);
  textbook::print_cost("PACT, last token", seen, seen * row_bytes + static_cast<double>(merged.size()) * 8);
  textbook::print_cost("dense attention, last token", static_cast<double>(image + text),
                       static_cast<double>(image + text) * row_bytes);
  return checks.failures();
}
