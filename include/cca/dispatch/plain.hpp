#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "../version.hpp"

// What crosses between a program and the kernels that were compiled for its processor: the same types in every
// translation unit, hence in an inline namespace of the version alone, and without functions of their own.

namespace Eigen {
struct bfloat16;
struct half;
}  // namespace Eigen

namespace cca { namespace plain { inline namespace CCA_VERSION_NAME {

/// What elements are computed in, as `compute_type`: the type of log-sum-exps and gradients.
template <class T>
struct computed {
  using type = float;
};
template <>
struct computed<double> {
  using type = double;
};

/// A `tensor_view`.
template <class T, std::size_t Rank = 4>
struct view {
  T* data = nullptr;
  std::array<std::int64_t, Rank> extent{};
  std::array<std::int64_t, Rank> stride{};
};

/// `cca::options`, its enumerators as numbers.
struct options {
  std::int64_t group_size, window;
  int pool, core_heads;
  std::optional<double> softmax_scale;
  std::optional<std::int64_t> first_position;
  int unit;
};

/// `cache_shape`.
struct cache_shape {
  std::int64_t batch, heads, kv_heads, dim, value_dim, capacity, rewind;
};

/// Any executor: `run(self, n, task, call)` has it call `call(task, i)` for every i in `[0, n)`.
struct executor {
  std::int64_t concurrency;
  const void* self;
  void (*run)(const void* self, std::int64_t n, const void* task, void (*call)(const void* task, std::int64_t i));
};

using workspace = std::span<std::byte>;

/// Everything is passed as the function of the same name in `cca` takes it.
template <class T>
struct functions {
  using number = typename computed<T>::type;
  using in = const view<const T>&;
  using to = const view<T>&;
  using gradient_in = const view<const number>&;
  using gradient_to = const view<number>&;
  using lse_in = const view<const number, 3>&;
  using lse_to = const view<number, 3>&;
  using seen_in = const view<const std::int64_t, 3>&;
  using with = const options&;
  using on = const executor&;
  using memory = const workspace&;

  void (*attention)(in query, in key, in value, to out, lse_to lse, with, on, memory);
  void (*local_attention)(in query, in key, in value, to out, lse_to lse, with, on, memory);
  void (*dense_attention)(in query, in key, in value, to out, lse_to lse, with, on, memory);
  void (*attend)(in query, in key, in value, in far_key, in far_value, seen_in seen, to out, lse_to lse, with, on,
                 memory);
  void (*pool)(in query, in key, in value, to core_key, to core_value, with, on, memory);
  void (*merge)(in out_a, lse_in lse_a, in out_b, lse_in lse_b, to out, lse_to lse, on);
  std::size_t (*workspace_size)(in query, in key, in value, with, on);
  std::size_t (*attend_workspace_size)(in query, in key, in value, in far_key, in far_value, seen_in seen, on,
                                       const int& unit);

  void (*attention_gradient)(in query, in key, in value, in out, lse_in lse, in grad_out, lse_in grad_lse,
                             gradient_to grad_query, gradient_to grad_key, gradient_to grad_value, with, on, memory);
  void (*local_attention_gradient)(in query, in key, in value, in out, lse_in lse, in grad_out, lse_in grad_lse,
                                   gradient_to grad_query, gradient_to grad_key, gradient_to grad_value, with, on,
                                   memory);
  void (*dense_attention_gradient)(in query, in key, in value, in out, lse_in lse, in grad_out, lse_in grad_lse,
                                   gradient_to grad_query, gradient_to grad_key, gradient_to grad_value, with, on,
                                   memory);
  void (*attend_gradient)(in query, in key, in value, in far_key, in far_value, seen_in seen, in out, lse_in lse,
                          in grad_out, lse_in grad_lse, gradient_to grad_query, gradient_to grad_key,
                          gradient_to grad_value, gradient_to grad_far_key, gradient_to grad_far_value, with, on,
                          memory);
  void (*pool_gradient)(in query, in key, in value, gradient_in grad_core_key, gradient_in grad_core_value,
                        gradient_to grad_query, gradient_to grad_key, gradient_to grad_value, with, on, memory);
  std::size_t (*gradient_workspace_size)(in query, in key, in value, with, on);
  std::size_t (*attend_gradient_workspace_size)(in query, in key, in value, in far_key, in far_value, seen_in seen, on,
                                                const int& unit);
};

/// What a cache says about one of its sequences.
struct sequence_counts {
  std::int64_t length, cores, raw, least_length;
};

/// A cache is a pointer to the `kv_cache<T>` of the architecture that made it. Without a sequence `b`, all are meant.
template <class T>
struct cache_functions {
  using in = const view<const T>&;
  using sequence = const std::optional<std::int64_t>&;

  void* (*make)(const cache_shape&, const options&);
  void (*destroy)(void* cache);
  void (*attend)(void* cache, sequence b, in query, in key, in value, const view<T>& out,
                 const view<typename computed<T>::type, 3>& lse, const executor&);
  void (*append)(void* cache, sequence b, in query, in key, in value, const executor&);
  void (*truncate)(void* cache, std::int64_t b, std::int64_t length);
  void (*reset)(void* cache, sequence b);
  void (*fork)(void* cache, std::int64_t from, std::int64_t to);
  cache_shape (*shape)(const void* cache);
  options (*settings)(const void* cache);
  sequence_counts (*counts)(const void* cache, std::int64_t b);
  std::array<std::size_t, 2> (*bytes)(const void* cache);  // held, allocated
  void (*save)(const void* cache, std::ostream&);
  void* (*load)(std::istream&, int unit);
};

template <class T>
struct kernels {
  functions<T> calls;
  cache_functions<T> cache;
};

/// The kernels of one instruction set, named as in detail/base/target.hpp.
struct architecture {
  const char* name;
  kernels<float> of_float;
  kernels<double> of_double;
  kernels<Eigen::bfloat16> of_bfloat16;
  kernels<Eigen::half> of_half;
};

/// The kernels in use: by default the newest that the processor and the operating system run.
const architecture& chosen();

/// All that run here, the newest first.
std::vector<const architecture*> available();

/// @throws std::invalid_argument  for one that does not run here
void choose(std::string_view name);

}}}  // namespace cca::plain::CCA_VERSION_NAME

/// The name of the kernels that were compiled for one instruction set.
#define CCA_DISPATCH_TABLE(instruction_set) CCA_DISPATCH_TABLE_OF(CCA_VERSION_NAME, instruction_set)
#define CCA_DISPATCH_TABLE_OF(version, instruction_set) CCA_DISPATCH_TABLE_NAMED(version, instruction_set)
#define CCA_DISPATCH_TABLE_NAMED(version, instruction_set) cca_dispatch_##version##_##instruction_set
