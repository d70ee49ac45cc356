#pragma once

#include <cstdint>

#include "call.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/tasks.hpp"
#include "detail/simd/convert.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// `quantize` of views that fit.
template <class From>
void round_rows(const tensor_view<From>& from, const tensor_view<q8>& to, const lse_view<float>& scales,
                const execution& run) {
  const std::int64_t tasks = from.batch() * from.heads();
  run_tasks(run, worker_count(run, tasks), tasks, [&](std::int64_t, std::int64_t task) {
    const std::int64_t b = task / from.heads(), h = task % from.heads();
    for (std::int64_t i = 0; i < from.length(b); ++i)
      *scales.row(b, h, i) = round_to_q8(from.row(b, h, i), from.dim(), to.row(b, h, i));
  });
}

}  // namespace detail

/// Rounds rows to 8 bits, as a cache of them does: the scale of a row is its largest magnitude over 127, its elements are
/// the nearest whole numbers to `number / scale`, ties to even, in [-127, 127].
///
/// @param rows  `[batch, heads, length, dim]`, of numbers
/// @param to  of the same extents and lengths, written whole
/// @param scales  `[batch, heads, length]`, written whole. A row of zeros has the scale 0; a row with an infinity, a NaN or a
///   number beyond float's has the scale NaN: whoever sees it sees a NaN.
/// @param run  an executor
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
template <class From>
void quantize(const tensor_view<From>& rows, const tensor_view<q8>& to, const lse_view<float>& scales,
              const execution& run = {}) {
  static_assert(detail::check_elements<From>());
  const detail::named_view read("rows", rows);
  const detail::output_view elements("to", to), factors("scales", scales);
  detail::require_operand(read);
  detail::require_output(elements);
  detail::require_output(factors);
  detail::require_shape(elements, rows.heads(), rows.dim(), read);
  detail::require_shape(factors, rows.heads(), 1, read);
  detail::require_apart({elements, factors}, {read});
  detail::round_rows(rows, to, scales, run);
}

}}  // namespace cca::CCA_TARGET
