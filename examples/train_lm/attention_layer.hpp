#pragma once

#include <fmt/core.h>

#include <cca/cca.hpp>
#include <cca/gradient.hpp>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "parallel.hpp"

/// Everything that this example asks of cca.
namespace train_lm {

/// Which context a token sees.
enum class context_kind {
  dense,   // every token before it
  cca,     // cores of far groups, and the raw tokens of the window
  window,  // those raw tokens alone
};

struct attention_choice {
  context_kind kind;
  cca::options options;
};

/// Reads "dense", "cca", "mean", "max" (CCA with these poolings) or "window".
inline attention_choice choose_attention(const std::string& name, std::int64_t group_size, std::int64_t window) {
  const cca::options options{.group_size = group_size, .window = window};
  if (name == "dense") return {context_kind::dense, {}};
  if (name == "window") return {context_kind::window, options};
  attention_choice choice{context_kind::cca, options};
  if (name == "mean") choice.options.pool = cca::pooling::mean;
  if (name == "max") choice.options.pool = cca::pooling::max;
  if (name == "cca" || name == "mean" || name == "max") return choice;
  throw std::invalid_argument(fmt::format("attention: got '{}', wants dense, cca, mean, max or window", name));
}

/// Heads that lie side by side in every row of a matrix: `[query heads | key heads | value heads]`, each `head_dim`
/// columns wide.
struct head_layout {
  std::int64_t batch, length, heads, kv_heads, head_dim;

  [[nodiscard]] std::int64_t columns() const { return (heads + 2 * kv_heads) * head_dim; }

  /// `count` heads of a matrix from head `first` on, as cca takes them: `[batch, heads, length, dim]`. Nothing is
  /// copied, the strides say where the heads are.
  template <class Matrix>
  [[nodiscard]] auto view(Matrix& rows, std::int64_t first, std::int64_t count) const {
    const std::int64_t stride = rows.cols();
    using element = std::remove_pointer_t<decltype(rows.data())>;
    return cca::tensor_view<element>{
        rows.data() + first * head_dim, {batch, count, length, head_dim}, {length * stride, head_dim, stride, 1}};
  }
  template <class Matrix>
  [[nodiscard]] auto query(Matrix& rows) const {
    return view(rows, 0, heads);
  }
  template <class Matrix>
  [[nodiscard]] auto key(Matrix& rows) const {
    return view(rows, heads, kv_heads);
  }
  template <class Matrix>
  [[nodiscard]] auto value(Matrix& rows) const {
    return view(rows, heads + kv_heads, kv_heads);
  }
};

template <class T>
class attention_layer {
 public:
  explicit attention_layer(const attention_choice& choice) : choice_(choice) {}

  /// @param qkv  `[batch * length, columns of the layout]`
  /// @param out  `[batch * length, heads * head_dim]`, written
  void forward(const executor& run, const head_layout& layout, const matrix<T>& qkv, matrix<T>& out) {
    out.resize(qkv.rows(), layout.heads * layout.head_dim);
    lse_.resize(layout.heads, qkv.rows());
    const auto query = layout.query(qkv), key = layout.key(qkv), value = layout.value(qkv);
    const auto result = layout.view(out, 0, layout.heads);
    switch (choice_.kind) {
      case context_kind::dense:
        return cca::dense_attention(query, key, value, result, lse(layout), choice_.options, run);
      case context_kind::cca:
        return cca::attention(query, key, value, result, lse(layout), choice_.options, run);
      case context_kind::window:
        return cca::local_attention(query, key, value, result, lse(layout), choice_.options, run);
    }
  }

  /// @param grad_qkv  written
  void backward(const executor& run, const head_layout& layout, const matrix<T>& qkv, const matrix<T>& out,
                const matrix<T>& grad_out, matrix<T>& grad_qkv) {
    grad_qkv.resize(qkv.rows(), qkv.cols());
    const auto gradient = [&](auto&& function) {
      function(layout.query(qkv), layout.key(qkv), layout.value(qkv), layout.view(out, 0, layout.heads), lse(layout),
               layout.view(grad_out, 0, layout.heads), layout.query(grad_qkv), layout.key(grad_qkv),
               layout.value(grad_qkv), choice_.options, run);
    };
    switch (choice_.kind) {
      case context_kind::dense:
        return gradient([](auto&&... operands) { cca::dense_attention_gradient(operands...); });
      case context_kind::cca:
        return gradient([](auto&&... operands) { cca::attention_gradient(operands...); });
      case context_kind::window:
        return gradient([](auto&&... operands) { cca::local_attention_gradient(operands...); });
    }
  }

 private:
  [[nodiscard]] cca::lse_view<T> lse(const head_layout& layout) {
    return cca::bhs(lse_.data(), layout.batch, layout.heads, layout.length);
  }

  attention_choice choice_;
  matrix<T> lse_;  // [batch][heads][length] in memory
};

}  // namespace train_lm
