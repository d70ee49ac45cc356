#pragma once

#include <cstdint>

#include "../base/numbers.hpp"
#include "../simd/dot.hpp"
#include "../simd/simd.hpp"
#include "../softmax/row_softmax.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The attention of one query to a part of its context: enough to merge parts in a fixed order.
template <class T>
class partial_result {
 public:
  static constexpr std::int64_t size(std::int64_t value_dim) { return padded<T>(value_dim) + width<T>; }

  partial_result(T* memory, std::int64_t value_dim) : memory_(memory), value_dim_(value_dim) {}

  void begin() {
    put({});
    fill_n(out(), padded<T>(value_dim_), T(0));
  }

  /// Turns `count` scores into weights, and shrinks what was added before to match.
  void weigh(T* scores, std::int64_t count, T unit, int headroom) {
    row_softmax<T> softmax = get();
    const T rescale = softmax.absorb(scores, count, unit, headroom);
    put(softmax);
    if (rescale != T(1)) scale_row(out(), value_dim_, rescale, out());
  }

  /// Joins another part of the same query's context; of a part that has seen nothing only the sum is looked at.
  void merge(const partial_result& other, T unit) {
    row_softmax<T> whole = get();
    const row_softmax<T> part = other.get();
    if (part.sum == T(0)) return;
    const auto [first, second] = whole.join(part, unit);
    // Vectors, of which no compiler chooses what it makes one operation of.
    for (std::int64_t d = 0; d < value_dim_; d += width<T>) {
      const vec<T> more = vec<T>(second) * vec<T>::load_aligned(other.out() + d);
      fma<T>(vec<T>::load_aligned(out() + d), vec<T>(first), more).store_aligned(out() + d);
    }
    put(whole);
  }

  /// What turns `out` into the mean of the values, where `sink` is seen as well.
  [[nodiscard]] T share(const exponential_sum<T>& sink, T unit, int headroom) const {
    exponential_sum<T> whole = total(unit, headroom);
    if (sink.sum == T(0)) return get().inverse();
    const T own = whole.sum;
    return get().inverse() * (own * whole.join(sink).first * whole.inverse());
  }

  /// What was seen, in base 2.
  [[nodiscard]] exponential_sum<T> total(T unit, int headroom) const {
    const row_softmax<T> softmax = get();
    if (softmax.sum == T(0)) return {};
    return {product(softmax.maximum, unit), detail::ldexp(softmax.sum, headroom)};
  }

  /// The weighted sum of the values.
  [[nodiscard]] T* out() const { return memory_ + width<T>; }

  /// The maximum, of scores, and the sum of the weights.
  void put(const exponential_sum<T>& softmax) {
    memory_[0] = softmax.maximum;
    memory_[1] = softmax.sum;
  }

 private:
  [[nodiscard]] row_softmax<T> get() const { return {{memory_[0], memory_[1]}}; }
  T* memory_;
  std::int64_t value_dim_;
};

}}}  // namespace cca::CCA_TARGET::detail
