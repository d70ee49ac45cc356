#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Per lane of a tile, the half-open range of rows that its query sees. A lane without a query sees nothing.
template <class T, std::int64_t Lanes = tile_shape<T>::lanes>
struct lane_ranges {
  static constexpr std::int64_t W = width<T>;
  range lane[extent(Lanes)] = {};
  range any[extent(Lanes / W)] = {};  ///< per vector: the hull of what its queries see
  range all[extent(Lanes / W)] = {};  ///< per vector: what every one of its queries sees

  lane_ranges() = default;

  /// `visible(ranges)` writes those of `count` queries.
  template <class Visible>
  lane_ranges(std::int64_t count, const Visible& visible) {
    visible(lane);
    for (std::int64_t i = 0; i < count; ++i) {
      range& any_of = any[i / W];
      range& all_of = all[i / W];
      all_of = i % W == 0 ? lane[i] : intersection(all_of, lane[i]);
      any_of = hull(any_of, lane[i]);
    }
  }

  /// The hull of what the queries of all vectors see.
  [[nodiscard]] range seen_by_any() const {
    range total;
    for (const range& r : any) total = hull(total, r);
    return total;
  }

  /// What every query of the first `vectors` sees.
  [[nodiscard]] range seen_by_all(std::int64_t vectors = Lanes / W) const {
    range total = all[0];
    for (std::int64_t v = 1; v < vectors; ++v) total = intersection(total, all[v]);
    return total;
  }
};

/// The mask of a vector of lanes that sees every row of a part.
struct unmasked {
  template <class V>
  [[nodiscard]] CCA_INLINE V select(std::int64_t, V seen, V) const {
    return seen;
  }
};

/// Which lanes of a vector see row `j` of a part, counted from its first.
template <class T>
struct lane_mask {
  vec<T> begin, end;  // exact: small integers relative to the part

  lane_mask() = default;
  lane_mask(const range* lanes, range part) {
    alignas(alignment<T>) T b[width<T>];
    alignas(alignment<T>) T e[width<T>];
    for (std::size_t i = 0; i < width<T>; ++i) {
      b[i] = static_cast<T>(std::clamp(lanes[i].begin, part.begin, part.end) - part.begin);
      e[i] = static_cast<T>(std::clamp(lanes[i].end, part.begin, part.end) - part.begin);
    }
    begin = vec<T>::load_aligned(b);
    end = vec<T>::load_aligned(e);
  }

  [[nodiscard]] CCA_INLINE vec<T> select(std::int64_t j, vec<T> seen, vec<T> unseen) const {
    const vec<T> row(static_cast<T>(j));
    return xsimd::select((begin <= row) & (row < end), seen, unseen);
  }
};

/// Rows of a block that `vectors` vectors of a tile, from vector `first` on, take in together. Several see all of them; of one
/// `mask` says what it sees where it `hides` some from some lanes. (At run time: what multiplies is compiled once for both.)
template <class T, std::int64_t N>
struct tile_part {
  static constexpr std::int64_t vectors = N;
  std::int64_t first;
  range rows;
  bool hides = false;
  lane_mask<T> mask{};

  /// Whether every lane sees every row.
  [[nodiscard]] bool all_seen() const { return N > 1 || !hides; }

  /// Calls `f` with the mask of vector `n` of them.
  template <class F>
  CCA_INLINE void with_mask(std::int64_t, const F& f) const {
    if (all_seen())
      f(unmasked{});
    else
      f(mask);
  }
};

/// The scores of a part, or what became of them: `[row][lane]`, and their maximum in each lane.
template <class T>
struct score_block {
  T* data;
  std::int64_t stride;
  T* maximum = nullptr;

  /// Of vector `n` of the part, in row `j` of it.
  [[nodiscard]] CCA_INLINE T* at(std::int64_t j, std::int64_t n) const { return data + j * stride + n * width<T>; }
};

/// Calls `f(tile_part)` for parts of the rows `block` that together hold all that the `count` queries of a tile see of it.
///
/// Only where every lane sees every row do vectors go together, unmasked; at the edges each goes by its own range.
/// So it does in all of a block that is mostly edge: what is done once per part costs more there than is saved.
template <class T, class F>
CCA_INLINE void for_each_part(range block, const lane_ranges<T>& visible, std::int64_t count, const F& f) {
  using shape = tile_shape<T>;
  constexpr std::int64_t W = width<T>;
  const std::int64_t vectors = (count + W - 1) / W;
  range common = vectors > 1 ? intersection(block, visible.seen_by_all(vectors)) : range{};
  const range seen = intersection(block, visible.seen_by_any());
  if (2 * common.size() <= seen.size()) common = {block.end, block.end};
  const auto edge = [&](range rows) {
    for (std::int64_t v = 0; v < vectors; ++v) {
      const range part = intersection(rows, visible.any[v]);
      if (part.empty()) continue;
      if (intersection(part, visible.all[v]) == part)  // lanes without a query compute what nobody reads
        f(tile_part<T, 1>{v, part});
      else
        f(tile_part<T, 1>{v, part, true, {visible.lane + v * W, part}});
    }
  };
  edge({block.begin, common.begin});
  if (!common.empty()) {
    if (vectors == shape::vectors) {
      f(tile_part<T, shape::vectors>{0, common});
    } else if constexpr (shape::vectors == 4) {  // two of four, or three
      f(tile_part<T, 2>{0, common});
      if (vectors == 3) f(tile_part<T, 1>{2, common});
    }
  }
  edge({common.end, block.end});
}

}}}  // namespace cca::CCA_TARGET::detail
