#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <type_traits>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../detail/simd/convert.hpp"
#include "../detail/softmax/row_softmax.hpp"
#include "../element.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "communicator.hpp"
#include "exchange.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// Part `rank` of `count` rows that the ranks share as evenly as it goes.
inline range share_of(std::int64_t count, std::int64_t rank, std::int64_t ranks) {
  const std::int64_t each = count / ranks, rest = count % ranks;
  return {rank * each + smaller(rank, rest), (rank + 1) * each + smaller(rank + 1, rest)};
}

/// An output and its log-sum-exp as a message carries them.
template <class Out, class Lse>
struct result_row {
  static std::int64_t bytes(std::int64_t dim) {
    return dim * static_cast<std::int64_t>(sizeof(Out)) + static_cast<std::int64_t>(sizeof(Lse));
  }
};

/// Calls `f(number of the row, b, h, i)` for all rows of a view.
template <class View, class F>
void for_each_row(const View& view, const F& f) {
  std::int64_t row = 0;
  for (std::int64_t b = 0; b < view.batch(); ++b)
    for (std::int64_t h = 0; h < view.heads(); ++h)
      for (std::int64_t i = 0; i < view.length(b); ++i) f(row++, b, h, i);
}

/// Joins one row of every rank, `rows` of `bytes` bytes, in the order of the ranks: `merge` of all of them, in double.
template <class Part, class PartLse, class Out, class Lse>
void merge_row(const std::byte* rows, std::int64_t apart, std::int64_t ranks, std::int64_t dim, double* sum, Out* out,
               Lse* lse) {
  constexpr double empty = -std::numeric_limits<double>::infinity(), unit = std::numbers::log2e;
  exponential_sum<double> all;
  for (std::int64_t d = 0; d < dim; ++d) sum[d] = 0;
  for (std::int64_t r = 0; r < ranks; ++r, rows += apart) {
    PartLse number;
    std::memcpy(&number, rows + dim * static_cast<std::int64_t>(sizeof(Part)), sizeof number);
    const auto of_rank = static_cast<double>(number);
    if (of_rank == empty) continue;  // what an empty part has for an output is not looked at
    const auto shares = all.join({of_rank, 1.0}, unit);
    for (std::int64_t d = 0; d < dim; ++d) {
      Part element;
      std::memcpy(static_cast<void*>(&element), rows + d * static_cast<std::int64_t>(sizeof(Part)), sizeof element);
      sum[d] = multiply_add(sum[d], shares.first,
                            product(static_cast<double>(element_cast<compute_type<Part>>(element)), shares.second));
    }
  }
  const double share = all.inverse();
  for (std::int64_t d = 0; d < dim; ++d)
    out[d] = element_cast<Out>(static_cast<compute_type<Out>>(product(sum[d], share)));
  *lse = static_cast<Lse>(all.sum == 0 ? empty : all.maximum + cca::detail::log(all.sum));
}

/// `mpi::merge`, of arguments that are alike on all ranks: each rank merges a share of the rows and gives it to all.
template <class Part, class PartLse, class Out, class Lse>
void merge_over_ranks(const communicator& ranks, const results<Part, PartLse>& part, const results<Out, Lse>& whole) {
  using Element = std::remove_const_t<Part>;
  using Number = std::remove_const_t<PartLse>;
  std::int64_t rows = 0;
  for (std::int64_t b = 0; b < part.out.batch(); ++b) rows += part.out.heads() * part.out.length(b);
  const std::int64_t dim = part.out.dim(), size = ranks.size();
  const std::int64_t part_bytes = result_row<Element, Number>::bytes(dim), bytes = result_row<Out, Lse>::bytes(dim);
  const range mine = share_of(rows, ranks.rank(), size);
  const buffer<std::byte> sent(rows * part_bytes), received(size * mine.size() * part_bytes), merged(rows * bytes);
  const row_counts shares(ranks.size(), [&](int r) { return share_of(rows, r, size).size(); });
  const row_counts parts(ranks.size(), [&](int) { return mine.size(); });
  for_each_row(part.out, [&](std::int64_t row, std::int64_t b, std::int64_t h, std::int64_t i) {
    std::byte* to = sent.data() + row * part_bytes;
    std::memcpy(to, static_cast<const void*>(part.out.row(b, h, i)), static_cast<std::size_t>(dim) * sizeof(Element));
    std::memcpy(to + dim * static_cast<std::int64_t>(sizeof(Element)), part.lse.row(b, h, i), sizeof(Number));
  });
  const row_type part_row(part_bytes), row(bytes);
  check(MPI_Alltoallv(sent.data(), shares.counts(), shares.begins(), part_row.get(), received.data(), parts.counts(),
                      parts.begins(), part_row.get(), ranks.get()),
        "merging results");
  const buffer<double> sum(dim);
  const buffer<Out> out(dim);
  for (std::int64_t i = 0; i < mine.size(); ++i) {
    Lse lse;
    merge_row<Element, Number>(received.data() + i * part_bytes, mine.size() * part_bytes, size, dim, sum.data(),
                               out.data(), &lse);
    std::byte* to = merged.data() + (mine.begin + i) * bytes;
    std::memcpy(to, static_cast<const void*>(out.data()), static_cast<std::size_t>(dim) * sizeof(Out));
    std::memcpy(to + dim * static_cast<std::int64_t>(sizeof(Out)), &lse, sizeof lse);
  }
  check(MPI_Allgatherv(MPI_IN_PLACE, 0, row.get(), merged.data(), shares.counts(), shares.begins(), row.get(),
                       ranks.get()),
        "merging results");
  ranks.received().partials += (size - 1) * mine.size() * part_bytes + (rows - mine.size()) * bytes;
  for_each_row(whole.out, [&](std::int64_t number, std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::byte* from = merged.data() + number * bytes;
    std::memcpy(static_cast<void*>(whole.out.row(b, h, i)), from, static_cast<std::size_t>(dim) * sizeof(Out));
    if (whole.lse.data != nullptr)
      std::memcpy(whole.lse.row(b, h, i), from + dim * static_cast<std::int64_t>(sizeof(Out)), sizeof(Lse));
  });
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
