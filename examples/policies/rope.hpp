#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.hpp"

namespace policies {

/// Rotary position embeddings in halves, as Llama has them: the pairs (d, d + dim / 2) of a row are turned by
/// `position * base^(-2 d / dim)`.
struct rope {
  double base = 10000;

  template <class T>
  void turn(const T* from, T* to, std::int64_t dim, double position) const {
    const std::int64_t half = dim / 2;
    for (std::int64_t d = 0; d < half; ++d) {
      const double angle = position * std::pow(base, -2.0 * static_cast<double>(d) / static_cast<double>(dim));
      const double c = std::cos(angle), s = std::sin(angle);
      const double a = static_cast<double>(from[d]), b = static_cast<double>(from[d + half]);
      to[d] = static_cast<T>(a * c - b * s);
      to[d + half] = static_cast<T>(a * s + b * c);
    }
  }

  /// The rows of a view, row i at `position(i)`. Turned by the negative position a row's gradient comes back.
  template <class T, class Position>
  [[nodiscard]] rows<T> turned(view<const T> from, const Position& position) const {
    rows<T> to(from.heads(), from.length(), from.dim());
    for (std::int64_t h = 0; h < to.heads; ++h)
      for (std::int64_t i = 0; i < to.length; ++i)
        turn(from.row(0, h, i), to.row(h, i), to.dim, static_cast<double>(position(i)));
    return to;
  }
};

}  // namespace policies
