#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cca/cca.hpp>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/safetensors.hpp"

namespace smollm2 {

using common::safetensors;

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using weight_matrix = Eigen::Map<const matrix>;  // [out, in]: y = x W^T
using weight_vector = Eigen::Map<const Eigen::RowVectorXf>;

using input_view = cca::tensor_view<const float>;  // [1, heads, tokens, head_dim]
using output_view = cca::tensor_view<float>;
using attention_function =
    std::function<void(std::int64_t layer, input_view query, input_view key, input_view value, output_view out)>;

/// Tokens that one task takes through the projections: enough to reuse each weight from cache, and few enough for
/// the activations between two projections to stay there.
inline constexpr std::int64_t token_block = 256;

/// Rows of a weight that one task multiplies with a single token: whole vectors of Eigen's, so that a result does not
/// depend on the number of threads.
inline constexpr std::int64_t row_block = 64;

struct config {
  std::int64_t layers, dim, hidden_dim, heads, kv_heads, head_dim, vocabulary, context;
  float norm_epsilon;
  double rope_base;
};

struct layer {
  weight_vector attention_norm;
  weight_matrix query, key, value, output;
  weight_vector mlp_norm;
  weight_matrix gate, up, down;
};

/// What tokens leave that passed through the model: the hidden states that the logits come from, `[tokens, dim]`, and
/// the time it took.
struct pass {
  matrix hidden;
  double seconds = 0;
  double attention_seconds = 0;
};

class stopwatch {
 public:
  [[nodiscard]] double seconds() const { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  using clock = std::chrono::steady_clock;
  clock::time_point start_ = clock::now();
};

/// x / rms(x) * weight, row by row.
inline matrix rms_norm(const Eigen::Ref<const matrix>& x, const weight_vector& weight, float epsilon) {
  const Eigen::ArrayXf scale = (x.rowwise().squaredNorm().array() / static_cast<float>(x.cols()) + epsilon).rsqrt();
  return (x.array().colwise() * scale).rowwise() * weight.array();
}

/// silu(gate) * up
inline matrix swiglu(const matrix& gate, const matrix& up) {
  return gate.array() * up.array() / (1.0F + (-gate.array()).exp());
}

/// Rotary position embedding: the pair (2i, 2i+1) of every head turns by the angle `position * base^(-2i/head_dim)`.
class rope {
 public:
  /// For the positions from `first` on.
  rope(std::int64_t first, std::int64_t positions, std::int64_t head_dim, double base)
      : cosine_(positions, head_dim / 2), sine_(positions, head_dim / 2) {
    for (std::int64_t t = 0; t < positions; ++t) {
      for (std::int64_t i = 0; i < head_dim / 2; ++i) {
        // In double: a float angle of thousands of radians is off in the fourth decimal.
        const double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
        const double angle = static_cast<double>(first + t) * frequency;
        cosine_(t, i) = static_cast<float>(std::cos(angle));
        sine_(t, i) = static_cast<float>(std::sin(angle));
      }
    }
  }

  /// Turns all heads of the tokens `x`, the first of which is at the position of row `row`.
  void turn(Eigen::Ref<matrix> x, std::int64_t row) const {
    const std::int64_t pairs = cosine_.cols();
    for (std::int64_t t = 0; t < x.rows(); ++t) {
      for (std::int64_t i = 0; i < x.cols() / 2; ++i) {
        const float cosine = cosine_(row + t, i % pairs);
        const float sine = sine_(row + t, i % pairs);
        const float even = x(t, 2 * i);
        const float odd = x(t, 2 * i + 1);
        x(t, 2 * i) = even * cosine - odd * sine;
        x(t, 2 * i + 1) = even * sine + odd * cosine;
      }
    }
  }

 private:
  matrix cosine_;  // [position - first, pair]
  matrix sine_;
};

/// A language model of the Llama architecture. Its weights stay in the file.
class model {
 public:
  model(const std::string& path, cca::openmp_executor executor)
      : file_(path),
        config_(read_config(file_)),
        embedding_(weights("token_embd.weight", config_.vocabulary, config_.dim)),
        final_norm_(weights("output_norm.weight", config_.dim)),
        executor_(executor) {
    for (std::int64_t i = 0; i < config_.layers; ++i) layers_.push_back(read_layer(fmt::format("blk.{}.", i)));
  }

  [[nodiscard]] const config& sizes() const { return config_; }

  /// Takes tokens through all layers, the first of them at position `start` of its text: a whole text, a part of it or
  /// a single token. The attention given knows what came before. `on_layer` is called after each layer.
  [[nodiscard]] pass run(
      std::span<const std::int32_t> tokens, std::int64_t start, const attention_function& attention,
      const std::function<void()>& on_layer = [] {}) const {
    const auto length = static_cast<std::int64_t>(tokens.size());
    const std::int64_t heads = config_.heads;
    const std::int64_t kv_heads = config_.kv_heads;
    const std::int64_t head_dim = config_.head_dim;
    const float epsilon = config_.norm_epsilon;

    const stopwatch whole;
    pass result{.hidden = embed(tokens)};
    matrix& hidden = result.hidden;
    const rope positions(start, length, head_dim, config_.rope_base);
    matrix query(length, heads * head_dim);
    matrix key(length, kv_heads * head_dim);
    matrix value(length, kv_heads * head_dim);
    matrix mixed(length, heads * head_dim);

    for (std::int64_t number = 0; number < config_.layers; ++number) {
      const layer& layer = layers_[static_cast<std::size_t>(number)];
      for_token_blocks(length, [&](std::int64_t first, std::int64_t count) {
        const matrix x = rms_norm(hidden.middleRows(first, count), layer.attention_norm, epsilon);
        query.middleRows(first, count) = product(x, layer.query);
        key.middleRows(first, count) = product(x, layer.key);
        value.middleRows(first, count) = product(x, layer.value);
        positions.turn(query.middleRows(first, count), first);
        positions.turn(key.middleRows(first, count), first);
      });

      const stopwatch attending;
      attention(number, cca::bshd(query.data(), 1, length, heads, head_dim),
                cca::bshd(key.data(), 1, length, kv_heads, head_dim),
                cca::bshd(value.data(), 1, length, kv_heads, head_dim),
                cca::bshd(mixed.data(), 1, length, heads, head_dim));
      result.attention_seconds += attending.seconds();

      for_token_blocks(length, [&](std::int64_t first, std::int64_t count) {
        auto residual = hidden.middleRows(first, count);
        residual += product(mixed.middleRows(first, count), layer.output);
        const matrix x = rms_norm(residual, layer.mlp_norm, epsilon);
        residual += product(swiglu(product(x, layer.gate), product(x, layer.up)), layer.down);
      });
      on_layer();
    }
    hidden = rms_norm(hidden, final_norm_, epsilon);
    result.seconds = whole.seconds();
    return result;
  }

  /// What the hidden states say of each token's successor: `[rows of hidden, vocabulary]`.
  [[nodiscard]] matrix logits(const Eigen::Ref<const matrix>& hidden) const { return product(hidden, embedding_); }

  /// exp of the mean of `-log p(token t+1 | tokens 0 .. t)`, over all tokens but the first.
  [[nodiscard]] double perplexity(const matrix& hidden, std::span<const std::int32_t> tokens) const {
    return std::exp(surprise(hidden, tokens.subspan(1)) / static_cast<double>(hidden.rows() - 1));
  }

  /// The sum of `-log p(next[t] | what hidden row t has seen)`, over the rows that have a successor.
  [[nodiscard]] double surprise(const matrix& hidden, std::span<const std::int32_t> next) const {
    Eigen::ArrayXd surprise(std::min(hidden.rows(), static_cast<std::int64_t>(next.size())));
    for_token_blocks(surprise.size(), [&](std::int64_t first, std::int64_t count) {
      const matrix scores = logits(hidden.middleRows(first, count));
      const Eigen::VectorXf highest = scores.rowwise().maxCoeff();
      const Eigen::VectorXf sums = (scores.colwise() - highest).array().exp().rowwise().sum();
      for (std::int64_t i = 0; i < count; ++i) {
        const float chosen = scores(i, next[static_cast<std::size_t>(first + i)]);
        surprise[first + i] = std::log(sums[i]) + highest[i] - chosen;
      }
    });
    return surprise.sum();
  }

 private:
  static config read_config(const safetensors& file) {
    const auto integer = [&](const char* name) { return static_cast<std::int64_t>(file.number(name)); };
    return {.layers = integer("layers"),
            .dim = integer("dim"),
            .hidden_dim = integer("hidden_dim"),
            .heads = integer("heads"),
            .kv_heads = integer("kv_heads"),
            .head_dim = integer("head_dim"),
            .vocabulary = file.shape_of("token_embd.weight").at(0),
            .context = integer("context"),
            .norm_epsilon = static_cast<float>(file.number("norm_epsilon")),
            .rope_base = file.number("rope_base")};
  }

  [[nodiscard]] layer read_layer(const std::string& prefix) const {
    const std::int64_t dim = config_.dim;
    const std::int64_t query_dim = config_.heads * config_.head_dim;
    const std::int64_t kv_dim = config_.kv_heads * config_.head_dim;
    return {.attention_norm = weights(prefix + "attn_norm.weight", dim),
            .query = weights(prefix + "attn_q.weight", query_dim, dim),
            .key = weights(prefix + "attn_k.weight", kv_dim, dim),
            .value = weights(prefix + "attn_v.weight", kv_dim, dim),
            .output = weights(prefix + "attn_output.weight", dim, query_dim),
            .mlp_norm = weights(prefix + "ffn_norm.weight", dim),
            .gate = weights(prefix + "ffn_gate.weight", config_.hidden_dim, dim),
            .up = weights(prefix + "ffn_up.weight", config_.hidden_dim, dim),
            .down = weights(prefix + "ffn_down.weight", dim, config_.hidden_dim)};
  }

  [[nodiscard]] weight_matrix weights(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    return {file_.tensor<float>(name, {rows, columns}).data(), rows, columns};
  }
  [[nodiscard]] weight_vector weights(const std::string& name, std::int64_t size) const {
    return {file_.tensor<float>(name, {size}).data(), size};
  }

  [[nodiscard]] matrix embed(std::span<const std::int32_t> tokens) const {
    matrix hidden(static_cast<std::int64_t>(tokens.size()), config_.dim);
    for (std::int64_t t = 0; t < hidden.rows(); ++t) {
      hidden.row(t) = embedding_.row(tokens[static_cast<std::size_t>(t)]);
    }
    return hidden;
  }

  /// x W^T. A single token has no blocks of tokens to share out, and its time is that of reading the weights: there the
  /// threads take the rows of the weight.
  [[nodiscard]] matrix product(const Eigen::Ref<const matrix>& x, const weight_matrix& weight) const {
    if (x.rows() > 1) return x * weight.transpose();
    matrix y(1, weight.rows());
    for_blocks(weight.rows(), row_block, [&](std::int64_t first, std::int64_t count) {
      y.middleCols(first, count).noalias() = x * weight.middleRows(first, count).transpose();
    });
    return y;
  }

  template <class Function>
  void for_token_blocks(std::int64_t tokens, const Function& f) const {
    for_blocks(tokens, token_block, f);
  }

  /// Calls `f(first, count)` for the blocks that make up `[0, length)`, on the executor's threads; a single one on this
  /// thread, so that what is in it can have them all.
  template <class Function>
  void for_blocks(std::int64_t length, std::int64_t block, const Function& f) const {
    if (length <= block) return f(std::int64_t{0}, length);
    executor_((length + block - 1) / block, [&](std::int64_t i) {
      const std::int64_t first = i * block;
      f(first, std::min(block, length - first));
    });
  }

  safetensors file_;
  config config_;
  weight_matrix embedding_;  // [vocabulary, dim]: tied, the logits come from it too
  weight_vector final_norm_;
  std::vector<layer> layers_;
  cca::openmp_executor executor_;
};

/// The first `count` tokens of a text, or all of them.
/// @param option  whose value `count` is, for the message when the text is shorter
inline std::span<const std::int32_t> read_tokens(const safetensors& text, std::optional<std::int64_t> count,
                                                 const char* option, const config& model) {
  const std::int64_t length = text.shape_of("tokens").at(0);
  const auto tokens = text.tensor<std::int32_t>("tokens", {length});
  if (count.value_or(length) > length) {
    throw std::invalid_argument(fmt::format("{}: got {}, wants at most the text's {}", option, *count, length));
  }
  if (length == 0) throw std::invalid_argument("the text has no tokens");
  const auto [lowest, highest] = std::minmax_element(tokens.begin(), tokens.end());
  if (*lowest < 0 || *highest >= model.vocabulary) {
    throw std::invalid_argument(fmt::format("the text has tokens {} to {}, wanted 0 to {}: is it of another model?",
                                            *lowest, *highest, model.vocabulary - 1));
  }
  return tokens.first(static_cast<std::size_t>(count.value_or(length)));
}

}  // namespace smollm2
