#pragma once

// Who holds which tokens, at random: without MPI.

#include <cca/mpi/layout.hpp>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace cca::test {

/// Any boundaries, on any ranks: segments of no tokens, several of a sequence on a rank, ranks without any.
template <class Random>
mpi::layout random_segments(Random& random, std::int64_t ranks, const std::vector<std::int64_t>& lengths) {
  const auto draw = [&random](std::int64_t greatest) {
    return std::uniform_int_distribution<std::int64_t>(0, greatest)(random);
  };
  std::vector<mpi::segment> all;
  for (std::size_t q = 0; q < lengths.size(); ++q) {
    std::vector<std::int64_t> cuts{0, lengths[q]};
    for (std::int64_t more = draw(2 * ranks); more > 0; --more) cuts.push_back(draw(lengths[q]));
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i)
      all.push_back({draw(ranks - 1), static_cast<std::int64_t>(q), {cuts[i], cuts[i + 1]}});
  }
  std::shuffle(all.begin(), all.end(), random);
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.rank < b.rank; });
  return {ranks, lengths, all};
}

}  // namespace cca::test
