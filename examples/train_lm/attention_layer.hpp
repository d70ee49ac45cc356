#pragma once

#include <cca/options.hpp>
#include <cca/tensor_view.hpp>
#include <cstdint>
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
attention_choice choose_attention(const std::string& name, std::int64_t group_size, std::int64_t window);

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

/// Of float or double, compiled once for all programs: the kernels take their time.
template <class T>
class attention_layer {
 public:
  explicit attention_layer(const attention_choice& choice) : choice_(choice) {}

  /// @param qkv  `[batch * length, columns of the layout]`
  /// @param out  `[batch * length, heads * head_dim]`, written
  void forward(const executor& run, const head_layout& layout, const matrix<T>& qkv, matrix<T>& out);

  /// @param grad_qkv  written
  void backward(const executor& run, const head_layout& layout, const matrix<T>& qkv, const matrix<T>& out,
                const matrix<T>& grad_out, matrix<T>& grad_qkv);

 private:
  [[nodiscard]] cca::lse_view<T> lse(const head_layout& layout) {
    return cca::bhs(lse_.data(), layout.batch, layout.heads, layout.length);
  }

  attention_choice choice_;
  matrix<T> lse_;  // [batch][heads][length] in memory
};

}  // namespace train_lm
