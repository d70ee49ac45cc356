#pragma once

#include <cstdint>
#include <vector>

#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "layout.hpp"
#include "plan.hpp"

/// What a layer of attention costs across ranks, counted from the plan of the call: for any number of them, without MPI.
///
/// With L tokens, R ranks, groups of g, a window of s and m sink tokens; a row is a key and a value, `D + D_v` elements:
///
///   what each rank receives       rows                              heads
///   halo and sink tokens          at most s + g + m (contiguous)    Hkv
///   cores                         L / g (1 - 1 / R)                 Hq, or Hkv where they are shared
///   a ring, for comparison        L (1 - 1 / R)                     Hkv
///
/// So cores per key/value head are 1 / g of a ring, those per query head Hq / (g Hkv) of it. The halo does not grow with L.
/// A backward pass receives the same once more, as floats, and the halo and the cores of the forward pass again.
///
/// The time of a call is that of its slowest rank: halo, pooling, then the longer one of the window's scores and the cores'
/// way, then the cores' scores. A token of a group that is pooled takes as long as a score, once for each head of cores. A
/// message takes `latency + bytes / bandwidth`; all ranks' cores take `log2 R` latencies.
namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// What is sent and computed with.
struct call_shape {
  std::int64_t heads = 1, kv_heads = 1, dim = 1, value_dim = 1;
  std::int64_t element_bytes = 4;  ///< of keys and values
  std::int64_t core_bytes = 4;     ///< of an element of a core: 4 but for a matrix unit and for doubles
};

/// A cluster of alike machines, one rank on each.
struct machine {
  double pairs_per_second = 1;  ///< query-key pairs of one head that a rank computes, of the call's dims
  double bandwidth = 1;         ///< bytes per second that a rank receives
  double latency = 0;           ///< seconds of a message
};

/// What a call costs.
struct call_cost {
  std::int64_t most_raw_bytes = 0;   ///< that a rank receives: halo and sink tokens
  std::int64_t most_core_bytes = 0;  ///< the same of cores
  std::int64_t ring_bytes = 0;       ///< what a ring of all keys and values would receive
  double balance = 1;                ///< the most scores of a rank by their mean: 1 is even
  double compute_seconds = 0;        ///< of all scores, and of pooling, evenly shared: the least that R ranks can take
  double seconds = 0;                ///< of the slowest rank
  /// How much of R times the speed of one rank is left.
  [[nodiscard]] double efficiency() const { return seconds > 0 ? compute_seconds / seconds : 1; }
};

/// Counts a call. `pooled` as for `plan`.
[[nodiscard]] inline call_cost cost_of(const layout& tokens, const options& options, const call_shape& shape,
                                       const machine& cluster, bool overlap = true) {
  const partition by = partition_of(options);
  const bool pooled = cca::detail::pools(options);
  const plan planned(tokens, by, pooled);
  const std::int64_t dims = shape.dim + shape.value_dim, ranks = tokens.ranks();
  const std::int64_t core_heads = cca::detail::core_head_count(options, shape.heads, shape.kv_heads);
  const auto log2_of = [](std::int64_t n) {
    double steps = 0;
    for (; n > 1; n = (n + 1) / 2) ++steps;
    return steps;
  };
  const double pair_seconds = static_cast<double>(shape.heads) / cluster.pairs_per_second;
  call_cost all;
  double pairs = 0, most = 0, pooling_seconds = 0;
  std::int64_t total = 0;
  for (std::int64_t q = 0; q < tokens.sequences(); ++q) total += tokens.length(q);
  for (std::int64_t r = 0; r < ranks; ++r) {
    const auto received = planned.received_by(r);
    const auto work = planned.pairs_of(r);
    const std::int64_t raw_bytes = received.raw * shape.kv_heads * dims * shape.element_bytes;
    const std::int64_t core_bytes = received.cores * core_heads * dims * shape.core_bytes;
    all.most_raw_bytes = cca::detail::larger(all.most_raw_bytes, raw_bytes);
    all.most_core_bytes = cca::detail::larger(all.most_core_bytes, core_bytes);
    const double window = static_cast<double>(work.raw) * pair_seconds,
                 far_part = static_cast<double>(work.cores) * pair_seconds,
                 pooling = static_cast<double>(work.pooled * core_heads) / cluster.pairs_per_second;
    const double halo =
        static_cast<double>(received.messages) * cluster.latency + static_cast<double>(raw_bytes) / cluster.bandwidth;
    const double way = pooled && ranks > 1
                           ? log2_of(ranks) * cluster.latency + static_cast<double>(core_bytes) / cluster.bandwidth
                           : 0;
    // Options are compared first: one number to all ranks and back.
    const double compared = 2 * log2_of(ranks) * cluster.latency;
    const double meanwhile = overlap ? cca::detail::larger(window, way) : window + way;
    all.seconds = cca::detail::larger(all.seconds, compared + halo + pooling + meanwhile + far_part);
    pairs += static_cast<double>(work.raw + work.cores);
    pooling_seconds += pooling;
    most = cca::detail::larger(most, static_cast<double>(work.raw + work.cores));
  }
  all.ring_bytes = (total - total / ranks) * shape.kv_heads * dims * shape.element_bytes;
  all.balance = pairs > 0 ? most * static_cast<double>(ranks) / pairs : 1;
  all.compute_seconds = (pairs * pair_seconds + pooling_seconds) / static_cast<double>(ranks);
  return all;
}

}}}  // namespace cca::CCA_TARGET::mpi
