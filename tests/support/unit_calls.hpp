#pragma once

// Calls of matrix units: problems with operands of their types, whose results are floats.

#include "textbooks.hpp"
#include "unit_entry_points.hpp"

namespace cca::test {

/// A problem with operands of one type, and its results as floats.
template <class Element>
struct unit_call {
  problem p;
  std::vector<tensor<Element>> operands;
  tensor<std::int64_t, 3> seen;
  tensor<float, 3> sinks{{0, 0, 0}}, slopes = sinks, key_bias = sinks, far_bias = sinks;  // none
  tensor<std::int64_t, 3> positions{{0, 0, 0}};

  template <class NextLayout>
  unit_call(const problem& of, random_engine& random, const NextLayout& next_layout)
      : p(of), seen({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0}) {
    for (const extents& e : operand_extents(p)) operands.emplace_back(e, next_layout()).randomize(random);
    for_each_row(seen.view(),
                 [&](std::int64_t b, std::int64_t h, std::int64_t i) { *seen.row(b, h, i) = seen_count(p, b, h, i); });
  }
  unit_call(const problem& of, random_engine& random) : unit_call(of, random, [] { return layout{}; }) {}

  [[nodiscard]] tensor_view<const Element> operand(std::size_t i) const { return operands[i].view(); }
  /// Empty for another entry than `attend`.
  [[nodiscard]] far_context<Element> far_rows() const {
    if (p.entry != entry::attend) return {};
    return {operand(3), operand(4), seen.view(), given(far_bias), given(positions)};
  }

  [[nodiscard]] unit_arguments<Element> arguments() const {
    unit_arguments<Element> a{.operands = {}, .seen = seen.view(), .results = {}};
    for (const tensor<Element>& t : operands) a.operands.push_back(t.view());
    a.sinks = given(sinks);
    a.slopes = given(slopes);
    a.key_bias = given(key_bias);
    a.far_bias = given(far_bias);
    a.positions = given(positions);
    return a;
  }
  template <class T>
  static lse_view<const T> given(const tensor<T, 3>& numbers) {
    return numbers.view().empty() ? lse_view<const T>{} : numbers.view();
  }
  [[nodiscard]] inputs<Element> in() const {
    return {operand(0), operand(1), operand(2), given(sinks), given(slopes), given(key_bias)};
  }

  [[nodiscard]] problem with(matrix_unit unit) const {
    problem asked = p;
    asked.options.unit = unit;
    return asked;
  }

  [[nodiscard]] results<float> forward(matrix_unit unit, const any_executor& run = {},
                                       const layout& layout = {}) const {
    return collect<float>(
        p.sizes,
        [&](tensor_view<float> out, lse_view<float> lse) {
          unit_arguments<Element> a = arguments();
          a.results = {out, with_dim(lse)};
          call(with(unit), a, run);
        },
        layout);
  }

  /// The gradients of the operands, and of sinks, slopes and biases where they are given, as rows of one element, for the
  /// results of a forward pass.
  [[nodiscard]] std::vector<tensor<float>> gradient(matrix_unit unit, const results<float>& of,
                                                    const tensor<Element>& grad_out, const tensor<float, 3>& grad_lse,
                                                    const any_executor& run = {}) const {
    std::vector<tensor<float>> grad;
    for (const extents& e : gradient_result_extents(p)) grad.emplace_back(e);
    unit_arguments<Element> a = arguments();
    for (tensor<float>& g : grad) a.results.push_back(g.view());
    std::vector<tensor<float>> more;
    for (const auto* operand : {&a.sinks, &a.slopes, &a.key_bias, &a.far_bias})
      more.push_back(tensor<float>({operand->extent[0], operand->extent[1], operand->extent[2], 1}));
    if (a.sinks.data != nullptr) a.grad_sinks = without_dim(more[0].view());
    if (a.slopes.data != nullptr) a.grad_slopes = without_dim(more[1].view());
    if (a.key_bias.data != nullptr) a.grad_key_bias = without_dim(more[2].view());
    if (a.far_bias.data != nullptr) a.grad_far_bias = without_dim(more[3].view());
    a.out = of.out.view();
    a.lse = of.lse.view();
    a.grad_out = grad_out.view();
    a.grad_lse = grad_lse.view();
    call_gradient(with(unit), a, run);
    grad.insert(grad.end(), more.begin(), more.end());
    for (const tensor<float>& g : grad) EXPECT_TRUE(g.canaries_intact());
    return grad;
  }
};

}  // namespace cca::test
