// Compiled once per instruction set, see cmake/dispatch.cmake. Of each object only the table at the end is seen from
// outside: what it instantiates of the standard library has the same name in each, and the linker would keep any one.

#include <Eigen/Core>
#include <cca/cca.hpp>
#include <cca/dispatch/plain.hpp>
#include <cca/dispatch/to_plain.hpp>
#include <cca/gradient.hpp>
#include <cca/kv_cache_file.hpp>

#define CCA_NAME_OF(set) #set
#define CCA_NAME(set) CCA_NAME_OF(set)

namespace cca { inline namespace CCA_TARGET { namespace {

// Flags of the whole project that come on top of this object's own would let it run where they are not asked for.
static_assert(
    std::string_view(CCA_NAME(CCA_INSTRUCTION_SET)) == CCA_DISPATCH_TARGET,
    "cca::dispatch: compiler flags for an instruction set, such as -mavx512f in CMAKE_CXX_FLAGS, come on top of "
    "those of each object");

struct erased_executor {
  plain::executor to;

  [[nodiscard]] std::int64_t concurrency() const { return to.concurrency; }

  template <class F>
  void operator()(std::int64_t n, const F& f) const {
    to.run(to.self, n, &f, [](const void* task, std::int64_t i) { (*static_cast<const F*>(task))(i); });
  }
};

template <class T, std::size_t Rank>
tensor_view<T, Rank> typed(const plain::view<T, Rank>& view) {
  return {view.data, view.extent, view.stride, view.begins, view.ends};
}
cache_shape typed(const plain::cache_shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
}

template <class T, class Row, class Far>
inputs<T, Row> inputs_of(const plain::call<T, Row, Far>& c) {
  return {typed(c.query),        typed(c.key),      typed(c.value),      typed(c.sink_logits),
          typed(c.alibi_slopes), typed(c.key_bias), typed(c.key_scales), typed(c.value_scales)};
}
template <class T, class Row, class Far>
far_context<Far> far_of(const plain::call<T, Row, Far>& c) {
  return {typed(c.far_key),        typed(c.far_value),
          typed(c.seen),           typed(c.far_bias),
          typed(c.far_positions),  typed(c.visible_from),
          typed(c.visible_until),  {typed(c.selected), c.selected_rows, c.selected_queries},
          typed(c.far_key_scales), typed(c.far_value_scales)};
}
template <class T, class Row, class Far>
results<T> results_of(const plain::call<T, Row, Far>& c) {
  return {typed(c.out), typed(c.lse)};
}
template <class T>
results<const T, const compute_type<T>> first_of(const plain::call<T>& c) {
  return {typed(c.out_a), typed(c.lse_a)};
}
template <class T>
results<const T, const compute_type<T>> second_of(const plain::call<T>& c) {
  return {typed(c.out_b), typed(c.lse_b)};
}
template <class T>
incoming<T> incoming_of(const plain::call<T>& c) {
  return {typed(c.grad_out), typed(c.grad_lse)};
}
template <class T>
gradients<compute_type<T>> gradients_of(const plain::call<T>& c) {
  return {typed(c.grad_query),        typed(c.grad_key),       typed(c.grad_value),
          typed(c.grad_far_key),      typed(c.grad_far_value), typed(c.grad_sink_logits),
          typed(c.grad_alibi_slopes), typed(c.grad_key_bias),  typed(c.grad_far_bias)};
}
template <class T>
cores<T> cores_of(const plain::call<T>& c) {
  return {typed(c.core_key), typed(c.core_value)};
}
template <class T>
cores<const compute_type<T>> grad_cores_of(const plain::call<T>& c) {
  return {typed(c.grad_core_key), typed(c.grad_core_value)};
}

/// Calls `f(options, execution)` with those of a call.
template <class Call, class F>
auto with(const Call& c, const F& f) {
  const erased_executor run{c.run};
  return f(detail::from_plain(c.options), execution{run, c.workspace});
}

template <class T, class Row = T, class Far = Row, class C = plain::call<T, Row, Far>>
constexpr plain::forward_functions<T, Row, Far> forward_functions{
    .attention = [](const C& c) { with(c, [&](const auto&... on) { attention(inputs_of(c), results_of(c), on...); }); },
    .attend =
        [](const C& c) { with(c, [&](const auto&... on) { attend(inputs_of(c), far_of(c), results_of(c), on...); }); },
    .workspace_size =
        [](const C& c) { return with(c, [&](const auto&... on) { return workspace_size(inputs_of(c), on...); }); },
    .attend_workspace_size =
        [](const C& c) {
          return with(c, [&](const auto&... on) { return workspace_size(inputs_of(c), far_of(c), on...); });
        }};

template <class T, class C = plain::call<T>>
constexpr plain::functions<T> functions{
    .pool = [](const C& c) { with(c, [&](const auto&... on) { pool(inputs_of(c), cores_of(c), on...); }); },
    .merge =
        [](const C& c) {
          with(c, [&](const auto&, const auto& run) { merge(first_of(c), second_of(c), results_of(c), run); });
        },
    .attention_gradient =
        [](const C& c) {
          with(c, [&](const auto&... on) {
            attention_gradient(inputs_of(c), first_of(c), incoming_of(c), gradients_of(c), on...);
          });
        },
    .attend_gradient =
        [](const C& c) {
          with(c, [&](const auto&... on) {
            attend_gradient(inputs_of(c), far_of(c), first_of(c), incoming_of(c), gradients_of(c), on...);
          });
        },
    .pool_gradient =
        [](const C& c) {
          with(c, [&](const auto&... on) { pool_gradient(inputs_of(c), grad_cores_of(c), gradients_of(c), on...); });
        },
    .gradient_workspace_size =
        [](const C& c) {
          return with(c, [&](const auto&... on) { return gradient_workspace_size(inputs_of(c), on...); });
        },
    .attend_gradient_workspace_size =
        [](const C& c) {
          return with(c, [&](const auto&... on) { return gradient_workspace_size(inputs_of(c), far_of(c), on...); });
        },
    .quantize = [](const auto& rows, const auto& to, const auto& scales,
                   const plain::executor& run) { quantize(typed(rows), typed(to), typed(scales), erased_executor{run}); }};

template <class T>
kv_cache<T>& cache_at(void* cache) {
  return *static_cast<kv_cache<T>*>(cache);
}
template <class T>
const kv_cache<T>& cache_at(const void* cache) {
  return *static_cast<const kv_cache<T>*>(cache);
}

template <class T, class Row>
constexpr plain::cache_steps<T, Row> cache_steps{
    .attend =
        [](void* cache, const auto& b, const auto& c) {
          with(c, [&](const auto&, const auto& run) {
            b ? cache_at<T>(cache).attend(*b, inputs_of(c), results_of(c), run)
              : cache_at<T>(cache).attend(inputs_of(c), results_of(c), run);
          });
        },
    .append =
        [](void* cache, const auto& b, const auto& c) {
          with(c, [&](const auto&, const auto& run) {
            b ? cache_at<T>(cache).append(*b, inputs_of(c), run) : cache_at<T>(cache).append(inputs_of(c), run);
          });
        }};

template <class T>
constexpr plain::cache_functions<T> cache_functions{
    .of_numbers = cache_steps<T, typename plain::token<T>::type>,
    .of_rows = cache_steps<T, T>,
    .make = [](const plain::cache_shape& shape, const plain::options& options) -> void* {
      return new kv_cache<T>(typed(shape), detail::from_plain(options));
    },
    .destroy = [](void* cache) { delete &cache_at<T>(cache); },
    .truncate = [](void* cache, std::int64_t b, std::int64_t length) { cache_at<T>(cache).truncate(b, length); },
    .reset = [](void* cache, const auto& b) { b ? cache_at<T>(cache).reset(*b) : cache_at<T>(cache).reset(); },
    .fork = [](void* cache, std::int64_t from, std::int64_t to) { cache_at<T>(cache).fork(from, to); },
    .shape = [](const void* cache) { return detail::to_plain(cache_at<T>(cache).shape()); },
    .settings = [](const void* cache) { return detail::to_plain(cache_at<T>(cache).options()); },
    .counts =
        [](const void* cache, std::int64_t b) {
          const auto& c = cache_at<T>(cache);
          return plain::sequence_counts{c.length(b), c.core_count(b), c.raw_count(b), c.least_length(b)};
        },
    .bytes =
        [](const void* cache) {
          return std::array{cache_at<T>(cache).bytes(), cache_at<T>(cache).allocated_bytes()};
        },
    .save = [](const void* cache, std::ostream& stream) { save(cache_at<T>(cache), stream); },
    .load = [](std::istream& stream, int unit) -> void* {
      return new kv_cache<T>(load<T>(stream, static_cast<matrix_unit>(unit)));
    }};

template <class T>
constexpr plain::kernels<T> kernels{forward_functions<T>, functions<T>, cache_functions<T>};

}}}  // namespace cca::CCA_TARGET

extern "C" {
extern const cca::plain::architecture CCA_DISPATCH_TABLE(CCA_INSTRUCTION_SET);
// Constant-initialised: nothing of this object runs before it is chosen.
constinit const cca::plain::architecture CCA_DISPATCH_TABLE(CCA_INSTRUCTION_SET){
    CCA_NAME(CCA_INSTRUCTION_SET),
    cca::kernels<float>,
    cca::kernels<double>,
    cca::kernels<Eigen::bfloat16>,
    cca::kernels<Eigen::half>,
    cca::cache_functions<cca::q8>,
    cca::forward_functions<float, cca::q8, cca::q8>,
    cca::forward_functions<float, cca::q8, float>,
    cca::forward_functions<float, float, cca::q8>};
}
