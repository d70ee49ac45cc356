#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Keys and values of one head: row `i` starts at `key + i * key_stride` and `value + i * value_stride`.
template <class Key, class Value>
struct context_rows {
  const Key* key;
  std::int64_t key_stride;
  const Value* value;
  std::int64_t value_stride;
};

/// One kind of context: cores, a window, a caller's rows. All of attention is a softmax over a few of them.
template <class Length, class Rows, class Visible>
struct source {
  std::int64_t heads;  ///< query heads share them evenly
  Length length;       ///< `length(b)`: rows of sequence `b`, at most
  Rows rows;           ///< `rows(b, head)`: the `context_rows` of sequence `b`
  Visible visible;     ///< `visible(b, h, i)`: the half-open range of rows that query `i` of query head `h` sees
};

template <class Length, class Rows, class Visible>
source(std::int64_t, Length, Rows, Visible) -> source<Length, Rows, Visible>;

/// Whether keys and values of a source are both of these elements.
template <class Element, class Source>
inline constexpr bool of_elements =
    std::is_same_v<decltype(std::declval<const Source&>().rows(0, 0)), context_rows<Element, Element>>;

/// The rows of a head of two views of extents `[batch, heads, length, dim]`.
template <class Key, class Value>
auto rows_of(const tensor_view<Key>& key, const tensor_view<Value>& value, std::int64_t b, std::int64_t h) {
  return context_rows<std::remove_const_t<Key>, std::remove_const_t<Value>>{key.row(b, h, 0), key.stride[2],
                                                                            value.row(b, h, 0), value.stride[2]};
}

/// `length(b)` of a view.
template <class T, std::size_t Rank>
auto lengths_of(const tensor_view<T, Rank>& view) {
  return [view](std::int64_t b) { return view.length(b); };
}

/// Two views as a source.
template <class Key, class Value, class Visible>
auto view_source(tensor_view<Key> key, tensor_view<Value> value, Visible visible) {
  return source{key.heads(), lengths_of(key),
                [key, value](std::int64_t b, std::int64_t h) { return rows_of(key, value, b, h); }, visible};
}

}}}  // namespace cca::CCA_TARGET::detail
