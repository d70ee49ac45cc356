#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

// The functions that policies are built on: those of cca::dispatch, whose kernels are compiled once for all programs,
// or the headers alone.
#ifdef CCA_POLICIES_DISPATCH
#include <cca/dispatch.hpp>
namespace policies {
namespace kernels = cca::dispatch;
}
#else
#include <cca/cca.hpp>
namespace policies {
namespace kernels = cca;
}
#endif

namespace policies {

constexpr std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

template <class T>
using view = cca::tensor_view<T>;

/// Rows that a policy owns, `[heads][length][dim]` in memory: one sequence.
template <class T>
struct rows {
  std::int64_t heads = 0, length = 0, dim = 0;
  std::vector<T> data;

  rows() = default;
  rows(std::int64_t h, std::int64_t l, std::int64_t d) : heads(h), length(l), dim(d), data(index(h * l * d)) {}

  [[nodiscard]] cca::tensor_view<T> view() { return cca::bhsd(data.data(), 1, heads, length, dim); }
  [[nodiscard]] cca::tensor_view<const T> view() const { return cca::bhsd(data.data(), 1, heads, length, dim); }
  /// One number per row, where `dim` is 1.
  [[nodiscard]] cca::lse_view<T> numbers() { return cca::bhs(data.data(), 1, heads, length); }
  [[nodiscard]] cca::lse_view<const T> numbers() const { return cca::bhs(data.data(), 1, heads, length); }
  [[nodiscard]] T* row(std::int64_t h, std::int64_t t) { return data.data() + (h * length + t) * dim; }
  [[nodiscard]] const T* row(std::int64_t h, std::int64_t t) const { return data.data() + (h * length + t) * dim; }
};

/// How many tokens each query may see, `[1, heads, length]` for all heads alike.
[[nodiscard]] inline cca::lse_view<const std::int64_t> same_for_heads(const std::vector<std::int64_t>& counts,
                                                                      std::int64_t heads) {
  return {counts.data(), {1, heads, static_cast<std::int64_t>(counts.size())}, {0, 0, 1}};
}

/// `attend` to a far context alone: there are no raw tokens beside it. The first query has the position `first`.
template <class T>
void attend_far(view<const T> query, const cca::far_context<T>& context, const cca::results<T>& to,
                std::int64_t first = 0) {
  kernels::attend<T>({query, context.key.slice(0, 0), context.value.slice(0, 0)}, context, to,
                     {.first_position = first});
}

/// Its gradients, which write `query`, `key` and `value` whole.
template <class T>
void attend_far_gradient(view<const T> query, const cca::far_context<T>& context, const cca::results<T>& of,
                         view<const T> grad_out, view<T> grad_query, view<T> grad_key, view<T> grad_value,
                         std::int64_t first = 0) {
  const cca::results<const T, const T> read{of.out, of.lse};
  kernels::attend_gradient<T>({query, context.key.slice(0, 0), context.value.slice(0, 0)}, context, read, {grad_out},
                              {grad_query, grad_key.slice(0, 0), grad_value.slice(0, 0), grad_key, grad_value},
                              {.first_position = first});
}

/// Adds rows to the first rows of others.
template <class T>
void add_rows(view<const T> from, view<T> to) {
  for (std::int64_t h = 0; h < from.heads(); ++h)
    for (std::int64_t t = 0; t < from.length(); ++t)
      for (std::int64_t d = 0; d < from.dim(); ++d) to.row(0, h, t)[d] += from.row(0, h, t)[d];
}

/// The product of two tokens' rows, of all heads together.
template <class T>
[[nodiscard]] double dot_of_heads(view<const T> a, std::int64_t i, view<const T> b, std::int64_t j) {
  double sum = 0;
  for (std::int64_t h = 0; h < a.heads(); ++h)
    for (std::int64_t d = 0; d < a.dim(); ++d)
      sum += static_cast<double>(a.row(0, h, i)[d]) * static_cast<double>(b.row(0, h, j)[d]);
  return sum;
}

/// Adds a token's rows, times a factor, to another's, in all heads.
template <class T>
void add_of_heads(T factor, view<const T> from, std::int64_t i, view<T> to, std::int64_t j) {
  for (std::int64_t h = 0; h < to.heads(); ++h)
    for (std::int64_t d = 0; d < to.dim(); ++d) to.row(0, h, j)[d] += factor * from.row(0, h, i)[d];
}

}  // namespace policies
