#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../dispatch.hpp"
#include "c_tensors.hpp"
#include "cca.h"

// The arguments of the C interface as those of cca::dispatch. What a caller got wrong is refused by the name that it has in
// cca.h, the kernels' own checks come after.

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What a caller gives by its address.
template <class T>
T& required(const char* name, T* given, const char* wanted) {
  if (given == nullptr) refuse(name, {"NULL"}, {wanted});
  return *given;
}

/// A cache of any type of elements, of those in `with_element` and of more.
template <template <class...> class Cache, class... More>
using any_cache = std::variant<Cache<float>, Cache<double>, Cache<Eigen::bfloat16>, Cache<Eigen::half>, Cache<More>...>;

/// A structure of cca.h as the caller knows it: what his version of it lacks is as in `defaults`.
template <class Struct>
Struct complete_struct(const char* name, const Struct* from, Struct defaults) {
  const std::size_t size = required(name, from, "a structure").struct_size;
  if (size < sizeof(std::size_t) || size > sizeof(Struct))
    refuse(text{name, ".struct_size"}.c_str(), {size},
           {"at most ", sizeof(Struct), ", the size in the library's cca.h"});
  std::memcpy(&defaults, from, size);
  return defaults;
}

/// Calls `f(name, member)` for each option, in the order of `for_each_option`.
template <class F>
constexpr void for_each_c_option(const cca_options& all, const F& f) {
  f("group_size", all.group_size);
  f("window", all.window);
  f("sink_tokens", all.sink_tokens);
  f("lookahead", all.lookahead);
  f("prefix", all.prefix);
  f("pool", all.pool);
  f("core_heads", all.core_heads);
  f("core_bias", all.core_bias);
  f("softmax_scale", all.softmax_scale);
  f("pooling_scale", all.pooling_scale);
  f("softcap", all.softcap);
  f("first_position", all.first_position);
  f("unit", all.unit);
}

/// Whether the two lists name the same: an option that the C interface lacks does not compile.
constexpr bool has_every_option() {
  std::array<std::string_view, option_count()> names{};
  std::size_t count = 0, same = 0;
  const options defaults;
  for_each_option(defaults, [&](const char* name, const auto&) { names[count++] = name; });
  count = 0;
  for_each_c_option(CCA_OPTIONS, [&](const char* name, const auto&) {
    same += count < names.size() && names[count] == name;
    ++count;
  });
  return same == names.size() && count == names.size();
}
static_assert(has_every_option(), "cca.h has other options than options.hpp, or in another order");

inline options options_of(const cca_options* from) {
  if (from == nullptr) return {};
  const cca_options given = complete_struct<cca_options>("options", from, CCA_OPTIONS);
  std::array<option_code, option_count()> codes;
  option_code* code = codes.data();
  for_each_c_option(given, [&](const char*, const auto& member) {
    if constexpr (std::is_pointer_v<std::remove_cvref_t<decltype(member)>>)
      *code++ = member != nullptr ? encode_option(*member) : option_code{0, 0};
    else
      *code++ = encode_option(member);
  });
  options to;
  code = codes.data();
  for_each_option(to, [&](const char*, auto& option) { decode_option(*code++, option); });
  return to;
}

/// As many threads as a caller says, made for the call.
struct made_threads {
  std::int64_t count;

  [[nodiscard]] std::int64_t concurrency() const { return count; }

  template <class F>
  void operator()(std::int64_t n, const F& f) const {
    std::atomic<std::int64_t> next{0};
    first_failure failure;
    const auto work = [&] {
      for (std::int64_t i; (i = next.fetch_add(1)) < n;) failure.attempt([&] { f(i); });
    };
    std::vector<std::jthread> helpers;
    failure.attempt([&] {
      helpers.reserve(static_cast<std::size_t>(smaller(count, n)));
      for (std::int64_t helper = 1; helper < smaller(count, n); ++helper) helpers.emplace_back(work);
    });
    work();
    helpers.clear();  // joins
    failure.rethrow();
  }
};

/// A caller's own. No exception goes through his code.
struct callers_threads {
  std::int64_t count;
  cca_parallel_for* run;
  void* self;

  [[nodiscard]] std::int64_t concurrency() const { return count; }

  template <class F>
  void operator()(std::int64_t n, const F& f) const {
    struct context : first_failure {
      const F* f;
    } all;
    all.f = &f;
    run(
        self, n,
        [](void* context_of_call, std::int64_t i) {
          auto& c = *static_cast<context*>(context_of_call);
          c.attempt([&] { (*c.f)(i); });
        },
        &all);
    all.rethrow();
  }
};

using tensor_place = const DLTensor* cca_call::*;

/// The tensors of a call by their names.
struct named_place {
  const char* name;
  tensor_place at;
};
inline constexpr named_place all_tensors[] = {
#define CCA_TENSOR(name) {#name, &cca_call::name}
    CCA_TENSOR(query), CCA_TENSOR(key), CCA_TENSOR(value), CCA_TENSOR(sink_logits), CCA_TENSOR(alibi_slopes),
    CCA_TENSOR(key_bias), CCA_TENSOR(query_lengths), CCA_TENSOR(query_begins), CCA_TENSOR(query_offsets),
    CCA_TENSOR(key_lengths), CCA_TENSOR(key_begins), CCA_TENSOR(key_offsets), CCA_TENSOR(far_lengths),
    CCA_TENSOR(far_begins), CCA_TENSOR(far_offsets), CCA_TENSOR(far_key), CCA_TENSOR(far_value), CCA_TENSOR(seen),
    CCA_TENSOR(far_bias), CCA_TENSOR(far_positions), CCA_TENSOR(out), CCA_TENSOR(lse), CCA_TENSOR(out_a),
    CCA_TENSOR(lse_a), CCA_TENSOR(out_b), CCA_TENSOR(lse_b), CCA_TENSOR(core_key), CCA_TENSOR(core_value),
    CCA_TENSOR(grad_out), CCA_TENSOR(grad_lse), CCA_TENSOR(grad_core_key), CCA_TENSOR(grad_core_value),
    CCA_TENSOR(grad_query), CCA_TENSOR(grad_key), CCA_TENSOR(grad_value), CCA_TENSOR(grad_far_key),
    CCA_TENSOR(grad_far_value), CCA_TENSOR(grad_sink_logits), CCA_TENSOR(grad_alibi_slopes),
    CCA_TENSOR(grad_key_bias), CCA_TENSOR(grad_far_bias), CCA_TENSOR(visible_from), CCA_TENSOR(visible_until),
    CCA_TENSOR(selected_blocks), CCA_TENSOR(key_scales), CCA_TENSOR(value_scales), CCA_TENSOR(far_key_scales),
    CCA_TENSOR(far_value_scales)
#undef CCA_TENSOR
};
// Every tensor that the structure has: from the query to the options, behind the workspace, and at the end there is nothing
// else.
static_assert(std::size(all_tensors) * sizeof(void*) ==
              offsetof(cca_call, options) - offsetof(cca_call, query) +               //
                  offsetof(cca_call, block_rows) - offsetof(cca_call, visible_from) +  //
                  sizeof(cca_call) - offsetof(cca_call, key_scales));

inline const char* name_of(tensor_place at) {
  for (const auto& tensor : all_tensors)
    if (tensor.at == at) return tensor.name;
  return "?";
}

/// The arguments of one call. Each is taken once, by who has a use for it; what is left at the end has none.
class arguments {
 public:
  explicit arguments(const cca_call* call)
      : call_(complete_struct("call", call, cca_call{})),
        queries_(take_ranges(&cca_call::query_lengths, &cca_call::query_begins, &cca_call::query_offsets)),
        keys_(take_ranges(&cca_call::key_lengths, &cca_call::key_begins, &cca_call::key_offsets)),
        far_(take_ranges(&cca_call::far_lengths, &cca_call::far_begins, &cca_call::far_offsets)) {}
  arguments(const arguments&) = delete;  // views refer to the ranges

  [[nodiscard]] bool has(tensor_place at) const { return call_.*at != nullptr; }

  /// The elements of a tensor that has to be there.
  [[nodiscard]] DLDataType elements(tensor_place at) const {
    if (!has(at)) refuse(name_of(at), {"NULL"}, {"a tensor"});
    return (call_.*at)->dtype;
  }

  /// Calls `f(std::type_identity<Row>)` with the elements of the rows at `at`: `T`, as the query has them, or 8 bits beside
  /// floats, for a cache where it keeps such. What else they are is refused when they are taken.
  template <class T, class Kept = q8, class F>
  auto with_rows(tensor_place at, const F& f) const {
    if constexpr (std::is_same_v<T, float> && is_q8<Kept>)
      if (has(at) && is_of<q8>((call_.*at)->dtype)) return f(std::type_identity<q8>{});
    return f(std::type_identity<T>{});
  }

  template <class T, class Row = T>
  inputs<T, Row> take_inputs() {
    inputs<T, Row> in = take_tokens<T, Row>();
    in.sink_logits = per_query<const compute_type<T>>(&cca_call::sink_logits);
    in.alibi_slopes = of<const compute_type<T>, 3>(&cca_call::alibi_slopes, {});
    in.key_bias = of<const compute_type<T>, 3>(&cca_call::key_bias, keys_);
    return in;
  }
  /// Query, key and value alone, with the scales of rows that have them.
  template <class T, class Row = T>
  inputs<T, Row> take_tokens() {
    inputs<T, Row> in{of<const T, 4>(&cca_call::query, queries_), of<const Row, 4>(&cca_call::key, keys_),
                      of<const Row, 4>(&cca_call::value, keys_)};
    if constexpr (is_q8<Row>) {
      in.key_scales = of<const float, 3>(&cca_call::key_scales, keys_);
      in.value_scales = of<const float, 3>(&cca_call::value_scales, keys_);
    }
    return in;
  }
  template <class T>
  far_context<T> take_far() {
    const std::int64_t block_rows = take_count(call_.block_rows), block_queries = take_count(call_.block_queries);
    if (has(&cca_call::selected_blocks)) lists_ = lists_of(queries_, block_queries);
    far_context<T> context{of<const T, 4>(&cca_call::far_key, far_),
                           of<const T, 4>(&cca_call::far_value, far_),
                           of<const std::int64_t, 3>(&cca_call::seen, queries_),
                           of<const compute_type<T>, 3>(&cca_call::far_bias, far_),
                           of<const std::int64_t, 3>(&cca_call::far_positions, far_),
                           of<const std::int64_t, 3>(&cca_call::visible_from, far_),
                           of<const std::int64_t, 3>(&cca_call::visible_until, far_),
                           {of<const std::int64_t, 4>(&cca_call::selected_blocks, lists_), block_rows, block_queries}};
    if constexpr (is_q8<T>) {
      context.key_scales = of<const float, 3>(&cca_call::far_key_scales, far_);
      context.value_scales = of<const float, 3>(&cca_call::far_value_scales, far_);
    }
    return context;
  }
  template <class T, class Lse = compute_type<T>>
  results<T, Lse> take_results(tensor_place out = &cca_call::out, tensor_place lse = &cca_call::lse) {
    return {of<T, 4>(out, queries_), of<Lse, 3>(lse, queries_)};
  }
  template <class T>
  results<const T, const compute_type<T>> take_read(tensor_place out = &cca_call::out,
                                                    tensor_place lse = &cca_call::lse) {
    return take_results<const T, const compute_type<T>>(out, lse);
  }
  template <class T>
  incoming<T> take_incoming() {
    return {of<const T, 4>(&cca_call::grad_out, queries_),
            of<const compute_type<T>, 3>(&cca_call::grad_lse, queries_)};
  }
  template <class T>
  cores<T> take_cores(tensor_place key, tensor_place value) {
    return {of<T, 4>(key, far_), of<T, 4>(value, far_)};
  }
  /// `T` is what gradients are of.
  template <class T>
  gradients<T> take_gradients() {
    return {of<T, 4>(&cca_call::grad_query, queries_),
            of<T, 4>(&cca_call::grad_key, keys_),
            of<T, 4>(&cca_call::grad_value, keys_),
            of<T, 4>(&cca_call::grad_far_key, far_),
            of<T, 4>(&cca_call::grad_far_value, far_),
            per_query<T>(&cca_call::grad_sink_logits),
            of<T, 3>(&cca_call::grad_alibi_slopes, {}),
            of<T, 3>(&cca_call::grad_key_bias, keys_),
            of<T, 3>(&cca_call::grad_far_bias, far_)};
  }

  /// For functions that have no use for them.
  void refuse_options(const char* reason) const {
    if (call_.options != nullptr) refuse("options", {"a structure"}, {"none: ", reason});
  }
  void refuse_workspace(const char* reason) const {
    if (call_.workspace != nullptr) refuse("workspace", {"memory"}, {"none: ", reason});
  }

  /// For a step of a cache.
  void refuse_what_a_cache_has() const {
    refuse_options("a cache has those that it was made with");
    refuse_workspace("a cache has its own");
  }

  /// Options and execution of the call, for `f(options, execution)`. Refuses what nobody took.
  template <class F>
  auto run(const F& f) const {
    for (const auto& tensor : all_tensors)
      if (has(tensor.at)) refuse(tensor.name, {"a tensor"}, {"none: this function has no use for it"});
    for (const token_ranges* sequences : {&queries_, &keys_, &far_})
      if (sequences->ends != nullptr && !sequences->taken)
        refuse(sequences->name, {"a tensor"}, {"none: the call has nothing that it is for"});
    refuse_count("block_rows", call_.block_rows);
    refuse_count("block_queries", call_.block_queries);
    const options options = options_of(call_.options);
    const std::span memory(static_cast<std::byte*>(call_.workspace), call_.workspace_size);
    if (call_.threads < 0) refuse("threads", {call_.threads}, {"at least 0"});
    if (call_.parallel_for != nullptr) {
      if (call_.threads == 0) refuse("threads", {"0"}, {"how many tasks parallel_for runs at once"});
      const callers_threads threads{call_.threads, call_.parallel_for, call_.parallel_for_self};
      return f(options, execution{threads, memory});
    }
    const made_threads threads{call_.threads > 1 ? call_.threads : 1};
    return f(options, execution{threads, memory});
  }

 private:
  const DLTensor* take(tensor_place at) { return std::exchange(call_.*at, nullptr); }

  /// A number of which 0 means 1.
  static std::int64_t take_count(std::int64_t& count) {
    const std::int64_t given = std::exchange(count, 0);
    return given == 0 ? 1 : given;
  }
  static void refuse_count(const char* name, std::int64_t count) {
    if (count != 0) refuse(name, {count}, {"0: this function has no use for it"});
  }

  token_ranges take_ranges(tensor_place lengths, tensor_place begins, tensor_place offsets) {
    const auto named = [&](tensor_place at) { return named_tensor{name_of(at), take(at)}; };
    return ranges_of(named(lengths), named(begins), named(offsets));
  }

  template <class T, std::size_t Rank>
  tensor_view<T, Rank> of(tensor_place at, const token_ranges& sequences) {
    const DLTensor* tensor = take(at);
    if (tensor == nullptr) return {};
    sequences.taken = true;
    return with_sequences(name_of(at), view_of<T, Rank>(name_of(at), *tensor), sequences);
  }
  /// One number per head, or per query.
  template <class T>
  tensor_view<T, 3> per_query(tensor_place at) {
    const bool per_head = has(at) && ((call_.*at)->ndim != 3 || (call_.*at)->shape[2] == 1);
    return of<T, 3>(at, per_head ? token_ranges{} : queries_);
  }

  cca_call call_;
  token_ranges queries_, keys_, far_, lists_;
};

}}}  // namespace cca::CCA_TARGET::detail
