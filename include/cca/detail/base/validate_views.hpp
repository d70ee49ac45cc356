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

/// The tokens that sequences lie between, of a view that says where they begin; otherwise all of them.
template <class T, std::size_t Rank>
range tokens_of(const tensor_view<T, Rank>& view) {
  if (view.begins == nullptr) return {0, view.length()};
  range tokens;
  for (std::int64_t b = 0; b < view.batch(); ++b) tokens = hull(tokens, {view.begins[b], view.ends[b]});
  return tokens;
}

/// The largest distance in elements between two of the view's, or nothing when it does not fit 63 bits.
template <class T, std::size_t Rank>
std::optional<std::int64_t> reach(const tensor_view<T, Rank>& view) {
  // Long double holds every product of two 63-bit numbers closely enough to tell whether it fits.
  long double total = 0;
  for (std::size_t i = 0; i < Rank; ++i) {
    const std::int64_t extent = i == 2 ? larger(view.extent[i], tokens_of(view).end) : view.extent[i];
    total += magnitude(static_cast<long double>(view.stride[i])) * static_cast<long double>(extent - 1);
  }
  if (total * sizeof(T) >= 0x1p62L) return std::nullopt;
  return static_cast<std::int64_t>(total);
}

/// Whether rows, tasks and bytes of memory can be counted, also those of a view without elements or with strides of 0.
template <class T, std::size_t Rank>
bool countable(const tensor_view<T, Rank>& view) {
  long double bytes = sizeof(T);
  for (const std::int64_t e : view.extent) bytes *= static_cast<long double>(larger<std::int64_t>(e, 1));
  return bytes < 0x1p62L;
}

/// Lengths per sequence that lie in `[0, length)`, and begin at no token below 0.
template <class T, std::size_t Rank>
void require_lengths(const char* name, const tensor_view<T, Rank>& view) {
  if (view.begins != nullptr && view.ends == nullptr) refuse(name, "begins without ends", "both or none");
  for (std::int64_t b = 0; b < (view.has_lengths() ? view.batch() : 0); ++b) {
    const range tokens{view.begins != nullptr ? view.begins[b] : 0, view.ends[b]};
    const text got =
        "sequence " + to_string(b) + " from token " + to_string(tokens.begin) + " to " + to_string(tokens.end);
    if (tokens.begin < 0 || tokens.end < tokens.begin) refuse(name, got, "offsets of at least 0 that never decrease");
    if (tokens.size() > view.length()) refuse(name, got, "a length of at most " + to_string(view.length()));
  }
}

/// Extents for which scratch memory can be planned. Rows of up to 2^31 elements leave room for the many of them that a
/// worker holds.
template <class T, std::size_t Rank>
void require_sizes(const char* name, const tensor_view<T, Rank>& view) {
  for (const std::int64_t e : view.extent)
    if (e < 0) refuse(name, "extents " + to_string(view.extent), "none below 0");
  if constexpr (Rank == 4)
    if (view.dim() < 1) refuse(name, "dim " + to_string(view.dim()), "a dim of at least 1");
  if (!countable(view)) refuse(name, "extents " + to_string(view.extent), "fewer than 2^62 bytes of elements");
  if constexpr (Rank == 4)
    if (view.dim() > std::int64_t{1} << 31) refuse(name, "dim " + to_string(view.dim()), "a dim of at most 2^31");
  require_lengths(name, view);
}

/// As many sequences as there are of queries, for whom looks at the lengths of both.
template <class Query, class View>
void require_batch(const char* name, const Query& query, const View& view) {
  if ((query.has_lengths() || view.has_lengths()) && view.batch() != query.batch())
    refuse(name, to_string(view.batch()) + " sequences", "as many as the query has, " + to_string(query.batch()));
}

/// A view that can be read: extents, strides and pointer make sense.
template <class T, std::size_t Rank>
void require_operand(const char* name, const tensor_view<T, Rank>& view) {
  require_sizes(name, view);
  if constexpr (Rank == 4)
    if (view.stride[3] != 1) refuse(name, "strides " + to_string(view.stride), "an inner stride of 1");
  if (view.empty()) return;
  if (view.data == nullptr) refuse(name, "a null pointer", "elements " + to_string(view.extent));
  if (!reach(view).has_value())
    refuse(name, "extents " + to_string(view.extent) + " with strides " + to_string(view.stride),
           "offsets below 2^62 bytes");
}

/// Sequences one after the other in the same row of the batch may not overlap.
template <class T, std::size_t Rank>
void require_disjoint_sequences(const char* name, const tensor_view<T, Rank>& view) {
  std::int64_t end = 0;
  for (std::int64_t b = 0; b < view.batch(); ++b) {
    if (view.length(b) == 0) continue;
    if (view.begins[b] < end)
      refuse(name, "sequence " + to_string(b) + " from token " + to_string(view.begins[b]),
             "one that begins where those before it end, at " + to_string(end));
    end = view.ends[b];
  }
}

/// A view that can be written: no two of its elements may share memory, or threads would race for it. Sorted by
/// stride, each dimension has to step over all that the smaller ones reach; every permuted or padded layout does.
template <class T, std::size_t Rank>
void require_output(const char* name, const tensor_view<T, Rank>& view) {
  static_assert(!std::is_const_v<T>, "cca: an output's elements are mutable");
  require_operand(name, view);
  if (view.empty()) return;
  std::array<std::int64_t, Rank> extents = view.extent;
  extents[2] = tokens_of(view).size();
  if (view.begins != nullptr && view.stride[0] == 0) {
    require_disjoint_sequences(name, view);
    extents[0] = 1;
  }
  struct dimension {
    std::int64_t stride, extent;
  } dims[Rank];
  for (std::size_t i = 0; i < Rank; ++i) {
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
      refuse(name, "strides " + to_string(view.stride) + " for extents " + to_string(view.extent),
             "elements that do not overlap");
    covered += stride * (extent - 1);
  }
}

template <class T, std::size_t Rank>
void require_extents(const char* name, const tensor_view<T, Rank>& view, const std::array<std::int64_t, Rank>& wanted) {
  if (view.extent != wanted) refuse(name, to_string(view.extent), "extents " + to_string(wanted));
}

/// `[batch, heads, count(length(b)), dim]` (in a rank-3 view without `dim`) for the sequences of another view.
template <class T, std::size_t Rank, class Like, class Count>
void require_shape(const char* name, const tensor_view<T, Rank>& view, std::int64_t heads, std::int64_t dim,
                   const Like& like, const Count& count) {
  const bool each = view.has_lengths() || like.has_lengths();
  std::array<std::int64_t, Rank> wanted{like.batch(), heads, each ? view.length() : count(like.length())};
  if constexpr (Rank == 4) wanted[3] = dim;
  require_extents(name, view, wanted);
  for (std::int64_t b = 0; b < (each ? view.batch() : 0); ++b)
    if (view.length(b) != count(like.length(b)))
      refuse(name, "length " + to_string(view.length(b)) + " of sequence " + to_string(b),
             "length " + to_string(count(like.length(b))));
}
template <class T, std::size_t Rank, class Like>
void require_shape(const char* name, const tensor_view<T, Rank>& view, std::int64_t heads, std::int64_t dim,
                   const Like& like) {
  require_shape(name, view, heads, dim, like, [](std::int64_t length) { return length; });
}

/// Whether an optional view was given.
template <class T, std::size_t Rank>
bool given(const tensor_view<T, Rank>& view) {
  return view.data != nullptr || view.extent != std::array<std::int64_t, Rank>{};
}

/// A view by its name in refusals.
struct named_view {
  const char* name;
  const void* data;  ///< null where there is nothing

  template <class T, std::size_t Rank>
  named_view(const char* n, const tensor_view<T, Rank>& view) : name(n), data(view.empty() ? nullptr : view.data) {}
};

/// What is written shares no memory with what is read or written beside it, as far as the first elements tell: whether
/// views overlap otherwise is for the caller to see to.
inline void require_apart(std::initializer_list<named_view> written, std::initializer_list<named_view> read) {
  const auto require = [](const named_view& a, const named_view& b) {
    if (a.data != nullptr && a.data == b.data) refuse(a.name, "the memory of " + text(b.name), "memory of its own");
  };
  for (const named_view* a = written.begin(); a != written.end(); ++a) {
    for (const named_view& b : read) require(*a, b);
    for (const named_view* b = written.begin(); b != a; ++b) require(*a, *b);
  }
}

}}}  // namespace cca::CCA_TARGET::detail
