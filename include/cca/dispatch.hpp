#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include "call.hpp"
#include "dispatch/kv_cache.hpp"
#include "dispatch/plain.hpp"
#include "dispatch/to_plain.hpp"
#include "element.hpp"
#include "options.hpp"
#include "tensor_view.hpp"

/// The functions of the library for the processor that the program runs on, whatever it was compiled for: link
/// `cca::dispatch`, and `cca::attention` becomes `cca::dispatch::attention`. Parameters, results and errors are those of
/// the function of the same name in `cca`; operands and outputs of a call have elements of one type: float, double,
/// `Eigen::bfloat16` or `Eigen::half`. Beside queries and outputs of float, keys and values of `attention` and `attend` may be
/// of `q8`, and so may far ones. There are caches of these, and of `q8`, which take tokens of float and of `q8`. (Matrix units
/// are found at run time with the headers alone, too.)
namespace cca { inline namespace CCA_TARGET { namespace dispatch {

using detail::call;
using plain::forward_functions;
using plain::functions;

/// Results that a function reads.
template <class T>
using read = results<const T, const compute_type<T>>;

/// The instruction set in use, "avx512", "avx2_fma", "sse4_2", "sse2" or "neon64": the newest that the processor and the
/// operating system run, unless `use` was called.
/// @throws std::runtime_error  where none of those that were compiled run here, as does every function below
inline std::string_view architecture() { return plain::chosen().name; }

/// All that were compiled and run here, the newest first.
inline std::vector<std::string_view> architectures() {
  std::vector<std::string_view> names;
  for (const plain::architecture* a : plain::available()) names.emplace_back(a->name);
  return names;
}

/// For tests and measurements: from now on every call of the program uses this instruction set. A cache keeps the one
/// that it was made with.
/// @throws std::invalid_argument  for one that does not run here or was not compiled
inline void use(std::string_view architecture) { plain::choose(architecture); }

// Each of these is the function of its name in `cca`.

/// @{
/// See `cca::attention`.
template <class T = float, class Row = T>
void attention(const inputs<T, Row>& in, const results<T>& to, const options& options = {}, const execution& run = {}) {
  call(&forward_functions<T, Row>::attention, in, to, options, run);
}
template <detail::not_inputs Query, class Key, class Value, class T>
void attention(const Query& query, const Key& key, const Value& value, const tensor_view<T>& out,
               const options& options = {}, const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value>())
    dispatch::attention<T>({query, key, value}, {out}, options, run);
}
/// @}

/// See `cca::attend`.
template <class T = float, class Row = T, class Far = Row>
void attend(const inputs<T, Row>& in, const far_context<Far>& context, const results<T>& to,
            const options& options = {}, const execution& run = {}) {
  call(&forward_functions<T, Row, Far>::attend, in, context, to, options, run);
}

/// @{
/// See `cca::pool`.
template <class T = float>
void pool(const inputs<T>& in, const cores<T>& to, const options& options, const execution& run = {}) {
  call(&functions<T>::pool, in, to, options, run);
}
template <detail::not_inputs Query, class Key, class Value, class T>
void pool(const Query& query, const Key& key, const Value& value, const tensor_view<T>& core_key,
          const tensor_view<T>& core_value, const options& options, const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value>())
    dispatch::pool<T>({query, key, value}, {core_key, core_value}, options, run);
}
/// @}

/// See `cca::merge`.
template <class T = float>
void merge(const read<T>& first, const read<T>& second, const results<T>& whole, const execution& run = {}) {
  call(&functions<T>::merge, first, second, whole, run);
}

/// @{
/// See `cca::workspace_size`.
template <class T = float, class Row = T>
[[nodiscard]] std::size_t workspace_size(const inputs<T, Row>& in, const options& options = {},
                                         const execution& run = {}) {
  return call(&forward_functions<T, Row>::workspace_size, in, options, run);
}
template <class T = float, class Row = T, class Far = Row>
[[nodiscard]] std::size_t workspace_size(const inputs<T, Row>& in, const far_context<Far>& context,
                                         const options& options = {}, const execution& run = {}) {
  return call(&forward_functions<T, Row, Far>::attend_workspace_size, in, context, options, run);
}
/// @}

/// See `cca::quantize`.
template <class T>
void quantize(const tensor_view<T>& rows, const tensor_view<q8>& to, const lse_view<float>& scales,
              const execution& run = {}) {
  using number = std::remove_const_t<T>;
  detail::kernels<number>().calls.quantize(detail::to_plain(tensor_view<const number>(rows)), detail::to_plain(to),
                                           detail::to_plain(scales), detail::to_plain(run));
}

/// See `cca::attention_gradient`.
template <class T = float>
void attention_gradient(const inputs<T>& in, const read<T>& of, const incoming<T>& from,
                        const gradients<compute_type<T>>& to, const options& options = {}, const execution& run = {}) {
  call(&functions<T>::attention_gradient, in, of, from, to, options, run);
}

/// See `cca::attend_gradient`.
template <class T = float>
void attend_gradient(const inputs<T>& in, const far_context<T>& context, const read<T>& of, const incoming<T>& from,
                     const gradients<compute_type<T>>& to, const options& options = {}, const execution& run = {}) {
  call(&functions<T>::attend_gradient, in, context, of, from, to, options, run);
}

/// See `cca::pool_gradient`.
template <class T = float>
void pool_gradient(const inputs<T>& in, const cores<const compute_type<T>>& from, const gradients<compute_type<T>>& to,
                   const options& options, const execution& run = {}) {
  call(&functions<T>::pool_gradient, in, from, to, options, run);
}

/// @{
/// See `cca::gradient_workspace_size`.
template <class T = float>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<T>& in, const options& options = {},
                                                  const execution& run = {}) {
  return call(&functions<T>::gradient_workspace_size, in, options, run);
}
template <class T = float>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<T>& in, const far_context<T>& context,
                                                  const options& options = {}, const execution& run = {}) {
  return call(&functions<T>::attend_gradient_workspace_size, in, context, options, run);
}
/// @}

}}}  // namespace cca::CCA_TARGET::dispatch
