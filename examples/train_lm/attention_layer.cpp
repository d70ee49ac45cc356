#include "attention_layer.hpp"

#include <fmt/core.h>

#include <cca/attention.hpp>
#include <cca/gradient.hpp>
#include <stdexcept>

namespace train_lm {

attention_choice choose_attention(const std::string& name, std::int64_t group_size, std::int64_t window) {
  const cca::options options{.group_size = group_size, .window = window};
  if (name == "dense") return {context_kind::dense, {}};
  if (name == "window") return {context_kind::window, options};
  attention_choice choice{context_kind::cca, options};
  if (name == "mean") choice.options.pool = cca::pooling::mean;
  if (name == "max") choice.options.pool = cca::pooling::max;
  if (name == "cca" || name == "mean" || name == "max") return choice;
  throw std::invalid_argument(fmt::format("attention: got '{}', wants dense, cca, mean, max or window", name));
}

template <class T>
void attention_layer<T>::forward(const executor& run, const head_layout& layout, const matrix<T>& qkv, matrix<T>& out) {
  out.resize(qkv.rows(), layout.heads * layout.head_dim);
  lse_.resize(layout.heads, qkv.rows());
  const cca::inputs in{layout.query(qkv), layout.key(qkv), layout.value(qkv)};
  const cca::results to{layout.view(out, 0, layout.heads), lse(layout)};
  if (choice_.kind == context_kind::window) return cca::local_attention(in, to, choice_.options, run);
  cca::attention(in, to, choice_.options, run);
}

template <class T>
void attention_layer<T>::backward(const executor& run, const head_layout& layout, const matrix<T>& qkv,
                                  const matrix<T>& out, const matrix<T>& grad_out, matrix<T>& grad_qkv) {
  grad_qkv.resize(qkv.rows(), qkv.cols());
  const cca::inputs in{layout.query(qkv), layout.key(qkv), layout.value(qkv)};
  const cca::results of{layout.view(out, 0, layout.heads), lse(layout)};
  const cca::incoming from{layout.view(grad_out, 0, layout.heads)};
  const cca::gradients to{layout.query(grad_qkv), layout.key(grad_qkv), layout.value(grad_qkv)};
  if (choice_.kind == context_kind::window)
    return cca::local_attention_gradient(in, of, from, to, choice_.options, run);
  cca::attention_gradient(in, of, from, to, choice_.options, run);
}

template class attention_layer<float>;
template class attention_layer<double>;

}  // namespace train_lm
