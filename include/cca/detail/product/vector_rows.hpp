#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The rows of a stack's queries, or of their gradients, padded with zeros to whole vectors and tiles: what the gradients
/// of keys and values are summed from.
template <class T>
class vector_rows {
  using shape = tile_shape<T>;
  using visible_lanes = lane_ranges<T>;
  static constexpr std::int64_t W = width<T>, lanes = shape::lanes;

 public:
  static constexpr std::int64_t size(std::int64_t count, std::int64_t dim) { return count * padded<T>(dim); }

  vector_rows(T* scratch, std::int64_t padded_count, std::int64_t dim)
      : rows_(scratch), lanes_(padded_count), dim_(dim) {}

  [[nodiscard]] T* row(std::int64_t i) const { return rows_ + i * padded<T>(dim_); }

  /// Takes in `count` rows, `row_of(i)`.
  template <class Row>
  void load(std::int64_t count, const Row& row_of) {
    count_ = count;
    fill_n(rows_, size(lanes_, dim_), T(0));
    for (std::int64_t i = 0; i < count; ++i) convert(row_of(i), dim_, row(i));
    finite_ = all_finite(row_span<T>{rows_, padded<T>(dim_)}, dim_, count);
  }

  /// `to[j] += sum_i factors[j][i] row_i` for the rows `rows` of a block; a query adds to what it sees.
  void add_to(const T* factors, range rows, const visible_lanes* seen, T* to, std::int64_t to_stride) const {
    const std::int64_t tiles = lanes_ / lanes;
    range all = seen[0].seen_by_all();
    for (std::int64_t c = 1; c < tiles; ++c) all = intersection(all, seen[c].seen_by_all());
    const bool whole = intersection(rows, all) == rows;
    const auto lanes_of = [&](range part) { return whole ? range{0, lanes_} : seeing(seen, tiles, part); };
    const row_span<T> span{rows_, padded<T>(dim_)};
    if (whole || finite_)
      add_runs(factors, rows, seen, to, to_stride,
               [&](range part, const auto& run, const auto&) CCA_INLINE_LAMBDA { run(lanes_of(part)); });
    else
      add_runs(factors, rows, seen, to, to_stride,
               [&](range part, const auto& run, const auto& row)
                   CCA_INLINE_LAMBDA { for_each_finite_run(span, dim_, lanes_of(part), run, row); });
  }

 private:
  /// The lanes of the vectors that see one of the rows, and of those between them.
  static range seeing(const visible_lanes* seen, std::int64_t tiles, range rows) {
    range total;
    for (std::int64_t v = 0; v < tiles * shape::vectors; ++v)
      if (!intersection(seen[v / shape::vectors].any[v % shape::vectors], rows).empty())
        total = hull(total, {v * W, (v + 1) * W});
    return total;
  }

  /// `for_each_run(rows, run, query)` calls `run(lanes)` for ranges of lanes whose queries are multiplied for all of the rows,
  /// and `query(i)` for those that add to the rows alone that they see, in order: so no other sum changes by a bit.
  template <class Runs>
  void add_runs(const T* factors, range rows, const visible_lanes* seen, T* to, std::int64_t to_stride,
                const Runs& for_each_run) const {
    for_row_blocks<shape::vectors>(padded<T>(dim_) / W, [&](auto n, std::int64_t v) {
      for_row_blocks<shape::template rows_of<n()>>(rows.size(), [&](auto r, std::int64_t j) {
        const range some = shifted(range{j, j + r()}, rows.begin);
        add_block<r(), n()>({factors + j * lanes_, lanes_}, {row(0) + v * W, padded<T>(dim_)}, to + j * to_stride + v * W,
                            to_stride, dim_ - v * W, [&](const auto& run, const auto& query) CCA_INLINE_LAMBDA {
                              for_each_run(some, run, [&](std::int64_t i) {
                                const range sees = seen[i / lanes].lane[i % lanes];
                                query(i, shifted(intersection(sees, some), -some.begin));
                              });
                            });
      });
    });
  }

  /// `to += factors queries` of a register block of `R` rows and `N` vectors, of which `dims` elements are there. (A function
  /// of its own: where it was a part of its callers, g++ kept their addresses in vector registers and sums in memory,
  /// and gradients took 1.1 times as long.)
  template <std::int64_t R, std::int64_t N, class Runs>
  [[gnu::noinline]] static void add_block(row_span<T> factors, row_span<T> queries, T* to, std::int64_t to_stride,
                                     std::int64_t dims, const Runs& for_each_run) {
    for (std::int64_t r = 0; r < R; ++r)  // they are added to behind the products
      for (std::int64_t n = 0; n < N * W; n += line<T>) prefetch(place_in_memory(to, r, to_stride, n));
    vec<T> sum[extent(R)][extent(N)];
    unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N] = vec<T>(T(0)); });
    const auto run = [&](range some) CCA_INLINE_LAMBDA {
      accumulate(sum, factors.data + some.begin, factors.stride, adjacent{}, queries.row(some.begin), queries.stride,
                 some.size());
    };
    const auto query = [&](std::int64_t i, range rows) CCA_INLINE_LAMBDA {
      for (std::int64_t k = rows.begin; k < rows.end; ++k)
        for (std::int64_t m = 0; m < N; ++m)
          sum[k][m] = fma<T>(vec<T>(factors.row(k)[i]), vec<T>::load_aligned(queries.row(i) + m * W), sum[k][m]);
    };
    for_each_run(run, query);
    unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA {
      T* t = to + i / N * to_stride + i % N * W;
      const std::int64_t left = dims - i % N * W;
      if (left >= W)
        (vec<T>::load_unaligned(t) + sum[i / N][i % N]).store_unaligned(t);
      else
        store_partial(t, load_partial(t, left) + sum[i / N][i % N], left);
    });
  }

  T* rows_;
  std::int64_t lanes_, dim_, count_ = 0;
  bool finite_ = true;
};

}}}  // namespace cca::CCA_TARGET::detail
