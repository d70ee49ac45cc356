#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "row_span.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Keys and values of one head: row `i` starts at `key + i * key_stride` and `value + i * value_stride`.
template <class Key, class Value>
struct context_rows {
  const Key* key;
  std::int64_t key_stride;
  const Value* value;
  std::int64_t value_stride;
  row_scales key_scales{}, value_scales{};

  [[nodiscard]] context_rows from(std::int64_t i) const {
    return {key + i * key_stride, key_stride,         value + i * value_stride,
            value_stride,         key_scales.from(i), value_scales.from(i)};
  }
};

/// Keys and values of all heads, and the scales of those of 8 bits.
template <class Key, class Value>
struct row_views {
  tensor_view<const Key> key;
  tensor_view<const Value> value;
  lse_view<const float> key_scales{}, value_scales{};
};

/// Those of an aggregate that has them.
template <class Views>
auto row_views_of(const Views& of) {
  row_views<std::remove_const_t<typename decltype(of.key)::element_type>,
            std::remove_const_t<typename decltype(of.value)::element_type>>
      rows{of.key, of.value};
  if constexpr (requires { of.key_scales; }) {
    rows.key_scales = of.key_scales;
    rows.value_scales = of.value_scales;
  }
  return rows;
}

/// Positions of the rows of a source, counted from query 0 of the call, so that they stay small where those of a long
/// sequence are not.
struct row_positions {
  std::int64_t first = 0, step = 0;
  const std::int64_t* given =
      nullptr;  ///< counted as the caller does, and `first` more; null: row j lies `j * step` on

  [[nodiscard]] std::int64_t operator[](std::int64_t j) const {
    return first + (given != nullptr ? given[j * step] : j * step);
  }
};

/// Where cores lie, seen from a query 0 at `position`: where the last tokens of their groups do.
inline row_positions core_positions(const partition& partition, std::int64_t position) {
  return {.first = partition.group(0).end - 1 - position, .step = partition.group_size};
}

/// What rows bring to their scores beside their keys, for one query head of one sequence.
template <class Bias>
struct row_terms {
  row_positions positions{};
  const Bias* bias = nullptr;  ///< that of row 0; null: there are none
  std::int64_t bias_stride = 0;
};

/// Who sees rows in pieces, half-open ranges of which every query sees one range:
///  - `next(b, h, queries, from)`: the first piece from row `from` on of what some of the queries see of sequence `b`;
///    empty behind the last;
///  - `ranges(b, h, queries, piece, seen)`: writes what each query sees of a piece;
///  - `whole(b, heads, queries, piece)`: whether all these queries of heads with the same pieces see all of one;
///  - `most(b)`: rows that a query sees, at most; `heads`: how many have pieces of their own, shared evenly by query
///    heads.
template <class Visible>
concept sees_pieces = requires(const Visible& visible, range queries) { visible.next(0, 0, queries, 0); };

/// What the engine has to know of pieces before it sees them.
struct piece_form {
  bool given = false;              ///< whether some source is seen in pieces
  std::int64_t block = unlimited;  ///< queries `[i block, (i + 1) block)` share theirs, and are not to ask with others
  std::int64_t across = 1;         ///< heads that share theirs, and the rows of all sources
};

/// One kind of context: cores, a window, a caller's rows. All of attention is a softmax over a few of them.
template <class Length, class Rows, class Visible, class Terms>
struct source {
  std::int64_t heads;  ///< query heads share them evenly
  Length length;       ///< `length(b)`: rows of sequence `b`, at most
  Rows rows;           ///< `rows(b, head)`: the `context_rows` of sequence `b`
  Visible visible;     ///< `visible(b, h, i)`: the half-open range of rows that query `i` of query head `h` sees, and where
                       ///< they lie within few rows of a long source, `most(b)` rows; or pieces
  Terms terms;         ///< `terms(b, h)`: the `row_terms` of sequence `b` for query head `h`
};

template <class Length, class Rows, class Visible, class Terms>
source(std::int64_t, Length, Rows, Visible, Terms) -> source<Length, Rows, Visible, Terms>;

/// A source as the engine takes it, by its elements alone: whatever its functions are, what absorbs it is compiled once.
/// Refers to it.
template <class Key, class Value, class Bias>
class source_ref {
 public:
  std::int64_t heads;
  std::int64_t piece_heads = 1;  ///< that have pieces of their own

  template <class Source>
  explicit source_ref(const Source& source)
      : heads(source.heads),
        source_(&source),
        length_([](const void* s, std::int64_t b) { return of<Source>(s).length(b); }),
        rows_([](const void* s, std::int64_t b, std::int64_t head) { return of<Source>(s).rows(b, head); }),
        visible_([](const void* s, std::int64_t b, std::int64_t h, range queries, [[maybe_unused]] range piece, range* seen) {
          const auto& visible = of<Source>(s).visible;
          if constexpr (sees_pieces<decltype(source.visible)>)
            visible.ranges(b, h, queries, piece, seen);
          else
            for (std::int64_t i = queries.begin; i < queries.end; ++i) *seen++ = visible(b, h, i);
        }),
        terms_([](const void* s, std::int64_t b, std::int64_t h) { return of<Source>(s).terms(b, h); }) {
    if constexpr (sees_pieces<decltype(source.visible)>) {
      piece_heads = source.visible.heads;
      next_ = [](const void* s, std::int64_t b, std::int64_t h, range queries, std::int64_t from) {
        return of<Source>(s).visible.next(b, h, queries, from);
      };
      whole_ = [](const void* s, std::int64_t b, range query_heads, range queries, range piece) {
        return of<Source>(s).visible.whole(b, query_heads, queries, piece);
      };
    }
    if constexpr (requires { source.visible.most(std::int64_t{0}); })
      most_ = [](const void* s, std::int64_t b) { return of<Source>(s).visible.most(b); };
  }

  [[nodiscard]] std::int64_t length(std::int64_t b) const { return length_(source_, b); }
  [[nodiscard]] context_rows<Key, Value> rows(std::int64_t b, std::int64_t head) const { return rows_(source_, b, head); }
  [[nodiscard]] row_terms<Bias> terms(std::int64_t b, std::int64_t h) const { return terms_(source_, b, h); }
  [[nodiscard]] bool in_pieces() const { return next_ != nullptr; }
  /// Rows that queries see, at most: of pieces one query, otherwise all of a sequence.
  [[nodiscard]] std::int64_t most_seen(std::int64_t b) const {
    return most_ != nullptr ? smaller(most_(source_, b), length(b)) : length(b);
  }

  /// Calls `f(piece, the piece behind it)` for the pieces in which the queries `queries` of query head `h` see the
  /// rows, upwards. There is an empty one behind the last.
  template <class F>
  void for_each_piece(std::int64_t b, std::int64_t h, range queries, const F& f) const {
    if (next_ == nullptr) return f(range{0, length(b)}, range{length(b), length(b)});
    for (range piece = next_(source_, b, h, queries, 0), next; !piece.empty(); piece = next) {
      next = next_(source_, b, h, queries, piece.end);
      f(piece, next);
    }
  }
  /// Whether all queries `queries` of the query heads `query_heads`, whose pieces are the same, see all of a piece.
  [[nodiscard]] bool seen_whole(std::int64_t b, range query_heads, range queries, range piece) const {
    return whole_ != nullptr && whole_(source_, b, query_heads, queries, piece);
  }
  /// Writes what each of the queries `queries` of query head `h` sees of a piece.
  void visible(std::int64_t b, std::int64_t h, range queries, range piece, range* seen) const {
    visible_(source_, b, h, queries, piece, seen);
  }

 private:
  template <class Source>
  static const Source& of(const void* source) {
    return *static_cast<const Source*>(source);
  }

  const void* source_;
  std::int64_t (*length_)(const void*, std::int64_t);
  context_rows<Key, Value> (*rows_)(const void*, std::int64_t, std::int64_t);
  void (*visible_)(const void*, std::int64_t, std::int64_t, range, range, range*);
  row_terms<Bias> (*terms_)(const void*, std::int64_t, std::int64_t);
  range (*next_)(const void*, std::int64_t, std::int64_t, range, std::int64_t) = nullptr;  ///< null: one piece of all rows
  std::int64_t (*most_)(const void*, std::int64_t) = nullptr;
  bool (*whole_)(const void*, std::int64_t, range, range, range) = nullptr;
};

template <class Length, class Rows, class Visible, class Terms>
source_ref(const source<Length, Rows, Visible, Terms>& source)
    -> source_ref<std::remove_const_t<std::remove_pointer_t<decltype(source.rows(0, 0).key)>>,
                  std::remove_const_t<std::remove_pointer_t<decltype(source.rows(0, 0).value)>>,
                  std::remove_const_t<std::remove_pointer_t<decltype(source.terms(0, 0).bias)>>>;

/// Whether keys and values of a source are both of these elements.
template <class Element, class Source>
inline constexpr bool of_elements = false;
template <class Element, class Bias>
inline constexpr bool of_elements<Element, source_ref<Element, Element, Bias>> = true;

/// The rows of a head of two views of extents `[batch, heads, length, dim]`, whose elements are numbers.
template <class Key, class Value>
auto rows_of(const tensor_view<Key>& key, const tensor_view<Value>& value, std::int64_t b, std::int64_t h) {
  static_assert(!is_q8<Key> && !is_q8<Value>, "cca: rows of 8 bits have scales, which this call does not take");
  return context_rows<std::remove_const_t<Key>, std::remove_const_t<Value>>{key.row(b, h, 0), key.stride[2],
                                                                            value.row(b, h, 0), value.stride[2]};
}

/// The same of views that may have scales.
template <class Key, class Value>
auto rows_of(const row_views<Key, Value>& of, std::int64_t b, std::int64_t h) {
  context_rows<Key, Value> rows{of.key.row(b, h, 0), of.key.stride[2], of.value.row(b, h, 0), of.value.stride[2]};
  if constexpr (is_q8<Key>) rows.key_scales = {of.key_scales.row(b, h, 0), of.key_scales.stride[2]};
  if constexpr (is_q8<Value>) rows.value_scales = {of.value_scales.row(b, h, 0), of.value_scales.stride[2]};
  return rows;
}

/// `length(b)` of a view.
template <class T, std::size_t Rank>
auto lengths_of(const tensor_view<T, Rank>& view) {
  return [view](std::int64_t b) { return view.length(b); };
}

/// Views as a source.
template <class Key, class Value, class Visible, class Terms>
auto view_source(const row_views<Key, Value>& of, Visible visible, Terms terms) {
  return source{of.key.heads(), lengths_of(of.key), [of](std::int64_t b, std::int64_t h) { return rows_of(of, b, h); },
                visible, terms};
}
template <class Key, class Value, class Visible, class Terms>
auto view_source(tensor_view<Key> key, tensor_view<Value> value, Visible visible, Terms terms) {
  static_assert(!is_q8<Key> && !is_q8<Value>, "cca: rows of 8 bits have scales, which this call does not take");
  return view_source(row_views<std::remove_const_t<Key>, std::remove_const_t<Value>>{key, value}, visible, terms);
}

/// Of numbers per row, `[1 or batch, a divisor of heads, length]`, the first for query head `h` of `heads` of sequence `b`;
/// null where there are none.
template <class T>
T* shared_row(const tensor_view<T, 3>& numbers, std::int64_t b, std::int64_t h, std::int64_t heads) {
  if (numbers.data == nullptr) return nullptr;
  return numbers.row(numbers.batch() == 1 ? 0 : b, h / (heads / numbers.heads()), 0);
}

/// Rows of these positions, `positions(b)` of sequence `b`, and of biases where they are given.
template <class Positions, class Bias>
auto terms_of(Positions positions, tensor_view<const Bias, 3> bias, std::int64_t heads) {
  return [=](std::int64_t b, std::int64_t h) {
    return row_terms<Bias>{positions(b), shared_row(bias, b, h, heads), bias.stride[2]};
  };
}

}}}  // namespace cca::CCA_TARGET::detail
