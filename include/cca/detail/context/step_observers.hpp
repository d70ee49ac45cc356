#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../pool/observers.hpp"
#include "../simd/dot.hpp"
#include "row_store.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The observers of a cached sequence in a step: those that it holds, in a ring whose keys are their queries and whose values
/// are the two numbers of their sums, and those among the new queries, whose sums lie in scratch memory. Refers to the ring.
template <class T, class Number, class Query>
struct step_observers {
  const row_ring<Number>& held;
  observer_grid grid;
  std::int64_t old_length;
  tensor_view<Query> query;  ///< `[1, heads, new tokens, dim]`
  observer_sum<T>* sums;     ///< `[heads][fresh().size()]`

  [[nodiscard]] std::int64_t length(std::int64_t = 0) const { return old_length + query.length(); }
  [[nodiscard]] range fresh() const { return grid.within({old_length, length()}); }
  [[nodiscard]] observer_sum<T>& fresh_sum(std::int64_t h, std::int64_t i) const {
    return sums[h * fresh().size() + i - fresh().begin];
  }

  void load(std::int64_t, std::int64_t h, std::int64_t i, T factor, T* to) const {
    if (i >= fresh().begin)
      scale_row(fresh_query(h, i), query.dim(), factor, to);
    else
      scale_row(held.key(h, row(i)), query.dim(), factor, to);
  }
  [[nodiscard]] observer_sum<T> sum(std::int64_t, std::int64_t h, std::int64_t i) const {
    if (i >= fresh().begin) return fresh_sum(h, i);
    const Number* const numbers = held.value(h, row(i));
    return {static_cast<T>(numbers[0]), static_cast<T>(numbers[1])};
  }

  /// Takes the new ones over to the ring, as many as it has rows.
  void keep(row_ring<Number>& ring) const {
    for (std::int64_t i = larger(fresh().begin, fresh().end - ring.capacity()); i < fresh().end; ++i)
      for (std::int64_t h = 0; h < ring.heads(); ++h) {
        scale_row(fresh_query(h, i), query.dim(), T(1), ring.key(h, row(i)));
        const auto [maximum, inverse] = fresh_sum(h, i);
        ring.value(h, row(i))[0] = static_cast<Number>(maximum);
        ring.value(h, row(i))[1] = static_cast<Number>(inverse);
      }
  }

 private:
  [[nodiscard]] std::int64_t row(std::int64_t i) const { return held.find({i, i + 1}).row; }
  [[nodiscard]] Query* fresh_query(std::int64_t h, std::int64_t i) const {
    return query.row(0, h, grid.position(i) - old_length);
  }
};

}}}  // namespace cca::CCA_TARGET::detail
