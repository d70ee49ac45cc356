#pragma once

// The textbook of every entry point as one kind of call.

#include "entry_points.hpp"

namespace cca::test {

/// The textbook of `merge`, of operands `out_a`, `lse_a`, `out_b`, `lse_b`.
template <class Scalar, class T>
std::vector<reference::tensor<Scalar>> textbook_merge(const std::vector<tensor_view<const T>>& in) {
  std::vector<reference::tensor<Scalar>> all{reference::tensor<Scalar>(in[0].extent),
                                             reference::tensor<Scalar>(in[1].extent)};
  for_each_row(in[0], [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    const auto x = static_cast<Scalar>(*in[1].row(b, h, i)), y = static_cast<Scalar>(*in[3].row(b, h, i));
    const Scalar maximum = std::max(x, y);
    const bool empty = maximum == -std::numeric_limits<Scalar>::infinity();
    const Scalar lse = empty ? maximum : maximum + std::log(std::exp(x - maximum) + std::exp(y - maximum));
    *all[1].view().row(b, h, i) = lse;
    for (std::int64_t d = 0; d < in[0].dim() && !empty; ++d)
      all[0].view().row(b, h, i)[d] = std::exp(x - lse) * static_cast<Scalar>(in[0].row(b, h, i)[d]) +
                                      std::exp(y - lse) * static_cast<Scalar>(in[2].row(b, h, i)[d]);
  });
  return all;
}

/// Of one that attends; `context` is for `attend` alone.
template <class Scalar, class Inputs, class Context>
reference::result<Scalar> textbook_attention(const problem& p, const Inputs& in, const Context& context) {
  if (p.entry == entry::attention) return reference::attention<Scalar>(in, p.options);
  if (p.entry == entry::attend) return reference::attend<Scalar>(in, context, p.options);
  return reference::local_attention<Scalar>(in, p.options);
}

/// The results of a call: output and log-sum-exps, or core keys and values.
template <class Scalar, class T>
std::vector<reference::tensor<Scalar>> textbook_forward(const problem& p, const std::vector<tensor_view<const T>>& in,
                                                        lse_view<const std::int64_t> seen) {
  if (p.entry == entry::merge) return textbook_merge<Scalar>(in);
  if (p.entry == entry::pool) {
    auto cores = reference::pool<Scalar>(in[0], in[1], in[2], p.options);
    return {std::move(cores.first), std::move(cores.second)};
  }
  far_context<T> context;
  if (p.entry == entry::attend) context = {in[3], in[4], seen};
  auto r = textbook_attention<Scalar>(p, inputs<T>{in[0], in[1], in[2]}, context);
  return {std::move(r.out), std::move(r.lse)};
}

}  // namespace cca::test
