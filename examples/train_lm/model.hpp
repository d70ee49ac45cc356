#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "attention_layer.hpp"
#include "layers.hpp"

namespace train_lm {

struct model_sizes {
  std::int64_t layers, dim, heads, kv_heads, hidden, context;

  [[nodiscard]] std::int64_t head_dim() const { return dim / heads; }
};

class stopwatch {
 public:
  [[nodiscard]] double seconds() const { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  using clock = std::chrono::steady_clock;
  clock::time_point start_ = clock::now();
};

/// Buffers of `block::backward`, which the layers share.
template <class T>
struct block_gradients {
  matrix<T> hidden, gates, input, attended, qkv;
};

/// A layer of the transformer: x += attention(norm(x)), x += mlp(norm(x)).
template <class T>
class block {
 public:
  block(const std::string& name, const model_sizes& sizes, const attention_choice& choice)
      : sizes_(sizes),
        attention_norm_(name + "attention_norm", sizes.dim),
        query_key_value_(name + "query_key_value", layout(0).columns(), sizes.dim),
        attention_(choice),
        output_(name + "output", sizes.dim, sizes.dim),
        mlp_norm_(name + "mlp_norm", sizes.dim),
        gate_up_(name + "gate_up", 2 * sizes.hidden, sizes.dim),
        down_(name + "down", sizes.dim, sizes.hidden) {}

  void randomize(std::mt19937_64& random) {
    const auto deviation = [](std::int64_t inputs) { return 1.0 / std::sqrt(static_cast<double>(inputs)); };
    // All branches together add to the residual stream what one would.
    const double share = 1.0 / std::sqrt(2.0 * static_cast<double>(sizes_.layers));
    query_key_value_.weight.randomize(random, deviation(sizes_.dim));
    output_.weight.randomize(random, share * deviation(sizes_.dim));
    gate_up_.weight.randomize(random, deviation(sizes_.dim));
    down_.weight.randomize(random, share * deviation(sizes_.hidden));
  }

  template <class Function>
  void for_parameters(const Function& f) {
    for (parameter<T>* p : {&attention_norm_.gain, &query_key_value_.weight, &output_.weight, &mlp_norm_.gain,
                            &gate_up_.weight, &down_.weight})
      f(*p);
  }

  /// The residual stream after this layer, as `forward` left it.
  [[nodiscard]] const matrix<T>& result() const { return result_; }

  /// @return  `result()`
  const matrix<T>& forward(const executor& run, const rope<T>& positions, const matrix<T>& x,
                           double& attention_seconds) {
    const head_layout heads = layout(x.rows());
    attention_norm_.forward(run, x, attention_scale_, attention_input_);
    query_key_value_.forward(run, attention_input_, qkv_);
    positions.turn(run, qkv_, sizes_.heads + sizes_.kv_heads, T(1));
    const stopwatch watch;
    attention_.forward(run, heads, qkv_, attended_);
    attention_seconds += watch.seconds();
    output_.forward(run, attended_, x, middle_);

    mlp_norm_.forward(run, middle_, mlp_scale_, mlp_input_);
    gate_up_.forward(run, mlp_input_, gates_);
    swiglu::forward(run, gates_, hidden_);
    down_.forward(run, hidden_, middle_, result_);
    return result_;
  }

  /// @param x  as given to `forward`
  /// @param grad  in: by the stream after this layer; out: by `x`
  void backward(const executor& run, const rope<T>& positions, const matrix<T>& x, matrix<T>& grad,
                block_gradients<T>& of, double& attention_seconds) {
    down_.backward(run, hidden_, grad, of.hidden);
    swiglu::backward(run, gates_, of.hidden, of.gates);
    gate_up_.backward(run, mlp_input_, of.gates, of.input);
    mlp_norm_.backward(run, middle_, mlp_scale_, of.input, grad);

    output_.backward(run, attended_, grad, of.attended);
    const stopwatch watch;
    attention_.backward(run, layout(x.rows()), qkv_, attended_, of.attended, of.qkv);
    attention_seconds += watch.seconds();
    positions.turn(run, of.qkv, sizes_.heads + sizes_.kv_heads, T(-1));
    query_key_value_.backward(run, attention_input_, of.qkv, of.input);
    attention_norm_.backward(run, x, attention_scale_, of.input, grad);
  }

 private:
  [[nodiscard]] head_layout layout(std::int64_t tokens) const {
    return {tokens / sizes_.context, sizes_.context, sizes_.heads, sizes_.kv_heads, sizes_.head_dim()};
  }

  model_sizes sizes_;
  rms_norm<T> attention_norm_;
  linear<T> query_key_value_;
  attention_layer<T> attention_;
  linear<T> output_;
  rms_norm<T> mlp_norm_;
  linear<T> gate_up_, down_;

  // What backward needs of the forward pass, in the order in which it is made.
  column<T> attention_scale_, mlp_scale_;
  matrix<T> attention_input_, qkv_, attended_, middle_, mlp_input_, gates_, hidden_, result_;
};

/// A decoder-only transformer over bytes, of the Llama architecture.
template <class T>
class model {
 public:
  /// Random weights; by the same seed they are the same for every attention.
  model(const model_sizes& sizes, const attention_choice& choice, std::uint64_t seed)
      : sizes_(sizes),
        embedding_("embedding", sizes.dim),
        positions_(sizes.context, sizes.head_dim()),
        final_norm_("final_norm", sizes.dim),
        head_("head", 256, sizes.dim) {
    std::mt19937_64 random(seed);
    embedding_.weight.randomize(random, 1);
    for (std::int64_t i = 0; i < sizes.layers; ++i) {
      blocks_.emplace_back(fmt::format("block.{}.", i), sizes, choice);
      blocks_.back().randomize(random);
    }
    // Small, so that training begins with even odds for all bytes.
    head_.weight.randomize(random, 0.1 / std::sqrt(static_cast<double>(sizes.dim)));
  }

  [[nodiscard]] const model_sizes& sizes() const { return sizes_; }

  /// Pointers stay valid as long as the model is not moved.
  [[nodiscard]] std::vector<parameter<T>*> parameters() {
    std::vector<parameter<T>*> all{&embedding_.weight};
    for (block<T>& block : blocks_) block.for_parameters([&](parameter<T>& p) { all.push_back(&p); });
    all.insert(all.end(), {&final_norm_.gain, &head_.weight});
    return all;
  }

  /// The mean loss over whole sequences of `context` bytes, one after the other.
  /// @param targets  the byte after each of them
  double loss(const executor& run, std::span<const std::uint8_t> bytes, std::span<const std::uint8_t> targets) {
    embedding_.forward(bytes, embedded_);
    const matrix<T>* x = &embedded_;
    for (block<T>& block : blocks_) x = &block.forward(run, positions_, *x, attention_seconds_);
    final_norm_.forward(run, *x, final_scale_, final_);
    head_.forward(run, final_, logits_);
    return cross_entropy(run, logits_, targets);
  }

  /// The loss, and its gradient by every parameter.
  double gradient(const executor& run, std::span<const std::uint8_t> bytes, std::span<const std::uint8_t> targets) {
    const double result = loss(run, bytes, targets);
    const std::size_t layers = blocks_.size();
    head_.backward(run, final_, logits_, grad_final_);
    grad_.setZero(embedded_.rows(), embedded_.cols());
    final_norm_.backward(run, layers ? blocks_.back().result() : embedded_, final_scale_, grad_final_, grad_);
    for (std::size_t i = layers; i-- > 0;)
      blocks_[i].backward(run, positions_, i ? blocks_[i - 1].result() : embedded_, grad_, of_, attention_seconds_);
    embedding_.backward(bytes, grad_);
    return result;
  }

  /// Of the last loss, `[tokens, 256]`: what each token makes of its successor.
  [[nodiscard]] const matrix<T>& logits_gradient() const { return logits_; }

  /// Time spent inside cca so far.
  [[nodiscard]] double attention_seconds() const { return attention_seconds_; }

 private:
  model_sizes sizes_;
  embedding<T> embedding_;
  rope<T> positions_;
  std::vector<block<T>> blocks_;
  rms_norm<T> final_norm_;
  linear<T> head_;

  matrix<T> embedded_, final_, logits_, grad_final_, grad_;
  column<T> final_scale_;
  block_gradients<T> of_;
  double attention_seconds_ = 0;
};

}  // namespace train_lm
