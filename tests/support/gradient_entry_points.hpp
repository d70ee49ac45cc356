#pragma once

// The gradient of every entry point that has one, as one kind of call, like entry_points.hpp.

#include "entry_points.hpp"

namespace cca::test {

inline constexpr std::array gradient_entries{entry::dense, entry::local, entry::attention, entry::attend, entry::pool};

/// Operands in the order of the gradient's parameters: those of the entry point, its output and log-sum-exp, and the
/// gradients of both; of pooling, those and the gradients of the cores. The log-sum-exps are of dim 1 here.
inline std::vector<extents> gradient_operand_extents(const problem& p) {
  std::vector<extents> all = operand_extents(p);
  const std::vector<extents> results = result_extents(p);
  for (int times = p.entry == entry::pool ? 1 : 2; times > 0; --times)
    all.insert(all.end(), results.begin(), results.end());
  return all;
}

/// The gradients that are written: of each operand of the entry point.
inline std::vector<extents> gradient_result_extents(const problem& p) { return operand_extents(p); }

/// The names of all tensor arguments, operands first.
inline std::vector<std::string> gradient_argument_names(entry entry) {
  switch (entry) {
    case entry::pool:
      return {"query", "key", "value", "grad_core_key", "grad_core_value", "grad_query", "grad_key", "grad_value"};
    case entry::attend:
      return {"query",    "key",      "value",      "far.key",  "far.value",  "out",          "lse",
              "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "grad_far_key", "grad_far_value"};
    default:
      return {"query", "key", "value", "out", "lse", "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value"};
  }
}

/// Calls the gradient. A last operand of `{}` means that there is no gradient of the log-sum-exp.
template <class T>
void call_gradient(const problem& p, const arguments<T>& a, const any_executor& run = {},
                   std::span<std::byte> workspace = {});

/// What `gradient_workspace_size` says.
template <class T>
std::size_t gradient_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run = {});

/// Memory for all arguments of a call. Layouts are drawn by `next_layout(may_broadcast)`, operands first.
template <class T>
struct gradient_memory {
  test::problem problem;
  std::vector<tensor<T>> operands, results;
  tensor<std::int64_t, 3> seen;

  template <class NextLayout>
  gradient_memory(const test::problem& p, const NextLayout& next_layout)
      : problem(p), seen({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0}) {
    const std::vector<extents> all = gradient_operand_extents(p);
    for (std::size_t i = 0; i < all.size(); ++i) operands.emplace_back(all[i], next_layout(!is_forward_result(i)));
    for (const extents& e : gradient_result_extents(p)) results.emplace_back(e, next_layout(false));
    for_each_row(seen.view(),
                 [&](std::int64_t b, std::int64_t h, std::int64_t i) { *seen.row(b, h, i) = seen_count(p, b, h, i); });
  }

  explicit gradient_memory(const test::problem& p) : gradient_memory(p, [](bool) { return layout{}; }) {}

  /// How many operands the entry point itself has.
  [[nodiscard]] std::size_t forward_operands() const { return operand_extents(problem).size(); }

  /// Whether operand `i` is the output or the log-sum-exp, which the entry point writes.
  [[nodiscard]] bool is_forward_result(std::size_t i) const {
    return problem.entry != entry::pool && (i == forward_operands() || i == forward_operands() + 1);
  }

  /// Random operands and incoming gradients; the output and the log-sum-exp that belong to them.
  gradient_memory& randomize(random_engine& random) {
    for (std::size_t i = 0; i < operands.size(); ++i)
      if (!is_forward_result(i)) operands[i].randomize(random);
    return forward();
  }

  /// The output and the log-sum-exp of the operands as they are.
  gradient_memory& forward() {
    if (problem.entry == entry::pool) return *this;
    const auto first = static_cast<std::ptrdiff_t>(forward_operands());
    test::arguments<T> a = arguments();
    a.results = {operands[forward_operands()].view(), operands[forward_operands() + 1].view()};
    a.operands.erase(a.operands.begin() + first, a.operands.end());
    call(problem, a);
    return *this;
  }

  [[nodiscard]] test::arguments<T> arguments() {
    test::arguments<T> a{.operands = {}, .results = {}, .seen = seen.view()};
    for (const tensor<T>& operand : operands) a.operands.push_back(operand.view());
    for (tensor<T>& result : results) a.results.push_back(result.view());
    return a;
  }

  /// Calls the gradient with all arguments.
  gradient_memory& gradient(const any_executor& run = {}) {
    call_gradient(problem, arguments(), run);
    return *this;
  }

  [[nodiscard]] testing::AssertionResult canaries_intact() const {
    for (const auto* tensors : {&operands, &results})
      for (const tensor<T>& t : *tensors)
        if (const auto intact = t.canaries_intact(); !intact) return intact;
    return seen.canaries_intact();
  }
};

/// The textbook's gradients of the operands of a call.
template <class Scalar, class T>
std::vector<reference::tensor<Scalar>> textbook_gradient(const problem& p, const arguments<T>& a) {
  const auto& in = a.operands;
  const auto of = [&] {
    const std::size_t first = in.size() - 2;
    if (p.entry == entry::pool)
      return reference::pool_gradient<Scalar>(in[0], in[1], in[2], in[first], in[first + 1], p.options);
    const incoming from{in[first], without_dim(in[first + 1])};
    if (p.entry == entry::attention) return reference::attention_gradient<Scalar>(inputs_of(a), from, p.options);
    if (p.entry == entry::attend) return reference::attend_gradient<Scalar>(inputs_of(a), far_of(a), from, p.options);
    return reference::local_attention_gradient<Scalar>(inputs_of(a), from, p.options);
  };
  reference::gradient<Scalar> grad = of();
  std::vector<reference::tensor<Scalar>> all{std::move(grad.query), std::move(grad.key), std::move(grad.value)};
  if (p.entry == entry::attend) {
    all.push_back(std::move(grad.far_key));
    all.push_back(std::move(grad.far_value));
  }
  return all;
}

}  // namespace cca::test
