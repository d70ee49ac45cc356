#pragma once

// Calls with what is added to scores: sink logits, slopes, biases; their gradients, the textbook's, and how they are judged.

#include "gradient_entry_points.hpp"

namespace cca::test {

/// Extents of sink logits: none, one per head, and one per query or sequence.
enum class sinks { none, per_head, per_sequence, per_query };
inline constexpr std::array all_sinks{sinks::none, sinks::per_head, sinks::per_sequence, sinks::per_query};

inline std::array<std::int64_t, 3> sink_extents(sinks kind, const sizes& s) {
  if (kind == sinks::none) return {};
  return {kind == sinks::per_head ? 1 : s.batch, s.heads, kind == sinks::per_query ? s.queries : 1};
}

/// What is added to the scores of a call.
struct score_terms {
  test::sinks sinks = test::sinks::none;
  bool slopes = false;
  std::int64_t key_bias_heads = 0, far_bias_heads = 0;  // 0: no biases
  bool shared = true;                                   // by sequences
  bool positions = true;                                // of far rows, where there are slopes

  friend std::ostream& operator<<(std::ostream& to, const score_terms& t) {
    return to << "sinks " << static_cast<int>(t.sinks) << ", slopes " << t.slopes << ", heads of biases "
              << t.key_bias_heads << " and " << t.far_bias_heads << ", shared " << t.shared;
  }
};

inline std::string label_of(const problem& p, const score_terms& terms) {
  std::ostringstream label;
  label << p << ", " << terms;
  return label.str();
}

/// An operand of three extents and its gradient; of no extents where it is not given.
template <class T>
struct optional_operand {
  tensor<T, 3> numbers, grad;

  optional_operand(std::array<std::int64_t, 3> extent, random_engine& random, double deviation)
      : numbers(extent, random_layout(random)), grad(extent, random_layout(random)) {
    numbers.randomize(random, deviation);
  }

  [[nodiscard]] bool given() const { return numbers.view().extent[1] > 0; }
  void put(lse_view<const T>& to, lse_view<T>& grad_to) {
    if (given()) to = std::as_const(numbers).view(), grad_to = grad.view();
  }
};

/// A call with what is added to its scores, its gradient, and all that they need.
template <class T>
struct score_call {
  gradient_memory<T> memory;
  score_terms terms;
  optional_operand<T> sinks, slopes, key_bias, far_bias;
  tensor<std::int64_t, 3> positions;
  std::function<void(test::arguments<T>&)> adjust = [](test::arguments<T>&) {};  // the arguments of all its calls

  score_call(const problem& p, const score_terms& of, random_engine& random)
      : memory(
            p,
            [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); }),
        terms(of),
        sinks(sink_extents(of.sinks, p.sizes), random, 3),
        slopes({of.shared ? 1 : p.sizes.batch, of.slopes ? p.sizes.heads : 0, 1}, random, 0.2),
        key_bias({of.shared ? 1 : p.sizes.batch, of.key_bias_heads, p.sizes.keys}, random, 1),
        far_bias({of.shared ? 1 : p.sizes.batch, of.far_bias_heads, p.far_length}, random, 1),
        positions({of.shared ? 1 : p.sizes.batch, p.far_heads, p.far_length}, random_layout(random)) {
    positions.generate([&] { return draw(random, -20, p.sizes.keys + 20); });
    // Mostly as ALiBi has them. Below 0 they make large logits of long contexts, whose rounding is that of no other test.
    slopes.numbers.generate([&] {
      const bool negative = p.sizes.keys < 20 && draw(random, 0, 3) == 0;
      return static_cast<T>(draw(random, 1, 9)) * static_cast<T>(negative ? -0.03 : 0.05);
    });
    for (std::size_t i = 0; i < memory.operands.size(); ++i)
      if (!memory.is_forward_result(i)) memory.operands[i].randomize(random);
  }
  score_call(const problem& p, test::sinks kind, random_engine& random)
      : score_call(p, score_terms{.sinks = kind}, random) {}

  [[nodiscard]] test::arguments<T> gradient_arguments() {
    arguments<T> a = memory.arguments();
    sinks.put(a.sinks, a.grad_sinks);
    slopes.put(a.slopes, a.grad_slopes);
    key_bias.put(a.key_bias, a.grad_key_bias);
    far_bias.put(a.far_bias, a.grad_far_bias);
    if (terms.slopes && terms.positions && memory.problem.entry == entry::attend)
      a.positions = std::as_const(positions).view();
    adjust(a);
    return a;
  }

  /// Out and log-sum-exp go where the gradient reads them.
  score_call& forward(const any_executor& run = {}) {
    arguments<T> a = gradient_arguments();
    a.results = {out().view(), lse().view()};
    call(memory.problem, a, run);
    return *this;
  }
  score_call& gradient(const any_executor& run = {}) {
    call_gradient(memory.problem, gradient_arguments(), run);
    EXPECT_TRUE(memory.canaries_intact());
    for (const auto* of : {&sinks, &slopes, &key_bias, &far_bias}) EXPECT_TRUE(of->grad.canaries_intact());
    return *this;
  }

  [[nodiscard]] tensor<T>& out() { return memory.operands[memory.forward_operands()]; }
  [[nodiscard]] tensor<T>& lse() { return memory.operands[memory.forward_operands() + 1]; }

  /// All that the call and its gradient wrote.
  [[nodiscard]] std::vector<tensor_view<T>> written() {
    std::vector<tensor_view<T>> all{out().view(), lse().view()};
    for (tensor<T>& grad : memory.results) all.push_back(grad.view());
    for (auto* of : {&sinks, &slopes, &key_bias, &far_bias})
      if (of->given()) all.push_back(with_dim(of->grad.view()));
    return all;
  }

  template <class Scalar>
  [[nodiscard]] reference::result<Scalar> textbook() {
    const problem& p = memory.problem;
    const arguments<T> a = gradient_arguments();
    if (p.entry == entry::attend) return reference::attend<Scalar>(inputs_of(a), far_of(a), p.options);
    if (p.entry == entry::attention) return reference::attention<Scalar>(inputs_of(a), p.options);
    return reference::local_attention<Scalar>(inputs_of(a), p.options);
  }
  template <class Scalar>
  [[nodiscard]] reference::gradient<Scalar> textbook_gradient() {
    const problem& p = memory.problem;
    const arguments<T> a = gradient_arguments();
    const std::size_t last = a.operands.size() - 1;
    const incoming from{a.operands[last - 1], without_dim(a.operands[last])};
    if (p.entry == entry::attend) return reference::attend_gradient<Scalar>(inputs_of(a), far_of(a), from, p.options);
    if (p.entry == entry::attention) return reference::attention_gradient<Scalar>(inputs_of(a), from, p.options);
    return reference::local_attention_gradient<Scalar>(inputs_of(a), from, p.options);
  }
};

/// Judges out, log-sum-exp and all gradients of calls.
template <class T>
class score_rules {
  static constexpr std::array names{"out",       "lse",   "query",  "key",      "value",   "far key",
                                    "far value", "sinks", "slopes", "key bias", "far bias"};

 public:
  void add(score_call<T>& c, const std::string& label) {
    add_forward(c, label);
    add_gradient(c, label);
  }
  void add_forward(score_call<T>& c, const std::string& label) {
    c.forward();
    const auto plain = c.template textbook<T>();
    const auto exact = c.template textbook<exact_type<T>>();
    add(0, std::as_const(c.out()).view(), plain.out, exact.out, label);
    add(1, std::as_const(c.lse()).view(), plain.lse, exact.lse, label);
  }
  void add_gradient(score_call<T>& c, const std::string& label) {
    c.gradient();
    const auto plain_grad = c.template textbook_gradient<T>();
    const auto exact_grad = c.template textbook_gradient<exact_type<T>>();
    const auto& grads = c.memory.results;
    add(2, grads[0].view(), plain_grad.query, exact_grad.query, label);
    add(3, grads[1].view(), plain_grad.key, exact_grad.key, label);
    add(4, grads[2].view(), plain_grad.value, exact_grad.value, label);
    if (grads.size() > 3) add(5, grads[3].view(), plain_grad.far_key, exact_grad.far_key, label);
    if (grads.size() > 4) add(6, grads[4].view(), plain_grad.far_value, exact_grad.far_value, label);
    const auto add_optional = [&](std::size_t i, const optional_operand<T>& of, const auto& p, const auto& e) {
      if (of.given()) add(i, with_dim(of.grad.view()), p, e, label);
    };
    add_optional(7, c.sinks, plain_grad.sink_logits, exact_grad.sink_logits);
    add_optional(8, c.slopes, plain_grad.alibi_slopes, exact_grad.alibi_slopes);
    add_optional(9, c.key_bias, plain_grad.key_bias, exact_grad.key_bias);
    add_optional(10, c.far_bias, plain_grad.far_bias, exact_grad.far_bias);
  }

  void expect() const {
    for (std::size_t i = 0; i < names.size(); ++i)
      if (used_[i]) {
        EXPECT_TRUE(rule_[i].holds()) << names[i];
      }
  }

 private:
  template <class Got, class Plain, class Exact>
  void add(std::size_t i, const Got& got, const Plain& plain, const Exact& exact, const std::string& label) {
    rule_[i].add(got, plain.view(), exact.view(), label);
    used_[i] |= !got.empty();
  }

  std::array<error_rule<T>, names.size()> rule_;
  std::array<bool, names.size()> used_{};
};

inline constexpr std::array score_entries{entry::dense, entry::local, entry::attention, entry::attend};
inline constexpr std::array softcaps{0.0, 0.4, 3.0, 50.0};

/// The sum of all results, weighed by the gradients that come in.
inline double weighed(score_call<double>& c) {
  const auto r = c.textbook<double>();
  const auto& in = c.memory.operands;
  double sum = 0;
  for_each_row(r.lse.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < r.out.extent[3]; ++d)
      sum += r.out.view().row(b, h, i)[d] * in[in.size() - 2].row(b, h, i)[d];
    sum += *r.lse.view().row(b, h, i) * *in.back().row(b, h, i);
  });
  return sum;
}

/// Expects that the slope of `weighed` by each number of an operand is its gradient.
template <class Gradient>
void expect_slopes(score_call<double>& c, tensor_view<double> operand, const Gradient& grad, const std::string& label) {
  constexpr double step = 1e-5;
  for_each_row(operand, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < operand.dim(); ++d) {
      double& x = operand.row(b, h, i)[d];
      const double at = x;
      x = at + step;
      const double above = weighed(c);
      x = at - step;
      const double below = weighed(c);
      x = at;
      EXPECT_NEAR(grad.view().row(b, h, i)[d], (above - below) / (2 * step), 1e-6) << label;
    }
  });
}

}  // namespace cca::test
