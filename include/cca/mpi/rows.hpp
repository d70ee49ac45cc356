#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

// Rows that a rank holds beside its views, and rows as messages carry them: every head of a key, of a value and, where
// there is one, of a bias, one after the other.

/// The kernels cut rows into blocks from multiples of this number on, or of a part of it.
inline constexpr std::int64_t block_alignment = 256;

/// Which rows of a buffer belong to which segment of a rank.
class row_places {
 public:
  row_places() = default;
  /// Rows for the tokens `tokens(b)` of each of `segments` segments, and for as many before them as make row 0 of each lie a
  /// multiple of `block_alignment` behind the sequence's first: the kernels then go through the same blocks as in one
  /// process.
  template <class Tokens>
  row_places(std::int64_t segments, const Tokens& tokens) : segments_(segments), table_(3 * (segments + 1)) {
    for (std::int64_t b = 0; b < segments; ++b) {
      const range of = tokens(b);
      first(b) = of.begin - of.begin % block_alignment;
      begin(b) = total_;
      total_ += of.empty() ? 0 : of.end - first(b);
      end(b) = total_;
      longest_ = larger(longest_, end(b) - begin(b));
    }
  }

  /// Rows of `sequences` sequences, `rows(q)` of each; segment b has the first `seen(b)` of those of sequence `sequence(b)`.
  template <class Sequence, class Rows, class Seen>
  [[nodiscard]] static row_places shared(std::int64_t segments, std::int64_t sequences, const Sequence& sequence,
                                         const Rows& rows, const Seen& seen) {
    row_places places(segments, [](std::int64_t) { return range{}; });
    const buffer<std::int64_t> offsets(sequences);
    for (std::int64_t q = 0; q < sequences; ++q) {
      offsets[q] = places.total_;
      places.total_ += rows(q);
    }
    for (std::int64_t b = 0; b < segments; ++b) {
      places.begin(b) = offsets[sequence(b)];
      places.end(b) = places.begin(b) + seen(b);
      places.longest_ = larger(places.longest_, seen(b));
    }
    return places;
  }

  /// Row i of segment b is token `first(b) + i`.
  [[nodiscard]] std::int64_t& first(std::int64_t b) const { return table_[b]; }
  [[nodiscard]] std::int64_t rows() const { return total_; }

  /// `[segments][heads][rows of the segment][dim]`, `[heads][rows][dim]` in memory of `heads * rows() * dim` elements.
  template <class T>
  [[nodiscard]] tensor_view<T> view(T* data, std::int64_t heads, std::int64_t dim) const {
    return {data, {segments_, heads, longest_, dim}, {0, total_ * dim, dim, 1}, &begin(0), &end(0)};
  }
  template <class T>
  [[nodiscard]] tensor_view<T, 3> view(T* data, std::int64_t heads) const {
    return {data, {segments_, heads, longest_}, {0, total_, 1}, &begin(0), &end(0)};
  }

 private:
  [[nodiscard]] std::int64_t& begin(std::int64_t b) const { return table_[segments_ + 1 + b]; }
  [[nodiscard]] std::int64_t& end(std::int64_t b) const { return table_[2 * (segments_ + 1) + b]; }

  std::int64_t segments_ = 0, total_ = 0, longest_ = 0;
  buffer<std::int64_t> table_{3};
};

/// Keys, values and biases in such places, zeros at first where they are sums.
template <class Key, class Value, class Bias>
struct held_rows {
  row_places places;
  buffer<Key> keys;
  buffer<Value> values;
  buffer<Bias> biases;
  tensor_view<Key> key;
  tensor_view<Value> value;
  tensor_view<Bias, 3> bias;

  held_rows(row_places at, std::int64_t heads, std::int64_t dim, std::int64_t value_dim, std::int64_t bias_heads)
      : places(static_cast<row_places&&>(at)),
        keys(heads * places.rows() * dim),
        values(heads * places.rows() * value_dim),
        biases(bias_heads * places.rows()),
        key(places.view(keys.data(), heads, dim)),
        value(places.view(values.data(), heads, value_dim)),
        bias(places.view(bias_heads > 0 ? biases.data() : nullptr, bias_heads)) {}
  held_rows(const held_rows&) = delete;
  held_rows& operator=(const held_rows&) = delete;

  void clear() const {
    fill_n(keys.data(), keys.size(), Key(0));
    fill_n(values.data(), values.size(), Value(0));
    fill_n(biases.data(), biases.size(), Bias(0));
  }
};

/// The elements of a row.
template <class T, std::size_t Rank>
std::int64_t elements_of_row([[maybe_unused]] const tensor_view<T, Rank>& view) {
  if constexpr (Rank == 3)
    return 1;
  else
    return view.dim();
}

/// Bytes of a row of all heads of these views. Views that are not given have no heads.
template <class... View>
std::int64_t bytes_of_row(const View&... views) {
  return ((views.heads() * elements_of_row(views) * static_cast<std::int64_t>(sizeof(typename View::element_type))) +
          ... + 0);
}

/// Calls `f(row, elements)` for what a message has of these rows of segment b: row by row, of each view every head.
template <class F, class... View>
void for_each_part(std::int64_t b, range rows, const F& f, const View&... views) {
  const auto heads_of = [&](const auto& view, std::int64_t i) {
    for (std::int64_t h = 0; h < view.heads(); ++h) f(view.row(b, h, i), elements_of_row(view));
  };
  for (std::int64_t i = rows.begin; i < rows.end; ++i) (heads_of(views, i), ...);
}

/// Writes these rows to a message. Returns what is behind them.
template <class... View>
std::byte* put_rows(std::byte* to, std::int64_t b, range rows, const View&... views) {
  for_each_part(
      b, rows,
      [&](const auto* row, std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof *row;
        std::memcpy(to, static_cast<const void*>(row), bytes);
        to += bytes;
      },
      views...);
  return to;
}

/// Takes them from a message.
template <class... View>
const std::byte* take_rows(const std::byte* from, std::int64_t b, range rows, const View&... views) {
  for_each_part(
      b, rows,
      [&](auto* row, std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof *row;
        std::memcpy(static_cast<void*>(row), from, bytes);
        from += bytes;
      },
      views...);
  return from;
}

/// Adds them.
template <class... View>
const std::byte* add_rows(const std::byte* from, std::int64_t b, range rows, const View&... views) {
  for_each_part(
      b, rows,
      [&](auto* row, std::int64_t count) {
        for (std::int64_t d = 0; d < count; ++d, from += sizeof *row) {
          auto number = *row;
          std::memcpy(&number, from, sizeof number);
          row[d] += number;
        }
      },
      views...);
  return from;
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
