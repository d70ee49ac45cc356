#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "numbers.hpp"
#include "refuse.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A view by its name in refusals, and all that is checked of it, whatever its elements: checks are compiled once. One of
/// three extents is one whose rows have one element.
struct named_view : tensor_view<const void> {
  const char* name;
  std::size_t element_size, dimensions;

  template <class T, std::size_t Rank>
  named_view(const char* n, const tensor_view<T, Rank>& view)
      : tensor_view<const void>{view.data, {}, {}, view.begins, view.ends},
        name(n),
        element_size(sizeof(T)),
        dimensions(Rank) {
    extent[3] = stride[3] = 1;
    copy_n(view.extent.data(), Rank, extent.data());
    copy_n(view.stride.data(), Rank, stride.data());
  }

  /// @{
  /// For refusals.
  [[nodiscard]] text_part extents() const { return {extent.data(), dimensions}; }
  [[nodiscard]] text_part strides() const { return {stride.data(), dimensions}; }
  /// @}
};

/// One that is written.
struct output_view : named_view {
  template <class T, std::size_t Rank>
  output_view(const char* n, const tensor_view<T, Rank>& view) : named_view(n, view) {
    static_assert(!std::is_const_v<T>, "cca: an output's elements are mutable");
  }
};

/// @{
/// Whether an optional view was given.
inline bool given(const named_view& view) {
  bool sized = false;
  for (std::size_t i = 0; i < view.dimensions; ++i) sized |= view.extent[i] != 0;
  return view.data != nullptr || sized;
}
template <class T, std::size_t Rank>
bool given(const tensor_view<T, Rank>& view) {
  return given(named_view("", view));
}
/// @}

/// The tokens that sequences lie between, of a view that says where they begin; otherwise all of them.
inline range tokens_of(const named_view& view) {
  if (view.begins == nullptr) return {0, view.length()};
  range tokens;
  for (std::int64_t b = 0; b < view.batch(); ++b) tokens = hull(tokens, {view.begins[b], view.ends[b]});
  return tokens;
}

/// Whether the bytes between any two elements can be counted.
inline bool has_reach(const named_view& view) {
  // Long double holds every product of two 63-bit numbers closely enough to tell whether it fits.
  long double total = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::int64_t extent = i == 2 ? larger(view.extent[i], tokens_of(view).end) : view.extent[i];
    total += magnitude(static_cast<long double>(view.stride[i])) * static_cast<long double>(extent - 1);
  }
  return total * static_cast<long double>(view.element_size) < 0x1p62L;
}

/// Whether rows, tasks and bytes of memory can be counted, also those of a view without elements or with strides of 0.
inline bool countable(const named_view& view) {
  auto bytes = static_cast<long double>(view.element_size);
  for (const std::int64_t e : view.extent) bytes *= static_cast<long double>(larger<std::int64_t>(e, 1));
  return bytes < 0x1p62L;
}

/// Lengths per sequence that lie in `[0, length)`, and begin at no token below 0.
inline void require_lengths(const named_view& view) {
  if (view.begins != nullptr && view.ends == nullptr) refuse(view.name, {"begins without ends"}, {"both or none"});
  for (std::int64_t b = 0; b < (view.has_lengths() ? view.batch() : 0); ++b) {
    const range tokens{view.begins != nullptr ? view.begins[b] : 0, view.ends[b]};
    const auto refuse_tokens = [&](std::initializer_list<text_part> wanted) {
      refuse(view.name, {"sequence ", b, " from token ", tokens.begin, " to ", tokens.end}, wanted);
    };
    if (tokens.begin < 0 || tokens.end < tokens.begin) refuse_tokens({"offsets of at least 0 that never decrease"});
    if (tokens.size() > view.length()) refuse_tokens({"a length of at most ", view.length()});
  }
}

/// Extents for which scratch memory can be planned. Rows of up to 2^31 elements leave room for the many of them that a
/// worker holds.
inline void require_sizes(const named_view& view) {
  for (const std::int64_t e : view.extent)
    if (e < 0) refuse(view.name, {"extents ", view.extents()}, {"none below 0"});
  if (view.dim() < 1) refuse(view.name, {"dim ", view.dim()}, {"a dim of at least 1"});
  if (!countable(view)) refuse(view.name, {"extents ", view.extents()}, {"fewer than 2^62 bytes of elements"});
  if (view.dim() > std::int64_t{1} << 31) refuse(view.name, {"dim ", view.dim()}, {"a dim of at most 2^31"});
  require_lengths(view);
}

/// As many sequences as there are of queries, for whom looks at the lengths of both.
inline void require_batch(const named_view& query, const named_view& view) {
  if ((query.has_lengths() || view.has_lengths()) && view.batch() != query.batch())
    refuse(view.name, {view.batch(), " sequences"}, {"as many as the query has, ", query.batch()});
}

/// A view that can be read: extents, strides and pointer make sense.
inline void require_operand(const named_view& view) {
  require_sizes(view);
  if (view.stride[3] != 1) refuse(view.name, {"strides ", view.strides()}, {"an inner stride of 1"});
  if (view.empty()) return;
  if (view.data == nullptr) refuse(view.name, {"a null pointer"}, {"elements ", view.extents()});
  if (!has_reach(view))
    refuse(view.name, {"extents ", view.extents(), " with strides ", view.strides()}, {"offsets below 2^62 bytes"});
}

/// Sequences one after the other in the same row of the batch may not overlap.
inline void require_disjoint_sequences(const named_view& view) {
  std::int64_t end = 0;
  for (std::int64_t b = 0; b < view.batch(); ++b) {
    if (view.length(b) == 0) continue;
    if (view.begins[b] < end)
      refuse(view.name, {"sequence ", b, " from token ", view.begins[b]},
             {"one that begins where those before it end, at ", end});
    end = view.ends[b];
  }
}

/// A view that can be written: no two of its elements may share memory, or threads would race for it. Sorted by
/// stride, each dimension has to step over all that the smaller ones reach; every permuted or padded layout does.
inline void require_output(const output_view& view) {
  require_operand(view);
  if (view.empty() || tokens_of(view).empty()) return;
  std::array<std::int64_t, 4> extents = view.extent;
  extents[2] = tokens_of(view).size();
  if (view.begins != nullptr && view.stride[0] == 0) {
    require_disjoint_sequences(view);
    extents[0] = 1;
  }
  struct dimension {
    std::int64_t stride, extent;
  } dims[4];
  for (std::size_t i = 0; i < 4; ++i) {
    // The stride of a single element, which may be any number, leads nowhere.
    const dimension next{extents[i] == 1 ? 0 : magnitude(view.stride[i]), extents[i]};
    std::size_t place = i;
    for (; place > 0 && dims[place - 1].stride > next.stride; --place) dims[place] = dims[place - 1];
    dims[place] = next;
  }
  std::int64_t covered = 0;
  for (const auto& [stride, extent] : dims) {
    if (extent == 1) continue;
    if (stride <= covered)
      refuse(view.name, {"strides ", view.strides(), " for extents ", view.extents()},
             {"elements that do not overlap"});
    covered += stride * (extent - 1);
  }
}

inline void require_extents(const named_view& view, const std::array<std::int64_t, 4>& wanted) {
  if (view.extent != wanted) refuse(view.name, {view.extents()}, {"extents ", {wanted.data(), view.dimensions}});
}

/// `[batch, heads, count(length(b)), dim]` for the sequences of another view.
template <class Count>
void require_shape(const named_view& view, std::int64_t heads, std::int64_t dim, const named_view& like,
                   const Count& count) {
  const bool each = view.has_lengths() || like.has_lengths();
  require_extents(view, {like.batch(), heads, each ? view.length() : count(like.length()), dim});
  for (std::int64_t b = 0; b < (each ? view.batch() : 0); ++b)
    if (view.length(b) != count(like.length(b)))
      refuse(view.name, {"length ", view.length(b), " of sequence ", b}, {"length ", count(like.length(b))});
}

inline void require_shape(const named_view& view, std::int64_t heads, std::int64_t dim, const named_view& like) {
  require_shape(view, heads, dim, like, [](std::int64_t length) { return length; });
}

/// Where a view begins, by its name; null where there is nothing.
struct named_memory {
  const char* name;
  const void* data;

  named_memory(const named_view& view) : name(view.name), data(view.empty() ? nullptr : view.data) {}
};

/// What is written shares no memory with what is read or written beside it, as far as the first elements tell: whether
/// views overlap otherwise is for the caller to see to.
inline void require_apart(std::initializer_list<named_memory> written, std::initializer_list<named_memory> read) {
  const auto require = [](const named_memory& a, const named_memory& b) {
    if (a.data != nullptr && a.data == b.data) refuse(a.name, {"the memory of ", b.name}, {"memory of its own"});
  };
  for (const named_memory* a = written.begin(); a != written.end(); ++a) {
    for (const named_memory& b : read) require(*a, b);
    for (const named_memory* b = written.begin(); b != a; ++b) require(*a, *b);
  }
}

}}}  // namespace cca::CCA_TARGET::detail
