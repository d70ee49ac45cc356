#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <cca/cca.hpp>
#include <cca/reference.hpp>

/// Operands of a case, and the check that every case passes before it is timed.
namespace bench {

template <class T>
using tensor = cca::reference::tensor<T>;

/// Nearly normal numbers, mean 0 and variance 1: the sum of four uniform ones, from a counter hashed (SplitMix64).
template <class T>
void fill(tensor<T>& to, std::uint64_t seed) {
  std::uint64_t counter = seed << 40;
  for (T& x : to.data) {
    std::uint64_t z = counter += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    std::int64_t sum = -2 * 0xffff;
    for (int i = 0; i < 4; ++i) sum += static_cast<std::int64_t>(z >> (16 * i) & 0xffff);
    x = static_cast<T>(static_cast<double>(sum) * (1.7320508 / 0x10000));
  }
}

template <class T>
struct operands {
  tensor<T> query, key, value, out;
  tensor<float> lse;
  bool heads_last = false;  ///< in memory `[batch, length, heads, dim]`, not `[batch, heads, length, dim]`

  operands(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads, std::int64_t queries, std::int64_t length,
           std::int64_t dim)
      : query(batch, heads, queries, dim),
        key(batch, kv_heads, length, dim),
        value(batch, kv_heads, length, dim),
        out(batch, heads, queries, dim),
        lse(batch, heads, queries, 1) {
    fill(query, 1);
    fill(key, 2);
    fill(value, 3);
  }

  /// One of the tensors in this layout.
  template <class Tensor>
  [[nodiscard]] auto view(Tensor& of) const {
    return heads_last ? cca::bshd(of.data.data(), of.extent[0], of.extent[2], of.extent[1], of.extent[3]) : of.view();
  }
  [[nodiscard]] auto lse_view() { return cca::bhs(lse.data.data(), lse.extent[0], lse.extent[1], lse.extent[2]); }
};

/// One head of a view as a view.
template <class T>
cca::tensor_view<T> head_of(cca::tensor_view<T> view, std::int64_t b, std::int64_t h) {
  return {view.row(b, h, 0), {1, 1, view.length(), view.dim()}, view.stride};
}

/// Queries worth a look: the first, the last, those at the edges of every tile width, of groups and of the window, and
/// some between.
inline std::vector<std::int64_t> sample(std::int64_t queries, std::int64_t first_position,
                                        const cca::options& options) {
  std::vector<std::int64_t> rows{0, queries - 1};
  for (std::int64_t edge = 4; edge <= 512; edge *= 2) rows.insert(rows.end(), {edge - 1, edge, queries - edge});
  if (options.window != cca::unlimited)
    for (std::int64_t edge : {options.window, options.window + options.group_size})
      rows.insert(rows.end(), {edge - 2 - first_position, edge - 1 - first_position, edge - first_position});
  for (std::int64_t i = 1; i < 8; ++i) rows.push_back(queries * i / 8 + i);
  std::erase_if(rows, [&](std::int64_t i) { return i < 0 || i >= queries; });
  return rows;
}

/// What a result in `T` is checked against: the textbook in a wider type.
template <class T>
using exact_type = std::conditional_t<std::is_same_v<T, float>, double, long double>;

/// The root of the mean square of the differences of two tensors of equal extents; NaN where one of them is.
template <class A, class B>
long double distance(const tensor<A>& a, const tensor<B>& b) {
  long double squares = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) {
    const long double difference = static_cast<long double>(a.data[i]) - static_cast<long double>(b.data[i]);
    squares += difference * difference;
  }
  return std::sqrt(squares / static_cast<long double>(a.data.size()));
}

/// The error of `got` is at most three times that of the textbook in `T`, plus the rounding of the result: twice, as the tests
/// have it, and half as much again, since Eigen adds up in as many lanes as the bench is compiled for. The largest
/// differences of a few rows would differ by chance by more than that; their mean squares do not, and still tell of one
/// wrong number.
template <class T>
bool agrees(const tensor<T>& got, const tensor<exact_type<T>>& exact, const tensor<T>& plain) {
  const long double magnitude =
      distance(exact, tensor<T>(exact.extent[0], exact.extent[1], exact.extent[2], exact.extent[3]));
  return distance(got, exact) <= 3 * distance(plain, exact) + std::numeric_limits<T>::epsilon() * magnitude;
}

/// The textbook's output for the rows of one query head, given its queries; `with_cores` or raw context alone.
template <class Scalar, class T>
auto textbook(const tensor<T>& queries, const std::vector<std::int64_t>& positions, cca::tensor_view<const T> query,
              cca::tensor_view<const T> key, cca::tensor_view<const T> value, bool with_cores,
              const cca::options& options) {
  const cca::partition partition = cca::partition_of(options);
  const std::int64_t dim = key.dim();
  std::pair<tensor<Scalar>, tensor<Scalar>> cores{{1, 1, 0, dim}, {1, 1, 0, value.dim()}};
  cca::reference::converter<Scalar> numbers;
  const cca::reference::operands<Scalar> all{numbers(query), numbers(key), numbers(value)};
  if (with_cores) cores = cca::reference::pool(all, options);
  const auto position = [&](std::int64_t i) { return positions[static_cast<std::size_t>(i)]; };
  return cca::reference::attend<Scalar>(
             {numbers(queries.view()), all.key, all.value}, cores.first.view(), cores.second.view(), options,
             [&](std::int64_t, std::int64_t, std::int64_t i) {
               return cca::reference::first_rows(with_cores ? partition.core_count(position(i)) : 0);
             },
             [&](std::int64_t i) { return cca::reference::raw_tokens(partition, position(i), key.length()); })
      .out;
}

/// Checks sampled rows of the first and the last head of `out`.
template <class T>
bool check(const operands<T>& data, bool with_cores, const cca::options& options) {
  const auto query = data.view(data.query), out = data.view(data.out);
  const auto key = data.view(data.key), value = data.view(data.value);
  const std::int64_t heads = query.heads(), sharing = heads / key.heads(), first = key.length() - query.length();
  const std::vector<std::int64_t> rows = sample(query.length(), first, options);
  const auto count = static_cast<std::int64_t>(rows.size());
  const auto check_head = [&](std::int64_t b, std::int64_t h) {
    tensor<T> queries(1, 1, count, query.dim()), got(1, 1, count, out.dim());
    std::vector<std::int64_t> positions;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = rows[static_cast<std::size_t>(i)];
      std::copy_n(query.row(b, h, row), query.dim(), queries.view().row(0, 0, i));
      std::copy_n(out.row(b, h, row), out.dim(), got.view().row(0, 0, i));
      positions.push_back(first + row);
    }
    const auto q = head_of(query, b, h), k = head_of(key, b, h / sharing), v = head_of(value, b, h / sharing);
    return agrees(got, textbook<exact_type<T>>(queries, positions, q, k, v, with_cores, options),
                  textbook<T>(queries, positions, q, k, v, with_cores, options));
  };
  return check_head(0, 0) && (query.batch() * heads == 1 || check_head(query.batch() - 1, heads - 1));
}

}  // namespace bench
