#pragma once

// Entry points of operands of float and of 16 bits, gradients of the latter, and entry points of rows of 8 bits, with results
// of floats: the kernels, those of matrix units among them, are compiled once, in unit_entry_points.cpp, for all tests of an
// instruction set.

#include "gradient_entry_points.hpp"

namespace cca::test {

inline constexpr std::array unit_entries{entry::local, entry::attention, entry::attend};

/// Arguments of a gradient; of a call the operands and the results, which then are `out` and `lse`.
template <class Element>
struct unit_arguments {
  std::vector<tensor_view<const Element>> operands;  // of the entry point
  lse_view<const std::int64_t> seen;
  std::vector<tensor_view<float>> results;  // log-sum-exps are of dim 1
  tensor_view<const float> out{};
  lse_view<const float> lse{};
  tensor_view<const Element> grad_out{};
  lse_view<const float> grad_lse{};
  lse_view<const float> sinks{}, slopes{}, key_bias{}, far_bias{};
  lse_view<float> grad_sinks{}, grad_slopes{}, grad_key_bias{}, grad_far_bias{};
  lse_view<const std::int64_t> positions{}, visible_from{}, visible_until{};
  far_selection selected{};
};

/// Calls one of `unit_entries`.
template <class Element>
void call(const problem& p, const unit_arguments<Element>& a, const any_executor& run = {});

/// Calls one of them on rows of 8 bits: all, or with `Row` float the far ones of `attend`.
template <class Row>
void call_rows(const problem& p, const inputs<float, Row>& in, const far_context<q8>& context,
               const cca::results<float>& to);

template <class Element>
void call_gradient(const problem& p, const unit_arguments<Element>& a, const any_executor& run = {});

}  // namespace cca::test
