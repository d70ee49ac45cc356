#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Short pieces of a source, put together: what is done once per piece costs more there than a copy of its rows.
///
/// A view of scratch memory, `size(dim, value_dim)` elements of what is computed in: no element of a row or scale is larger.
template <class T>
class gathered_rows {
  static constexpr std::int64_t longest = 32;  ///< rows of a short piece; of blocks of 64 a copy costs more than it saves
  static constexpr std::int64_t most = 64;     ///< rows at a time

 public:
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim) { return most * (dim + value_dim + 2); }

  gathered_rows(T* scratch, std::int64_t dim, std::int64_t value_dim)
      : keys_(scratch),
        values_(scratch + most * dim),
        key_scales_(reinterpret_cast<float*>(values_ + most * value_dim)),
        value_scales_(key_scales_ + most),
        dim_(dim),
        value_dim_(value_dim) {}

  /// Goes through what the queries `queries` of the heads `heads`, whose rows and pieces are the same, see of a source.
  /// Calls `f(rows, piece, next, whole)` for its pieces as they lie, and where `gathers` for copies of short ones that
  /// all of these queries see, as a piece that begins with row 0: `whole` is then true, and the rows have no terms.
  /// Behind a piece those from row `next` on are expected. A piece is not copied if `outside(count, size)` holds, of
  /// its size and of how many rows wait for `f`.
  template <class Source, class Key, class Value, class Outside, class F>
  void for_each_piece(const Source& source, std::int64_t b, range heads, range queries,
                      const context_rows<Key, Value>& rows, bool gathers, const Outside& outside, const F& f) {
    auto* const keys = reinterpret_cast<Key*>(keys_);
    auto* const values = reinterpret_cast<Value*>(values_);
    std::int64_t count = 0;
    const auto pass_on = [&] {
      const range copies{0, exchange<std::int64_t>(count, 0)};
      const context_rows<Key, Value> from{keys, dim_, values, value_dim_, {key_scales_, 1}, {value_scales_, 1}};
      if (!copies.empty()) f(from, copies, copies.end, true);
    };
    source.for_each_piece(b, heads.begin, queries, [&](range piece, range next) {
      const bool whole = gathers && piece.size() <= longest && source.seen_whole(b, heads, queries, piece);
      if (!whole || outside(count, piece.size())) {
        pass_on();
        return f(rows, piece, next.empty() ? piece.end : next.begin, whole);
      }
      if (count + piece.size() > most) pass_on();
      prefetch_row(row_span<Key>{rows.key, rows.key_stride}, next.begin, dim_);
      prefetch_row(row_span<Value>{rows.value, rows.value_stride}, next.begin, value_dim_);
      for (std::int64_t j = piece.begin; j < piece.end; ++j, ++count) {
        copy_n(rows.key + j * rows.key_stride, dim_, keys + count * dim_);
        copy_n(rows.value + j * rows.value_stride, value_dim_, values + count * value_dim_);
        if constexpr (is_q8<Key>) key_scales_[count] = rows.key_scales[j];
        if constexpr (is_q8<Value>) value_scales_[count] = rows.value_scales[j];
      }
    });
    pass_on();
  }

 private:
  T *keys_, *values_;
  float *key_scales_, *value_scales_;
  std::int64_t dim_, value_dim_;
};

}}}  // namespace cca::CCA_TARGET::detail
