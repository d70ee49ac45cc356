#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include "layers.hpp"

namespace train_lm {

struct schedule {
  std::int64_t steps = 0, warmup = 0;
  double learning_rate = 0;

  /// Of step `step` from 0 on: up in a line, then down by a half cosine to a tenth.
  [[nodiscard]] double at(std::int64_t step) const {
    if (step < warmup) return learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
    const double done =
        static_cast<double>(step - warmup) / static_cast<double>(std::max<std::int64_t>(steps - warmup, 1));
    return learning_rate * (0.55 + 0.45 * std::cos(std::numbers::pi * std::min(done, 1.0)));
  }
};

/// Scales the gradients of all parameters so that their norm is at most `limit`.
/// @return  the norm before that
template <class T>
double clip_gradients(const std::vector<parameter<T>*>& parameters, double limit) {
  double sum = 0;
  for (const parameter<T>* p : parameters) sum += p->gradient.template cast<double>().squaredNorm();
  const double norm = std::sqrt(sum);
  if (norm > limit)
    for (parameter<T>* p : parameters) p->gradient *= static_cast<T>(limit / norm);
  return norm;
}

/// Adam with decoupled weight decay. Source: Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101, algorithm 2.
template <class T>
class adamw {
 public:
  static constexpr double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;

  adamw(std::vector<parameter<T>*> parameters, double weight_decay)
      : parameters_(std::move(parameters)), weight_decay_(weight_decay) {
    for (const parameter<T>* p : parameters_) {
      first_.push_back(matrix<T>::Zero(p->value.rows(), p->value.cols()));
      second_.push_back(first_.back());
    }
  }

  /// `step` counts from 0.
  void update(const executor& run, std::int64_t step, double learning_rate) {
    const auto updates = static_cast<double>(step + 1);
    const auto rate = static_cast<T>(learning_rate / (1 - std::pow(beta1, updates)));
    const auto correction = static_cast<T>(1 / (1 - std::pow(beta2, updates)));
    run(static_cast<std::int64_t>(parameters_.size()), [&](std::int64_t i) {
      parameter<T>& p = *parameters_[static_cast<std::size_t>(i)];
      auto m = first_[static_cast<std::size_t>(i)].array(), v = second_[static_cast<std::size_t>(i)].array();
      const auto g = p.gradient.array();
      m = T(beta1) * m + T(1 - beta1) * g;
      v = T(beta2) * v + T(1 - beta2) * g.square();
      // Gains are no weights: without the decay they stay about 1.
      if (p.value.rows() > 1) p.value *= static_cast<T>(1 - learning_rate * weight_decay_);
      p.value.array() -= rate * m / ((correction * v).sqrt() + T(epsilon));
    });
  }

  [[nodiscard]] const std::vector<parameter<T>*>& parameters() const { return parameters_; }

  /// The running means of parameter `i`'s gradient and of its square.
  [[nodiscard]] matrix<T>& first(std::size_t i) { return first_[i]; }
  [[nodiscard]] matrix<T>& second(std::size_t i) { return second_[i]; }

 private:
  std::vector<parameter<T>*> parameters_;
  std::vector<matrix<T>> first_, second_;
  double weight_decay_;
};

}  // namespace train_lm
