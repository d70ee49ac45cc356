#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

namespace smollm2 {

struct sampling_options {
  double temperature = 0;  ///< 0: always the likeliest token
  std::int64_t top_k = 0;  ///< only so many of the likeliest tokens; 0: all
  double top_p = 1;        ///< only the likeliest tokens that have this probability together
  std::uint64_t seed = 0;
};

/// Chooses tokens by their logits. The choice depends on the seed and the logits alone, not on the standard library.
class sampler {
 public:
  explicit sampler(const sampling_options& settings) : settings_(settings), random_(settings.seed) {}

  std::int32_t operator()(std::span<const float> logits) {
    if (!std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) {
      throw std::runtime_error("the model's logits are not finite");
    }
    if (settings_.temperature == 0) {
      return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    const std::vector<std::int32_t> tokens = candidates(logits);
    return tokens[draw(weights(tokens, logits))];
  }

 private:
  /// The tokens that `top_k` leaves, the likeliest first; of equal ones the lower number.
  [[nodiscard]] std::vector<std::int32_t> candidates(std::span<const float> logits) const {
    std::vector<std::int32_t> tokens(logits.size());
    std::iota(tokens.begin(), tokens.end(), 0);
    const auto all = std::ssize(tokens);
    const auto count = settings_.top_k == 0 ? all : std::min(settings_.top_k, all);
    std::partial_sort(tokens.begin(), tokens.begin() + count, tokens.end(), [&](std::int32_t a, std::int32_t b) {
      const float x = logits[static_cast<std::size_t>(a)];
      const float y = logits[static_cast<std::size_t>(b)];
      return x > y || (x == y && a < b);
    });
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }

  /// Their probabilities, up to a factor, as many as `top_p` leaves: at least one.
  [[nodiscard]] std::vector<double> weights(std::span<const std::int32_t> tokens, std::span<const float> logits) const {
    std::vector<double> result;
    const double highest = logits[static_cast<std::size_t>(tokens.front())];
    for (const std::int32_t token : tokens) {
      result.push_back(std::exp((logits[static_cast<std::size_t>(token)] - highest) / settings_.temperature));
    }
    const double wanted = settings_.top_p * std::accumulate(result.begin(), result.end(), 0.0);
    std::size_t count = 0;
    for (double sum = 0; count < result.size() && (count == 0 || sum < wanted); ++count) sum += result[count];
    result.resize(count);
    return result;
  }

  std::size_t draw(std::span<const double> weights) {
    const double uniform = static_cast<double>(random_() >> 11U) * 0x1p-53;  // in [0, 1)
    double rest = uniform * std::accumulate(weights.begin(), weights.end(), 0.0);
    std::size_t i = 0;
    while (i + 1 < weights.size() && rest >= weights[i]) rest -= weights[i++];
    return i;
  }

  sampling_options settings_;
  std::mt19937_64 random_;
};

}  // namespace smollm2
