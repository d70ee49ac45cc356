#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// Recycled Attention: every S-th query sees all tokens before it, and those in between only the K of them to which
/// it gave most, and what has come since. Xu et al., arXiv 2411.05787 (later called RefreshKV). A head of keys goes
/// by the sum of the query heads that share it. All keys and values are kept; a step in between reads K + S of them
/// at most.
template <class T>
class recycled_attention {
 public:
  /// @param stride  S: the queries at the positions 0, S, 2 S, .. see everything
  /// @param count  K
  recycled_attention(view<const T> query, view<const T> key, view<const T> value, std::int64_t stride,
                     std::int64_t count)
      : query_(query), key_(key), value_(value), stride_(stride), most_(count + stride - 1) {
    for (std::int64_t t = 0; t < query.length(); ++t) seen_.push_back(t % stride == 0 ? 0 : t + 1);
    for (std::int64_t t = 0; t < query.length(); t += stride) full_seen_.push_back(t + 1);
    const auto steps = static_cast<std::int64_t>(full_seen_.size());
    full_out_ = rows<T>(query.heads(), steps, value.dim());
    full_lse_ = rows<T>(query.heads(), steps, 1);
    attend_far(full(query_), everything(), {full_out_.view(), full_lse_.numbers()});
    list(count);
  }

  /// Writes the answers, and the log-sum-exps that the gradient reads.
  void attend(const cca::results<T>& to) const {
    attend_far(query_, between(), to);
    for (std::int64_t h = 0; h < full_out_.heads; ++h)
      for (std::int64_t i = 0; i < full_out_.length; ++i) {
        std::copy_n(full_out_.row(h, i), full_out_.dim, to.out.row(0, h, i * stride_));
        *to.lse.row(0, h, i * stride_) = *full_lse_.row(h, i);
      }
  }

  /// The gradient given what was chosen, written whole: each query's by the kind that it is of. A query of the other
  /// kind sees nothing and gives nothing.
  void gradient(const cca::results<T>& of, view<const T> grad_out, view<T> query, view<T> key, view<T> value) const {
    rows<T> full_key(key.heads(), key.length(), key.dim()), full_value(key.heads(), key.length(), value.dim());
    attend_far_gradient<T>(query_, between(), of, grad_out, query, key, value);
    attend_far_gradient<T>(full(query_), everything(), {full(of.out), full(of.lse)}, full(grad_out), full(query),
                           full_key.view(), full_value.view());
    add_rows<T>(full_key.view(), key);
    add_rows<T>(full_value.view(), value);
  }

 private:
  /// Every S-th row.
  template <class View>
  [[nodiscard]] View full(View of) const {
    of.extent[2] = (of.extent[2] + stride_ - 1) / stride_;
    of.stride[2] *= stride_;
    return of;
  }

  [[nodiscard]] cca::far_context<T> everything() const {
    return {key_, value_, same_for_heads(full_seen_, query_.heads())};
  }

  [[nodiscard]] cca::far_context<T> between() const {
    cca::far_context<T> context{.key = key_, .value = value_};
    context.seen = same_for_heads(seen_, query_.heads());
    context.selected = {
        .blocks = cca::bhsd(lists_.data(), 1, key_.heads(), static_cast<std::int64_t>(full_seen_.size()), most_),
        .block_queries = stride_};
    return context;
  }

  /// One list for S queries: the K tokens of the full one, then those that come after it, which `seen` cuts.
  void list(std::int64_t count) {
    const auto steps = static_cast<std::int64_t>(full_seen_.size());
    const cca::lse_view<const T> lse = full_lse_.numbers();
    lists_.assign(index(key_.heads() * steps * most_), -1);
    for (std::int64_t step = 0; step < steps; ++step) {
      const std::int64_t t = step * stride_, end = std::min(t + stride_, key_.length());
      rows<double> mass(key_.heads(), t + 1, 1);
      add_mass<T>(query_.slice(t, 1), key_, lse.slice(step, 1), t, mass);
      for (std::int64_t h = 0; h < key_.heads(); ++h) {
        std::vector<std::int64_t> seen = places_of_largest(mass.row(h, 0), t + 1, count);
        for (std::int64_t j = t + 1; j < end; ++j) seen.push_back(j);
        std::copy(seen.begin(), seen.end(), lists_.data() + (h * steps + step) * most_);
      }
    }
  }

  view<const T> query_, key_, value_;
  std::int64_t stride_, most_;
  std::vector<std::int64_t> seen_, full_seen_, lists_;
  rows<T> full_out_, full_lse_;
};

}  // namespace policies
