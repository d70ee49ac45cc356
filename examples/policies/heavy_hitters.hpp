#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "evictions.hpp"
#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// SnapKV, Li et al., arXiv 2404.14469: the last queries of a prompt choose what is kept of it. What they gave to
/// each token before them, summed and smoothed by a maximum over `width` neighbours, is largest for the `kept` tokens
/// that later queries see, besides the last ones themselves. A head of keys goes by the sum of the query heads that
/// share it.
///
/// @param query,key  of a prompt and more tokens
/// @param lse  of dense attention over the prompt, whose length it has
/// @param last  queries of the prompt that choose
template <class T>
[[nodiscard]] evictions snapkv(view<const T> query, view<const T> key, cca::lse_view<const T> lse, std::int64_t last,
                               std::int64_t width, std::int64_t kept) {
  const std::int64_t prompt = lse.length(), before = prompt - last;
  rows<double> mass(key.heads(), prompt, 1), smooth(key.heads(), before, 1);
  add_mass(query.slice(before, last), key.slice(0, prompt), lse.slice(before, last), before, mass);
  evictions result(key.heads(), key.length());
  for (std::int64_t h = 0; h < key.heads(); ++h) {
    for (std::int64_t j = 0; j < before; ++j)
      *smooth.row(h, j) = *std::max_element(mass.row(h, std::max<std::int64_t>(j - width / 2, 0)),
                                            mass.row(h, std::min(j + width / 2 + 1, before)));
    std::fill_n(result.until.row(h, 0), before, prompt);
    for (const std::int64_t j : places_of_largest(smooth.row(h, 0), before, kept))
      *result.until.row(h, j) = cca::unlimited;
  }
  return result;
}

/// H2O, the heavy-hitter oracle, Zhang et al., arXiv 2306.14048: a cache of fixed size that keeps the latest tokens
/// and those that got most attention. When it is full, the token of the least accumulated attention leaves it, the
/// latest excepted. Attention is that of the cache's own answers, and a head of keys goes by the sum of the query
/// heads that share it.
template <class T>
class heavy_hitters {
 public:
  /// @param shape  one sequence; `value_dim` is given
  /// @param heavy,recent  tokens that are kept of either kind
  heavy_hitters(const cca::cache_shape& shape, std::int64_t heavy, std::int64_t recent)
      : heads_(shape.heads),
        recent_(recent),
        key_(shape.kv_heads, heavy + recent, shape.dim),
        value_(shape.kv_heads, heavy + recent, shape.value_dim),
        mass_(shape.kv_heads, heavy + recent, 1),
        position_(shape.kv_heads, heavy + recent, 1),
        free_(index(shape.kv_heads)) {}

  /// Appends one token and answers its query; then, where all places are taken, a token leaves each head.
  /// @param log  takes down what leaves
  void attend(view<const T> query, view<const T> key, view<const T> value, view<T> out, evictions& log) {
    const std::int64_t places = key_.length, t = length_++, filled = std::min(length_, places);
    for (std::int64_t h = 0; h < key_.heads; ++h) {
      const std::int64_t place = t < places ? t : free_[index(h)];
      std::copy_n(key.row(0, h, 0), key_.dim, key_.row(h, place));
      std::copy_n(value.row(0, h, 0), value_.dim, value_.row(h, place));
      *mass_.row(h, place) = 0;
      *position_.row(h, place) = t;
    }
    const view<const T> kept = key_.view().slice(0, filled);
    const std::vector<std::int64_t> all{filled};
    rows<T> lse(heads_, 1, 1);
    attend_far<T>(query, {kept, value_.view().slice(0, filled), same_for_heads(all, heads_)}, {out, lse.numbers()});
    add_mass<T>(query, kept, lse.numbers(), cca::unlimited, mass_);
    for (std::int64_t h = 0; h < key_.heads && filled == places; ++h) {
      free_[index(h)] = least_of(h);
      *log.until.row(h, *position_.row(h, free_[index(h)])) = length_;
    }
  }

  /// Bytes of the keys and values that are kept.
  [[nodiscard]] std::size_t bytes() const { return (key_.data.size() + value_.data.size()) * sizeof(T); }

 private:
  /// The place of the token that got least, of those that will not be among the latest when the next one has come.
  [[nodiscard]] std::int64_t least_of(std::int64_t h) const {
    std::int64_t least = -1;
    for (std::int64_t i = 0; i < key_.length; ++i)
      if (*position_.row(h, i) + recent_ <= length_ && (least < 0 || *mass_.row(h, i) < *mass_.row(h, least)))
        least = i;
    return least;
  }

  std::int64_t heads_, recent_, length_ = 0;
  rows<T> key_, value_;
  rows<double> mass_;
  rows<std::int64_t> position_;
  std::vector<std::int64_t> free_;
};

}  // namespace policies
