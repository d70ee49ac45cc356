#pragma once

#include <cstddef>
#include <cstdint>

#include "../../executor.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Sums of the gradients of biases that sequences and heads may share. Tasks of one chain add in turn (`backward`), those of
/// different ones at once: so every sequence has sums of its own, of as many heads as chains and biases need apart.
template <class T>
class bias_sums {
 public:
  /// For none.
  bias_sums() = default;
  /// For biases of `bias_heads` heads and `length` rows; `head_groups` as in `backward`.
  bias_sums(std::int64_t batch, std::int64_t head_groups, std::int64_t bias_heads, std::int64_t length)
      : batch_(batch),
        heads_(bias_heads == 0 ? 0 : head_groups / gcd(head_groups, bias_heads) * bias_heads),
        length_(length) {}

  [[nodiscard]] std::size_t bytes() const { return scratch_bytes<T>(size()); }

  /// Zeros, `[batch, heads, length]`; no data where there are none.
  [[nodiscard]] tensor_view<T, 3> take(scratch& memory) const {
    if (size() == 0) return {};
    const tensor_view<T, 3> sums = bhs(memory.take<T>(size()), batch_, heads_, length_);
    fill_n(sums.data, size(), T(0));
    return sums;
  }

 private:
  [[nodiscard]] std::int64_t size() const { return element_count<T>(batch_, heads_, length_); }

  std::int64_t batch_ = 0, heads_ = 0, length_ = 0;
};

/// Adds up the sums of all that share a bias, in their order.
template <class T, executor E>
void add_up(tensor_view<T, 3> sums, tensor_view<T, 3> grad, const E& run) {
  const std::int64_t tasks = grad.heads();
  run_tasks(run, worker_count(run, tasks), tasks, [&](std::int64_t, std::int64_t head) {
    const std::int64_t sharing = sums.heads() / grad.heads();
    for (std::int64_t b = 0; b < grad.batch(); ++b)
      for (std::int64_t i = 0; i < grad.length(b); ++i) *grad.row(b, head, i) = T(0);
    for (std::int64_t b = 0; b < sums.batch(); ++b) {
      const std::int64_t to = grad.batch() == 1 ? 0 : b;
      for (std::int64_t h = head * sharing; h < (head + 1) * sharing; ++h)
        for (std::int64_t i = 0; i < grad.length(to); ++i) *grad.row(to, head, i) += *sums.row(b, h, i);
    }
  });
}

}}}  // namespace cca::CCA_TARGET::detail
