#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels.hpp"

/// What the programs check their policies with: a softmax in double over rows that the program names itself, and
/// derivatives by differences.
namespace textbook {

using policies::rows;

/// Numbers around 0 of variance 1, the same with every standard library.
inline rows<double> random_rows(std::int64_t heads, std::int64_t length, std::int64_t dim, unsigned seed) {
  std::mt19937 random(seed);
  rows<double> result(heads, length, dim);
  for (double& x : result.data) {
    x = -6;
    for (int i = 0; i < 12; ++i) x += static_cast<double>(random()) * 0x1p-32;
  }
  return result;
}

inline double dot(const double* a, const double* b, std::int64_t dim) {
  double sum = 0;
  for (std::int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

/// The scaled product of a query and a key.
inline double score(const double* query, const double* key, std::int64_t dim) {
  return dot(query, key, dim) / std::sqrt(static_cast<double>(dim));
}

/// A row that a query sees.
struct seen_row {
  double score;
  const double* value;
};

/// The softmax's weights of rows.
inline std::vector<double> weights(const std::vector<seen_row>& seen) {
  double most = seen.front().score, sum = 0;
  for (const seen_row& row : seen) most = std::max(most, row.score);
  std::vector<double> result;
  for (const seen_row& row : seen) result.push_back(std::exp(row.score - most));
  for (const double w : result) sum += w;
  for (double& w : result) w /= sum;
  return result;
}

/// One query's answer.
inline void answer(const std::vector<seen_row>& seen, double* out, std::int64_t dim) {
  const std::vector<double> w = weights(seen);
  std::fill_n(out, dim, 0.0);
  for (std::size_t j = 0; j < seen.size(); ++j)
    for (std::int64_t d = 0; d < dim; ++d) out[d] += w[j] * seen[j].value[d];
}

/// The answers of queries that see the tokens j of those up to their own for which `sees(h, t, j)` holds.
template <class Sees>
rows<double> answers(const rows<double>& query, const rows<double>& key, const rows<double>& value, const Sees& sees) {
  const std::int64_t sharing = query.heads / key.heads;
  rows<double> out(query.heads, query.length, value.dim);
  for (std::int64_t h = 0; h < query.heads; ++h)
    for (std::int64_t t = 0; t < query.length; ++t) {
      std::vector<seen_row> seen;
      for (std::int64_t j = 0; j <= t; ++j)
        if (sees(h, t, j))
          seen.push_back({score(query.row(h, t), key.row(h / sharing, j), query.dim), value.row(h / sharing, j)});
      answer(seen, out.row(h, t), value.dim);
    }
  return out;
}

/// The `count` largest of numbers, ascending; the first of equals.
inline std::vector<std::int64_t> largest(const std::vector<double>& numbers, std::int64_t count) {
  std::vector<std::int64_t> order;
  for (std::size_t i = 0; i < numbers.size(); ++i) order.push_back(static_cast<std::int64_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return numbers[policies::index(a)] > numbers[policies::index(b)];
  });
  order.resize(std::min(order.size(), policies::index(count)));
  std::sort(order.begin(), order.end());
  return order;
}

inline double product(const rows<double>& a, const rows<double>& b) {
  return dot(a.data.data(), b.data.data(), static_cast<std::int64_t>(a.data.size()));
}

/// Collects what does not agree.
class checks {
 public:
  /// Whether two results are equal but for rounding in double.
  void same(const char* what, const rows<double>& got, const rows<double>& wanted) {
    double difference = got.data.size() == wanted.data.size() ? 0 : HUGE_VAL;
    for (std::size_t i = 0; i < std::min(got.data.size(), wanted.data.size()); ++i)
      if (!(std::abs(got.data[i] - wanted.data[i]) <= difference)) difference = std::abs(got.data[i] - wanted.data[i]);
    report(what, difference <= 1e-12, difference);
  }

  /// Whether `gradient` is that of `loss()` in `x`, along a random direction, by the central difference.
  template <class Loss>
  void derivative(const char* what, rows<double>& x, const rows<double>& gradient, const Loss& loss) {
    const rows<double> direction = random_rows(x.heads, x.length, x.dim, 99), kept = x;
    const double step = 1e-5;
    const auto moved = [&](double by) {
      for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] = kept.data[i] + by * direction.data[i];
      const double result = loss();
      x = kept;
      return result;
    };
    const double wanted = (moved(step) - moved(-step)) / (2 * step), got = product(gradient, direction);
    report(what, std::abs(got - wanted) <= 1e-7 * (1 + std::abs(wanted)), std::abs(got - wanted));
  }

  /// The same of a policy's three operands.
  template <class Loss>
  void derivatives(rows<double>& query, const rows<double>& grad_query, rows<double>& key, const rows<double>& grad_key,
                   rows<double>& value, const rows<double>& grad_value, const Loss& loss, const std::string& of = "") {
    derivative((of + "gradient of the query").c_str(), query, grad_query, loss);
    derivative((of + "gradient of the key").c_str(), key, grad_key, loss);
    derivative((of + "gradient of the value").c_str(), value, grad_value, loss);
  }

  /// For `main` to return.
  [[nodiscard]] int failures() const { return failures_; }

 private:
  void report(const char* what, bool right, double difference) {
    std::printf("%s: %s\n", what, right ? "as the textbook" : "WRONG");
    if (!right) std::fprintf(stderr, "%s differs by %g\n", what, difference);
    failures_ += !right;
  }

  int failures_ = 0;
};

/// What a policy costs beside dense attention.
inline void print_cost(const char* what, double scores, double kept_bytes) {
  std::printf("%-28s scores per query and head: %7.1f, bytes per key/value head: %7.0f\n", what, scores, kept_bytes);
}

}  // namespace textbook
