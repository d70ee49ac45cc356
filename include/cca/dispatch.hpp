#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "attention.hpp"
#include "dispatch/kv_cache.hpp"
#include "dispatch/plain.hpp"
#include "dispatch/to_plain.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "tensor_view.hpp"

/// The functions of the library for the processor that the program runs on, whatever it was compiled for: link
/// `cca::dispatch`, and `cca::attention` becomes `cca::dispatch::attention`. Parameters, results and errors are those of
/// the function of the same name in `cca`; operands and outputs of a call have elements of one type: float, double,
/// `Eigen::bfloat16` or `Eigen::half`. (Matrix units are found at run time with the headers alone, too.)
namespace cca { inline namespace CCA_TARGET { namespace dispatch {

/// The instruction set in use, "avx512", "avx2_fma", "sse4_2", "sse2" or "neon64": the newest that the processor and the
/// operating system run, unless `use` was called.
inline std::string_view architecture() { return plain::chosen().name; }

/// All that run here, the newest first.
inline std::vector<std::string_view> architectures() {
  std::vector<std::string_view> names;
  for (const plain::architecture* a : plain::available()) names.emplace_back(a->name);
  return names;
}

/// For tests and measurements: from now on every call of the program uses this instruction set. A cache keeps the one
/// that it was made with.
/// @throws std::invalid_argument  for one that does not run here
inline void use(std::string_view architecture) { plain::choose(architecture); }

/// See `cca::attention`.
template <element T, class Lse, executor E = serial_executor>
void attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, lse_view<Lse> lse,
               const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out),
                               lse_to_plain<compute_type<T>>("lse", lse), to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, const options& options,
               const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// See `cca::local_attention`.
template <element T, class Lse, executor E = serial_executor>
void local_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, lse_view<Lse> lse,
                     const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.local_attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out),
                                     lse_to_plain<compute_type<T>>("lse", lse), to_plain(options), to_plain(run),
                                     workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void local_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, const options& options,
                     const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::local_attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// See `cca::dense_attention`.
template <element T, class Lse, executor E = serial_executor>
void dense_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, lse_view<Lse> lse,
                     const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.dense_attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out),
                                     lse_to_plain<compute_type<T>>("lse", lse), to_plain(options), to_plain(run),
                                     workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void dense_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out,
                     const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::dense_attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// See `cca::attend`.
template <class FarKey, class FarValue, element T, class Lse, executor E = serial_executor>
void attend(operand<T> query, operand<T> key, operand<T> value, far_context<FarKey, FarValue> context,
            tensor_view<T> out, lse_view<Lse> lse, const options& options, const E& run = {},
            std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.attend(to_plain(query), to_plain(key), to_plain(value), to_plain(operand<T>(context.key)),
                            to_plain(operand<T>(context.value)), to_plain(context.seen), to_plain(out),
                            lse_to_plain<compute_type<T>>("lse", lse), to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <class FarKey, class FarValue, element T, executor E = serial_executor>
void attend(operand<T> query, operand<T> key, operand<T> value, far_context<FarKey, FarValue> context,
            tensor_view<T> out, const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attend(query, key, value, context, out, lse_view<>{}, options, run, workspace);
}

/// See `cca::pool`.
template <element T, executor E = serial_executor>
void pool(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> core_key, tensor_view<T> core_value,
          const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.pool(to_plain(query), to_plain(key), to_plain(value), to_plain(core_key), to_plain(core_value),
                          to_plain(options), to_plain(run), workspace);
}

/// See `cca::merge`.
template <element T, executor E = serial_executor>
void merge(operand<T> out_a, lse_operand<T> lse_a, operand<T> out_b, lse_operand<T> lse_b, tensor_view<T> out,
           lse_view<compute_type<T>> lse, const E& run = {}) {
  using namespace detail;
  kernels<T>().calls.merge(to_plain(out_a), to_plain(lse_a), to_plain(out_b), to_plain(lse_b), to_plain(out),
                           to_plain(lse), to_plain(run));
}

/// See `cca::workspace_size`.
template <class T, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<T> query, operand<T> key, operand<T> value, const options& options,
                                         const E& run = {}) {
  using namespace detail;
  return kernels<T>().calls.workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                           to_plain(options), to_plain(run));
}

/// The same for `attend`.
template <class T, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<T> query, operand<T> key, operand<T> value,
                                         far_context<FarKey, FarValue> context, const E& run = {},
                                         matrix_unit unit = matrix_unit::none) {
  using namespace detail;
  return kernels<T>().calls.attend_workspace_size(
      to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(operand<T>(context.key)),
      to_plain(operand<T>(context.value)), to_plain(context.seen), to_plain(run), static_cast<int>(unit));
}

/// See `cca::attention_gradient`.
template <class GradLse, class T, executor E = serial_executor>
void attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out, lse_operand<T> lse,
                        operand<T> grad_out, lse_view<GradLse> grad_lse, gradient<T> grad_query, gradient<T> grad_key,
                        gradient<T> grad_value, const options& options, const E& run = {},
                        std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.attention_gradient(
      to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(out), to_plain(lse), to_plain(grad_out),
      lse_to_plain<const compute_type<T>>("grad_lse", grad_lse), to_plain(grad_query), to_plain(grad_key),
      to_plain(grad_value), to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <class T, executor E = serial_executor>
void attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out, lse_operand<T> lse,
                        operand<T> grad_out, gradient<T> grad_query, gradient<T> grad_key, gradient<T> grad_value,
                        const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key, grad_value,
                               options, run, workspace);
}

/// See `cca::local_attention_gradient`.
template <class GradLse, class T, executor E = serial_executor>
void local_attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_operand<T> lse, operand<T> grad_out, lse_view<GradLse> grad_lse,
                              gradient<T> grad_query, gradient<T> grad_key, gradient<T> grad_value,
                              const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.local_attention_gradient(
      to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(out), to_plain(lse), to_plain(grad_out),
      lse_to_plain<const compute_type<T>>("grad_lse", grad_lse), to_plain(grad_query), to_plain(grad_key),
      to_plain(grad_value), to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <class T, executor E = serial_executor>
void local_attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_operand<T> lse, operand<T> grad_out, gradient<T> grad_query, gradient<T> grad_key,
                              gradient<T> grad_value, const options& options, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  dispatch::local_attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key,
                                     grad_value, options, run, workspace);
}

/// See `cca::dense_attention_gradient`.
template <class GradLse, class T, executor E = serial_executor>
void dense_attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_operand<T> lse, operand<T> grad_out, lse_view<GradLse> grad_lse,
                              gradient<T> grad_query, gradient<T> grad_key, gradient<T> grad_value,
                              const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.dense_attention_gradient(
      to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(out), to_plain(lse), to_plain(grad_out),
      lse_to_plain<const compute_type<T>>("grad_lse", grad_lse), to_plain(grad_query), to_plain(grad_key),
      to_plain(grad_value), to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <class T, executor E = serial_executor>
void dense_attention_gradient(tensor_view<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_operand<T> lse, operand<T> grad_out, gradient<T> grad_query, gradient<T> grad_key,
                              gradient<T> grad_value, const options& options = {}, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  dispatch::dense_attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key,
                                     grad_value, options, run, workspace);
}

/// See `cca::attend_gradient`.
template <class FarKey, class FarValue, class GradLse, class T, executor E = serial_executor>
void attend_gradient(tensor_view<T> query, operand<T> key, operand<T> value, far_context<FarKey, FarValue> context,
                     operand<T> out, lse_operand<T> lse, operand<T> grad_out, lse_view<GradLse> grad_lse,
                     gradient<T> grad_query, gradient<T> grad_key, gradient<T> grad_value, gradient<T> grad_far_key,
                     gradient<T> grad_far_value, const options& options, const E& run = {},
                     std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.attend_gradient(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                     to_plain(operand<T>(context.key)), to_plain(operand<T>(context.value)),
                                     to_plain(context.seen), to_plain(out), to_plain(lse), to_plain(grad_out),
                                     lse_to_plain<const compute_type<T>>("grad_lse", grad_lse), to_plain(grad_query),
                                     to_plain(grad_key), to_plain(grad_value), to_plain(grad_far_key),
                                     to_plain(grad_far_value), to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <class FarKey, class FarValue, class T, executor E = serial_executor>
void attend_gradient(tensor_view<T> query, operand<T> key, operand<T> value, far_context<FarKey, FarValue> context,
                     operand<T> out, lse_operand<T> lse, operand<T> grad_out, gradient<T> grad_query,
                     gradient<T> grad_key, gradient<T> grad_value, gradient<T> grad_far_key, gradient<T> grad_far_value,
                     const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attend_gradient(query, key, value, context, out, lse, grad_out, lse_view<>{}, grad_query, grad_key,
                            grad_value, grad_far_key, grad_far_value, options, run, workspace);
}

/// See `cca::pool_gradient`.
template <class T, executor E = serial_executor>
void pool_gradient(tensor_view<T> query, operand<T> key, operand<T> value, gradient_operand<T> grad_core_key,
                   gradient_operand<T> grad_core_value, gradient<T> grad_query, gradient<T> grad_key,
                   gradient<T> grad_value, const options& options, const E& run = {},
                   std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().calls.pool_gradient(to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(grad_core_key),
                                   to_plain(grad_core_value), to_plain(grad_query), to_plain(grad_key),
                                   to_plain(grad_value), to_plain(options), to_plain(run), workspace);
}

/// See `cca::gradient_workspace_size`.
template <class T, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<T> query, operand<T> key, operand<T> value,
                                                  const options& options, const E& run = {}) {
  using namespace detail;
  return kernels<T>().calls.gradient_workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                                    to_plain(options), to_plain(run));
}

/// The same for `attend_gradient`.
template <class T, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<T> query, operand<T> key, operand<T> value,
                                                  far_context<FarKey, FarValue> context, const E& run = {},
                                                  matrix_unit unit = matrix_unit::none) {
  using namespace detail;
  return kernels<T>().calls.attend_gradient_workspace_size(
      to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(operand<T>(context.key)),
      to_plain(operand<T>(context.value)), to_plain(context.seen), to_plain(run), static_cast<int>(unit));
}

}}}  // namespace cca::CCA_TARGET::dispatch
