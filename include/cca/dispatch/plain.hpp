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

/// What the numbers of a cache's calls are, as `kv_cache::number_type`: elements of `q8` need scales.
template <class T>
struct token {
  using type = T;
};
template <>
struct token<std::int8_t> {
  using type = float;
};

/// A `tensor_view`.
template <class T, std::size_t Rank = 4>
struct view {
  T* data = nullptr;
  std::array<std::int64_t, Rank> extent{};
  std::array<std::int64_t, Rank> stride{};
  const std::int64_t *begins = nullptr, *ends = nullptr;
};

/// `cca::options`, each by its place in their list: whether it has a value, and the value's bits.
struct option {
  std::int64_t present, bits;
};
struct options {
  option all[16];
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

/// The arguments of any call, in the places of their names; those that the function does not take are empty. Keys and values
/// are of `Row`, far ones of `Far`.
template <class T, class Row = T, class Far = Row>
struct call {
  using number = typename computed<T>::type;
  using operand = view<const T>;
  using lse_operand = view<const number, 3>;

  operand query;  // inputs
  view<const Row> key, value;
  lse_operand sink_logits, alibi_slopes, key_bias;
  view<const float, 3> key_scales, value_scales;
  view<const Far> far_key, far_value;  // far context
  view<const std::int64_t, 3> seen, far_positions, visible_from, visible_until;
  view<const std::int64_t> selected;
  std::int64_t selected_rows, selected_queries;
  lse_operand far_bias;
  view<const float, 3> far_key_scales, far_value_scales;
  view<T> out;  // results
  view<number, 3> lse;
  operand out_a, out_b, grad_out;  // results that are read, and the gradients that come in
  lse_operand lse_a, lse_b, grad_lse;
  view<number> grad_query, grad_key, grad_value, grad_far_key, grad_far_value;  // gradients
  view<number, 3> grad_sink_logits, grad_alibi_slopes, grad_key_bias, grad_far_bias;
  view<T> core_key, core_value;  // cores, and their gradients that come in
  view<const number> grad_core_key, grad_core_value;
  plain::options options;
  plain::executor run;
  std::span<std::byte> workspace;
};

/// The functions of these names in `cca`: those whose rows may be of 8 bits, and all others.
template <class T, class Row = T, class Far = Row>
struct forward_functions {
  using run = void(const call<T, Row, Far>&);
  using count = std::size_t(const call<T, Row, Far>&);

  run *attention, *attend;
  count *workspace_size, *attend_workspace_size;
};
template <class T>
struct functions {
  using run = void(const call<T>&);
  using count = std::size_t(const call<T>&);

  run *pool, *merge;
  run *attention_gradient, *attend_gradient, *pool_gradient;
  count *gradient_workspace_size, *attend_gradient_workspace_size;
  void (*quantize)(const view<const T>& rows, const view<std::int8_t>& to, const view<float, 3>& scales,
                   const executor& run);
};

/// What a cache says about one of its sequences.
struct sequence_counts {
  std::int64_t length, cores, raw, least_length;
};

/// A cache is a pointer to the `kv_cache<T>` of the architecture that made it. Without a sequence `b`, all are meant.
using sequence = const std::optional<std::int64_t>&;

/// How such a cache takes tokens of `Row`.
template <class T, class Row>
struct cache_steps {
  using step = void(void* cache, sequence b, const call<typename token<T>::type, Row>&);

  step *attend, *append;
};
template <class T>
struct cache_functions {
  cache_steps<T, typename token<T>::type> of_numbers;
  cache_steps<T, T> of_rows;  // as they are kept: the same, or with scales
  void* (*make)(const cache_shape&, const options&);
  void (*destroy)(void* cache);
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
  forward_functions<T> forward;
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
  cache_functions<std::int8_t> cache_of_q8;
  forward_functions<float, std::int8_t, std::int8_t> forward_of_q8;
  forward_functions<float, std::int8_t, float> forward_of_q8_tokens;
  forward_functions<float, float, std::int8_t> forward_of_q8_far;
};

/// The kernels in use: by default the newest that the processor and the operating system run.
/// @throws std::runtime_error  where none of those that were compiled run here
const architecture& chosen();

/// All that were compiled and run here, the newest first.
std::vector<const architecture*> available();

/// @throws std::invalid_argument  for one that does not run here
void choose(std::string_view name);

}}}  // namespace cca::plain::CCA_VERSION_NAME

/// The name of the kernels that were compiled for one instruction set.
#define CCA_DISPATCH_TABLE(instruction_set) CCA_DISPATCH_TABLE_OF(CCA_VERSION_NAME, instruction_set)
#define CCA_DISPATCH_TABLE_OF(version, instruction_set) CCA_DISPATCH_TABLE_NAMED(version, instruction_set)
#define CCA_DISPATCH_TABLE_NAMED(version, instruction_set) cca_dispatch_##version##_##instruction_set
