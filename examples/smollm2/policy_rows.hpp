#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cca/cca.hpp>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../policies/block_selection.hpp"
#include "../policies/evictions.hpp"
#include "../policies/recycled_attention.hpp"
#include "../policies/sinks_and_window.hpp"
#include "model.hpp"

namespace smollm2 {

// Systems of the field as attentions of the model, from the policies beside this folder: those that choose by what came
// before, so that the loss of a text means something. SnapKV and MInference's vertical-slash choose once, by the end of a
// prompt.

/// Rows of keys and values, as the policies take them.
inline policies::rows<float> rows_of(input_view from) {
  policies::rows<float> rows(from.heads(), from.length(), from.dim());
  for (std::int64_t h = 0; h < rows.heads; ++h)
    for (std::int64_t t = 0; t < rows.length; ++t) std::copy_n(from.row(0, h, t), rows.dim, rows.row(h, t));
  return rows;
}

/// Until when H2O's cache of `places` tokens, half of them the latest, keeps each token: `policies::heavy_hitters` with a
/// product of matrices for its scores.
inline void run_heavy_hitters(input_view query, input_view key, std::int64_t kv_head, std::int64_t places,
                              std::int64_t* until) {
  const std::int64_t sharing = query.heads() / key.heads(), dim = key.dim(), recent = places / 2;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  matrix kept(places, dim), queries(sharing, dim);
  Eigen::ArrayXf mass = Eigen::ArrayXf::Zero(places);
  std::vector<std::int64_t> position(static_cast<std::size_t>(places));
  const auto place_of = [&](std::int64_t i) -> std::int64_t& { return position[static_cast<std::size_t>(i)]; };
  std::int64_t free = 0;
  for (std::int64_t t = 0; t < key.length(); ++t) {
    kept.row(free) = Eigen::Map<const Eigen::RowVectorXf>(key.row(0, kv_head, t), dim);
    mass(free) = 0;
    place_of(free) = t;
    for (std::int64_t i = 0; i < sharing; ++i)
      queries.row(i) = Eigen::Map<const Eigen::RowVectorXf>(query.row(0, kv_head * sharing + i, t), dim);
    const std::int64_t filled = std::min(t + 1, places);
    const Eigen::ArrayXXf scores = scale * (kept.topRows(filled) * queries.transpose()).array();
    for (std::int64_t i = 0; i < sharing; ++i) {
      const Eigen::ArrayXf weights = (scores.col(i) - scores.col(i).maxCoeff()).exp();
      mass.head(filled) += weights / weights.sum();
    }
    free = t + 1;
    if (filled < places) continue;
    free = -1;
    for (std::int64_t i = 0; i < places; ++i)
      if (place_of(i) + recent <= t + 1 && (free < 0 || mass(i) < mass(free))) free = i;
    until[place_of(free)] = t + 1;
  }
}

/// H2O, arXiv 2306.14048.
inline attention_function heavy_hitters_of(std::int64_t places, cca::openmp_executor executor) {
  return [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
    policies::evictions evicted(key.heads(), key.length());
    executor(key.heads(), [&](std::int64_t h) { run_heavy_hitters(query, key, h, places, evicted.until.row(h, 0)); });
    cca::attend({query, key.slice(0, 0), value.slice(0, 0)}, evicted.over<float>(key, value, query.heads()), {out},
                {.first_position = 0}, executor);
  };
}

/// StreamingLLM, arXiv 2309.17453: a window and sink tokens, at the distances that they have in the cache.
inline attention_function streaming_of(std::int64_t window, std::int64_t sinks, double rope_base) {
  return [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
    const std::int64_t length = query.length(), last = length - 1;
    // Queries come turned to their position in the text; for the sink tokens they are turned on to the cache's last.
    const rope turn(sinks + window - 1 - last, length, query.dim(), rope_base);
    policies::rows<float> sink_query = rows_of(query), lse(query.heads(), length, 1);
    for (std::int64_t h = 0; h < sink_query.heads; ++h)
      for (std::int64_t t = 0; t < length; ++t) {
        matrix row = Eigen::Map<const Eigen::RowVectorXf>(sink_query.row(h, t), query.dim());
        turn.turn(row, last - t);
        std::copy_n(row.data(), query.dim(), sink_query.row(h, t));
      }
    policies::attend_sinks_and_window<float>(
        {query, key, value, std::as_const(sink_query).view(), key.slice(0, sinks), value.slice(0, sinks)}, window,
        {out, lse.numbers()});
  };
}

/// Quest, arXiv 2406.10774, or MoBA, arXiv 2502.13189, by their bounds or means: `count` blocks of `block` tokens.
template <class Bounds>
attention_function blocks_of(std::int64_t block, std::int64_t count, cca::openmp_executor executor) {
  return [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
    const Bounds bounds(key, block);
    const policies::block_selection chosen(query, 0, key.heads(), bounds, block, count);
    cca::attend({query, key.slice(0, 0), value.slice(0, 0)}, chosen.over<float>(key, value), {out},
                {.first_position = 0}, executor);
  };
}

/// Recycled Attention, arXiv 2411.05787: every `stride`-th query sees all, those between the `count` tokens that it gave most.
inline attention_function recycled_of(std::int64_t stride, std::int64_t count) {
  return [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
    policies::rows<float> lse(query.heads(), query.length(), 1);
    policies::recycled_attention<float>(query, key, value, stride, count).attend({out, lse.numbers()});
  };
}

}  // namespace smollm2
