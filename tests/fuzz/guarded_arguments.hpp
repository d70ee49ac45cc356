#pragma once

// The arguments of a call, whose numbers are drawn, and where they lie.

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <vector>

#include "drawing.hpp"
#include "guarded_pages.hpp"
#include "unit_entry_points.hpp"

namespace cca::test {

/// Memory between pages that fault, the `i`th of a call.
inline const guarded_pages& pages(std::size_t i) {
  static std::vector<std::unique_ptr<guarded_pages>> all;
  while (all.size() <= i) all.push_back(std::make_unique<guarded_pages>(std::size_t{1} << 20));
  return *all[i];
}

/// Arguments in memory between pages that fault, at their beginning or their end. Each operand is there as numbers of
/// `Element`, too, where that is another type.
template <class T, class Element>
class guarded_arguments {
 public:
  guarded_arguments(const problem& p, byte_source& bytes) : problem_(p) {
    const auto next = [&](const extents& e) {
      const bool at_end = bytes.once_in(2);
      const std::int64_t padding = bytes.choice(std::array{0, 0, 1, 5});
      if (is_short) short_.push_back(place<Element>(pages(used_++), at_end, e, padding));
      return place<T>(pages(used_++), at_end, e, padding);
    };
    for (const extents& e : gradient_operand_extents(p)) operands_.push_back(next(e));
    for (const extents& e : gradient_result_extents(p)) results_.push_back(next(e));
    for (const extents& e : result_extents(p)) forward_results_.push_back(next(e));
    short_.resize(operands_.size());
    seen_ = tensor<std::int64_t, 3>({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0});
    for_each_row(seen_.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *seen_.row(b, h, i) = bytes.draw(0, p.far_length);
    });
    const bool poison = bytes.once_in(4);
    for (const tensor_view<T>& view : operands_)
      for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::generate_n(view.row(b, h, i), view.dim(), [&] { return static_cast<T>(bytes.number()); });
      });
    const tensor_view<T>& poisoned = operands_[static_cast<std::size_t>(bytes.draw(0, 2))];
    if (poison && !poisoned.empty()) {
      *poisoned.row(0, 0, bytes.byte() % poisoned.length()) = std::numeric_limits<T>::quiet_NaN();
      has_nan = true;
    }
    for (std::size_t i = 0; is_short && i < short_.size(); ++i)
      for_each_row(operands_[i], [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        const T* from = operands_[i].row(b, h, t);
        std::transform(from, from + operands_[i].dim(), short_[i].row(b, h, t), [](T x) { return Element(x); });
      });
  }

  bool has_nan = false;

  /// The arguments of the entry point.
  [[nodiscard]] arguments<T> forward() const {
    arguments<T> a{.operands = {}, .results = forward_results_, .seen = seen_.view()};
    a.operands.assign(operands_.begin(), operands_.begin() + std::ssize(operand_extents(problem_)));
    return a;
  }

  /// The arguments of its gradient, with the output and log-sum-exps that belong to them.
  [[nodiscard]] arguments<T> gradient() const {
    arguments<T> a{.operands = {}, .results = results_, .seen = seen_.view()};
    a.operands.assign(operands_.begin(), operands_.end());
    const std::size_t first = operand_extents(problem_).size();
    for (std::size_t i = 0; i < 2 && problem_.entry != entry::pool; ++i)
      copy(forward_results_[i], operands_[first + i]);
    return a;
  }

  /// The same arguments, which may have been spoilt, with the operands of `Element`: 16 bits hold every `number()`.
  [[nodiscard]] unit_arguments<Element> in_short(const arguments<T>& a) const {
    const auto operand = [&](std::size_t i) {
      tensor_view<const Element> view{nullptr, a.operands[i].extent, a.operands[i].stride};
      if constexpr (is_short)
        view.data = short_[i].data;
      else
        view.data = a.operands[i].data;
      return view;
    };
    unit_arguments<Element> s{.operands = {}, .seen = a.seen, .results = a.results};
    const std::size_t count = operand_extents(problem_).size();
    for (std::size_t i = 0; i < count; ++i) s.operands.push_back(operand(i));
    if (a.operands.size() == count) return s;
    s.out = a.operands[count];
    s.lse = without_dim(a.operands[count + 1]);
    s.grad_out = operand(count + 2);
    s.grad_lse = without_dim(a.operands[count + 3]);
    return s;
  }

 private:
  static constexpr bool is_short = !std::is_same_v<T, Element>;

  problem problem_;
  std::size_t used_ = 0;
  std::vector<tensor_view<T>> operands_, results_, forward_results_;
  std::vector<tensor_view<Element>> short_;
  tensor<std::int64_t, 3> seen_{{0, 0, 0}};
};

}  // namespace cca::test
