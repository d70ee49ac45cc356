#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <string>

#include "parallel.hpp"

/// The layers around attention. Activations are `[tokens, features]`. `forward` writes `y`; `backward` is given the
/// gradient of the loss by `y`, and writes that by its parameters and by `x`. What backward needs of the forward pass,
/// the caller keeps. Buffers are resized as needed, and then serve again.
namespace train_lm {

template <class T>
struct parameter {
  std::string name;
  matrix<T> value, gradient;

  parameter(std::string n, std::int64_t rows, std::int64_t columns)
      : name(std::move(n)), value(rows, columns), gradient(matrix<T>::Zero(rows, columns)) {}

  void randomize(std::mt19937_64& random, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    for (T& x : value.reshaped()) x = static_cast<T>(normal(random));
  }
};

/// y = x W^T
template <class T>
struct linear {
  parameter<T> weight;  // [out, in]

  linear(std::string name, std::int64_t out, std::int64_t in) : weight(std::move(name), out, in) {}

  void forward(const executor& run, const matrix<T>& x, matrix<T>& y) const {
    y.resize(x.rows(), weight.value.rows());
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      y.middleRows(first, count).noalias() = x.middleRows(first, count) * weight.value.transpose();
    });
  }

  /// For a residual branch: y = base + x W^T
  void forward(const executor& run, const matrix<T>& x, const matrix<T>& base, matrix<T>& y) const {
    y.resize(x.rows(), weight.value.rows());
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      auto rows = y.middleRows(first, count);
      rows = base.middleRows(first, count);
      rows.noalias() += x.middleRows(first, count) * weight.value.transpose();
    });
  }

  void backward(const executor& run, const matrix<T>& x, const matrix<T>& grad_y, matrix<T>& grad_x) {
    grad_x.resize(x.rows(), x.cols());
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      grad_x.middleRows(first, count).noalias() = grad_y.middleRows(first, count) * weight.value;
    });
    for_blocks(run, weight.value.rows(), row_block, [&](std::int64_t first, std::int64_t count) {
      weight.gradient.middleRows(first, count).noalias() = grad_y.middleCols(first, count).transpose() * x;
    });
  }
};

/// y = x / rms(x) * gain, token by token
template <class T>
struct rms_norm {
  static constexpr T epsilon = T(1e-5);
  parameter<T> gain;  // [1, features]

  rms_norm(std::string name, std::int64_t features) : gain(std::move(name), 1, features) { gain.value.setOnes(); }

  /// `scale`: 1 / rms(x), for `backward`
  void forward(const executor& run, const matrix<T>& x, column<T>& scale, matrix<T>& y) const {
    scale.resize(x.rows());
    y.resize(x.rows(), x.cols());
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t t = first; t < first + count; ++t) {
        scale(t) = T(1) / std::sqrt(x.row(t).squaredNorm() / static_cast<T>(x.cols()) + epsilon);
        y.row(t) = (scale(t) * x.row(t)).cwiseProduct(gain.value.row(0));
      }
    });
  }

  /// Adds to `grad_x`, since the norm begins a branch of the residual stream.
  void backward(const executor& run, const matrix<T>& x, const column<T>& scale, const matrix<T>& grad_y,
                matrix<T>& grad_x) {
    matrix<T> sums = matrix<T>::Zero((x.rows() + token_block - 1) / token_block, x.cols());  // one for each block
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      auto sum = sums.row(first / token_block);
      for (std::int64_t t = first; t < first + count; ++t) {
        sum += scale(t) * x.row(t).cwiseProduct(grad_y.row(t));
        // The norm takes out of the gradient what points along x.
        const T along = scale(t) * scale(t) / static_cast<T>(x.cols()) *
                        x.row(t).cwiseProduct(grad_y.row(t)).dot(gain.value.row(0));
        grad_x.row(t) += scale(t) * (grad_y.row(t).cwiseProduct(gain.value.row(0)) - along * x.row(t));
      }
    });
    gain.gradient = sums.colwise().sum();
  }
};

/// Rotary position embedding: elements i and i + dim/2 of every head are a pair that turns by the angle
/// `position * 10000^(-2i/dim)`.
template <class T>
class rope {
 public:
  rope(std::int64_t positions, std::int64_t head_dim)
      : cosine_(positions, head_dim / 2), sine_(positions, head_dim / 2) {
    for (std::int64_t t = 0; t < positions; ++t)
      for (std::int64_t i = 0; i < head_dim / 2; ++i) {
        const double angle =
            static_cast<double>(t) * std::pow(1e4, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
        cosine_(t, i) = static_cast<T>(std::cos(angle));
        sine_(t, i) = static_cast<T>(std::sin(angle));
      }
  }

  /// Turns the first `heads` heads of all tokens, which are whole sequences one after the other. The gradient of a
  /// rotation is the rotation back: `direction` -1.
  void turn(const executor& run, matrix<T>& x, std::int64_t heads, T direction) const {
    const std::int64_t half = cosine_.cols();
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t t = first; t < first + count; ++t) {
        const auto cosine = cosine_.row(t % cosine_.rows()).array();
        const auto sine = direction * sine_.row(t % sine_.rows()).array();
        for (std::int64_t h = 0; h < heads; ++h) {
          auto a = x.row(t).segment(2 * h * half, half).array();
          auto b = x.row(t).segment((2 * h + 1) * half, half).array();
          for (std::int64_t i = 0; i < half; ++i) {
            const T turned = a(i) * cosine(i) - b(i) * sine(i);
            b(i) = a(i) * sine(i) + b(i) * cosine(i);
            a(i) = turned;
          }
        }
      }
    });
  }

 private:
  matrix<T> cosine_, sine_;  // [position, pair]
};

/// y = silu(gate) * up, with `x` = [gate | up]
struct swiglu {
  template <class T>
  static void forward(const executor& run, const matrix<T>& x, matrix<T>& y) {
    const std::int64_t features = x.cols() / 2;
    y.resize(x.rows(), features);
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      const auto gate = x.block(first, 0, count, features).array(),
                 up = x.block(first, features, count, features).array();
      y.middleRows(first, count) = gate * up / (T(1) + (-gate).exp());
    });
  }

  template <class T>
  static void backward(const executor& run, const matrix<T>& x, const matrix<T>& grad_y, matrix<T>& grad_x) {
    const std::int64_t features = x.cols() / 2;
    grad_x.resize(x.rows(), x.cols());
    for_blocks(run, x.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t t = first; t < first + count; ++t) {
        const auto gate = x.row(t).head(features).array(), up = x.row(t).tail(features).array();
        const auto grad = grad_y.row(t).array();
        auto grad_gate = grad_x.row(t).head(features).array();
        auto grad_up = grad_x.row(t).tail(features).array();
        grad_up = T(1) / (T(1) + (-gate).exp());  // the sigmoid, here until its own gradient is written
        grad_gate = grad * up * grad_up * (T(1) + gate * (T(1) - grad_up));
        grad_up = grad * gate * grad_up;
      }
    });
  }
};

/// A vector for each byte.
template <class T>
struct embedding {
  parameter<T> weight;  // [256, features]

  embedding(std::string name, std::int64_t features) : weight(std::move(name), 256, features) {}

  void forward(std::span<const std::uint8_t> bytes, matrix<T>& y) const {
    y.resize(static_cast<std::int64_t>(bytes.size()), weight.value.cols());
    for (std::int64_t t = 0; t < y.rows(); ++t) y.row(t) = weight.value.row(bytes[static_cast<std::size_t>(t)]);
  }

  void backward(std::span<const std::uint8_t> bytes, const matrix<T>& grad_y) {
    weight.gradient.setZero();
    for (std::int64_t t = 0; t < grad_y.rows(); ++t)
      weight.gradient.row(bytes[static_cast<std::size_t>(t)]) += grad_y.row(t);
  }
};

/// The mean of `-log softmax(logits)[target]` over the tokens; the logits become its gradient.
template <class T>
double cross_entropy(const executor& run, matrix<T>& logits, std::span<const std::uint8_t> targets) {
  Eigen::ArrayXd losses(logits.rows());
  const T weight = T(1) / static_cast<T>(logits.rows());
  for_blocks(run, logits.rows(), token_block, [&](std::int64_t first, std::int64_t count) {
    for (std::int64_t t = first; t < first + count; ++t) {
      auto row = logits.row(t).array();
      const std::uint8_t target = targets[static_cast<std::size_t>(t)];
      row -= row.maxCoeff();
      const T chosen = row(target);
      row = row.exp();
      const T sum = row.sum();
      losses(t) = static_cast<double>(std::log(sum) - chosen);
      row *= weight / sum;
      row(target) -= weight;
    }
  });
  return losses.mean();
}

}  // namespace train_lm
