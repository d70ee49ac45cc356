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
#include "executor.hpp"
#include "options.hpp"
#include "tensor_view.hpp"

/// The functions of the library for the processor that the program runs on, whatever it was compiled for: link
/// `cca::dispatch`, and `cca::attention` becomes `cca::dispatch::attention`. Parameters, results and errors are those of
/// the function of the same name in `cca`; the elements of a call are all float or all double.
namespace cca::inline CCA_TARGET::dispatch {

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
  kernels<T>().attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out), lse_to_plain<T>("lse", lse),
                         to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, const options& options,
               const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attention(query, key, value, out, lse_view<T>{}, options, run, workspace);
}

/// See `cca::local_attention`.
template <element T, class Lse, executor E = serial_executor>
void local_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, lse_view<Lse> lse,
                     const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().local_attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out),
                               lse_to_plain<T>("lse", lse), to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void local_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, const options& options,
                     const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::local_attention(query, key, value, out, lse_view<T>{}, options, run, workspace);
}

/// See `cca::dense_attention`.
template <element T, class Lse, executor E = serial_executor>
void dense_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out, lse_view<Lse> lse,
                     const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().dense_attention(to_plain(query), to_plain(key), to_plain(value), to_plain(out),
                               lse_to_plain<T>("lse", lse), to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <element T, executor E = serial_executor>
void dense_attention(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> out,
                     const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::dense_attention(query, key, value, out, lse_view<T>{}, options, run, workspace);
}

/// See `cca::attend`.
template <class FarKey, class FarValue, element T, class Lse, executor E = serial_executor>
void attend(operand<T> query, operand<T> key, operand<T> value, far<FarKey, FarValue> far, tensor_view<T> out,
            lse_view<Lse> lse, const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().attend(to_plain(query), to_plain(key), to_plain(value), to_plain(operand<T>(far.key)),
                      to_plain(operand<T>(far.value)), to_plain(far.seen), to_plain(out), lse_to_plain<T>("lse", lse),
                      to_plain(options), to_plain(run), workspace);
}

/// Without log-sum-exps.
template <class FarKey, class FarValue, element T, executor E = serial_executor>
void attend(operand<T> query, operand<T> key, operand<T> value, far<FarKey, FarValue> far, tensor_view<T> out,
            const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::attend(query, key, value, far, out, lse_view<T>{}, options, run, workspace);
}

/// See `cca::pool`.
template <element T, executor E = serial_executor>
void pool(operand<T> query, operand<T> key, operand<T> value, tensor_view<T> core_key, tensor_view<T> core_value,
          const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().pool(to_plain(query), to_plain(key), to_plain(value), to_plain(core_key), to_plain(core_value),
                    to_plain(options), to_plain(run), workspace);
}

/// See `cca::merge`.
template <element T, executor E = serial_executor>
void merge(operand<T> out_a, lse_view<const std::type_identity_t<T>> lse_a, operand<T> out_b,
           lse_view<const std::type_identity_t<T>> lse_b, tensor_view<T> out, lse_view<T> lse, const E& run = {}) {
  using namespace detail;
  kernels<T>().merge(to_plain(out_a), to_plain(lse_a), to_plain(out_b), to_plain(lse_b), to_plain(out), to_plain(lse),
                     to_plain(run));
}

/// See `cca::workspace_size`.
template <class Query, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<Query> query, operand<std::remove_const_t<Query>> key,
                                         operand<std::remove_const_t<Query>> value, const options& options,
                                         const E& run = {}) {
  using namespace detail;
  using T = std::remove_const_t<Query>;
  return kernels<T>().workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value), to_plain(options),
                                     to_plain(run));
}

/// The same for `attend`.
template <class Query, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<Query> query, operand<std::remove_const_t<Query>> key,
                                         operand<std::remove_const_t<Query>> value, far<FarKey, FarValue> far,
                                         const E& run = {}) {
  using namespace detail;
  using T = std::remove_const_t<Query>;
  return kernels<T>().attend_workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                            to_plain(operand<T>(far.key)), to_plain(operand<T>(far.value)),
                                            to_plain(far.seen), to_plain(run));
}

/// See `cca::attention_gradient`.
template <class GradLse, element T, executor E = serial_executor>
void attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                        lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out, lse_view<GradLse> grad_lse,
                        tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                        const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().attention_gradient(to_plain(query), to_plain(key), to_plain(value), to_plain(out), to_plain(lse),
                                  to_plain(grad_out), lse_to_plain<const T>("grad_lse", grad_lse), to_plain(grad_query),
                                  to_plain(grad_key), to_plain(grad_value), to_plain(options), to_plain(run),
                                  workspace);
}

/// Without a gradient of `lse`.
template <element T, executor E = serial_executor>
void attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                        lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out, tensor_view<T> grad_query,
                        tensor_view<T> grad_key, tensor_view<T> grad_value, const options& options, const E& run = {},
                        std::span<std::byte> workspace = {}) {
  dispatch::attention_gradient(query, key, value, out, lse, grad_out, lse_view<T>{}, grad_query, grad_key, grad_value,
                               options, run, workspace);
}

/// See `cca::local_attention_gradient`.
template <class GradLse, element T, executor E = serial_executor>
void local_attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out,
                              lse_view<GradLse> grad_lse, tensor_view<T> grad_query, tensor_view<T> grad_key,
                              tensor_view<T> grad_value, const options& options, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().local_attention_gradient(to_plain(query), to_plain(key), to_plain(value), to_plain(out), to_plain(lse),
                                        to_plain(grad_out), lse_to_plain<const T>("grad_lse", grad_lse),
                                        to_plain(grad_query), to_plain(grad_key), to_plain(grad_value),
                                        to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <element T, executor E = serial_executor>
void local_attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out,
                              tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                              const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::local_attention_gradient(query, key, value, out, lse, grad_out, lse_view<T>{}, grad_query, grad_key,
                                     grad_value, options, run, workspace);
}

/// See `cca::dense_attention_gradient`.
template <class GradLse, element T, executor E = serial_executor>
void dense_attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out,
                              lse_view<GradLse> grad_lse, tensor_view<T> grad_query, tensor_view<T> grad_key,
                              tensor_view<T> grad_value, const options& options = {}, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().dense_attention_gradient(to_plain(query), to_plain(key), to_plain(value), to_plain(out), to_plain(lse),
                                        to_plain(grad_out), lse_to_plain<const T>("grad_lse", grad_lse),
                                        to_plain(grad_query), to_plain(grad_key), to_plain(grad_value),
                                        to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <element T, executor E = serial_executor>
void dense_attention_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> out,
                              lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out,
                              tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                              const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  dispatch::dense_attention_gradient(query, key, value, out, lse, grad_out, lse_view<T>{}, grad_query, grad_key,
                                     grad_value, options, run, workspace);
}

/// See `cca::attend_gradient`.
template <class FarKey, class FarValue, class GradLse, element T, executor E = serial_executor>
void attend_gradient(operand<T> query, operand<T> key, operand<T> value, far<FarKey, FarValue> far, operand<T> out,
                     lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out, lse_view<GradLse> grad_lse,
                     tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                     tensor_view<T> grad_far_key, tensor_view<T> grad_far_value, const options& options,
                     const E& run = {}, std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().attend_gradient(to_plain(query), to_plain(key), to_plain(value), to_plain(operand<T>(far.key)),
                               to_plain(operand<T>(far.value)), to_plain(far.seen), to_plain(out), to_plain(lse),
                               to_plain(grad_out), lse_to_plain<const T>("grad_lse", grad_lse), to_plain(grad_query),
                               to_plain(grad_key), to_plain(grad_value), to_plain(grad_far_key),
                               to_plain(grad_far_value), to_plain(options), to_plain(run), workspace);
}

/// Without a gradient of `lse`.
template <class FarKey, class FarValue, element T, executor E = serial_executor>
void attend_gradient(operand<T> query, operand<T> key, operand<T> value, far<FarKey, FarValue> far, operand<T> out,
                     lse_view<const std::type_identity_t<T>> lse, operand<T> grad_out, tensor_view<T> grad_query,
                     tensor_view<T> grad_key, tensor_view<T> grad_value, tensor_view<T> grad_far_key,
                     tensor_view<T> grad_far_value, const options& options, const E& run = {},
                     std::span<std::byte> workspace = {}) {
  dispatch::attend_gradient(query, key, value, far, out, lse, grad_out, lse_view<T>{}, grad_query, grad_key, grad_value,
                            grad_far_key, grad_far_value, options, run, workspace);
}

/// See `cca::pool_gradient`.
template <element T, executor E = serial_executor>
void pool_gradient(operand<T> query, operand<T> key, operand<T> value, operand<T> grad_core_key,
                   operand<T> grad_core_value, tensor_view<T> grad_query, tensor_view<T> grad_key,
                   tensor_view<T> grad_value, const options& options, const E& run = {},
                   std::span<std::byte> workspace = {}) {
  using namespace detail;
  kernels<T>().pool_gradient(to_plain(query), to_plain(key), to_plain(value), to_plain(grad_core_key),
                             to_plain(grad_core_value), to_plain(grad_query), to_plain(grad_key), to_plain(grad_value),
                             to_plain(options), to_plain(run), workspace);
}

/// See `cca::gradient_workspace_size`.
template <class Query, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<Query> query, operand<std::remove_const_t<Query>> key,
                                                  operand<std::remove_const_t<Query>> value, const options& options,
                                                  const E& run = {}) {
  using namespace detail;
  using T = std::remove_const_t<Query>;
  return kernels<T>().gradient_workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                              to_plain(options), to_plain(run));
}

/// The same for `attend_gradient`.
template <class Query, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<Query> query, operand<std::remove_const_t<Query>> key,
                                                  operand<std::remove_const_t<Query>> value, far<FarKey, FarValue> far,
                                                  const E& run = {}) {
  using namespace detail;
  using T = std::remove_const_t<Query>;
  return kernels<T>().attend_gradient_workspace_size(to_plain(operand<T>(query)), to_plain(key), to_plain(value),
                                                     to_plain(operand<T>(far.key)), to_plain(operand<T>(far.value)),
                                                     to_plain(far.seen), to_plain(run));
}

}  // namespace cca::inline CCA_TARGET::dispatch
