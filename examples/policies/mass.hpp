#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// What queries give to keys: `f(h, i, j, exp(scale q_i . k_j - lse_i))` for each query head h, query i and key j that
/// it sees. Attention hands out no weights; its log-sum-exps give them back.
///
/// @param first  the position of query 0; a query sees the keys up to its position, and all where `first` is
///   `cca::unlimited`
template <class T, class F>
void for_each_weight(view<const T> query, view<const T> key, cca::lse_view<const T> lse, std::int64_t first,
                     const F& f) {
  const std::int64_t sharing = query.heads() / key.heads();
  const double scale = 1 / std::sqrt(static_cast<double>(query.dim()));
  for (std::int64_t h = 0; h < query.heads(); ++h)
    for (std::int64_t i = 0; i < query.length(); ++i) {
      const std::int64_t keys = first == cca::unlimited ? key.length() : std::min(first + i + 1, key.length());
      for (std::int64_t j = 0; j < keys; ++j) {
        double product = 0;
        for (std::int64_t d = 0; d < query.dim(); ++d)
          product += static_cast<double>(query.row(0, h, i)[d]) * static_cast<double>(key.row(0, h / sharing, j)[d]);
        f(h, i, j, std::exp(scale * product - static_cast<double>(*lse.row(0, h, i))));
      }
    }
}

/// The same summed over queries and over the query heads that share the key's head: `mass[key/value head][j]`.
template <class T>
void add_mass(view<const T> query, view<const T> key, cca::lse_view<const T> lse, std::int64_t first,
              rows<double>& mass) {
  const std::int64_t sharing = query.heads() / key.heads();
  for_each_weight(query, key, lse, first, [&](std::int64_t h, std::int64_t, std::int64_t j, double weight) {
    *mass.row(h / sharing, j) += weight;
  });
}

/// The places of the `count` largest of `length` numbers, ascending; the first of equals.
[[nodiscard]] inline std::vector<std::int64_t> places_of_largest(const double* numbers, std::int64_t length,
                                                                 std::int64_t count) {
  std::vector<std::pair<double, std::int64_t>> all;
  for (std::int64_t j = 0; j < length; ++j) all.emplace_back(-numbers[j], j);
  const std::int64_t chosen = std::min(count, length);
  std::partial_sort(all.begin(), all.begin() + chosen, all.end());
  std::vector<std::int64_t> places;
  for (std::int64_t j = 0; j < chosen; ++j) places.push_back(all[index(j)].second);
  std::sort(places.begin(), places.end());
  return places;
}

}  // namespace policies
