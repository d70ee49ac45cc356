// Compiled once per instruction set, see cmake/dispatch.cmake. Of each object only the table at the end is seen from
// outside: what it instantiates of the standard library has the same name in each, and the linker would keep any one.

#include <Eigen/Core>
#include <cca/cca.hpp>
#include <cca/dispatch/plain.hpp>
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
  return {view.data, view.extent, view.stride};
}
matrix_unit typed(int unit) { return static_cast<matrix_unit>(unit); }
options typed(const plain::options& o) {
  return {.group_size = o.group_size,
          .window = o.window,
          .pool = static_cast<pooling>(o.pool),
          .core_heads = static_cast<cca::core_heads>(o.core_heads),
          .softmax_scale = o.softmax_scale,
          .first_position = o.first_position,
          .unit = typed(o.unit)};
}
cache_shape typed(const plain::cache_shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
}
erased_executor typed(const plain::executor& run) { return {run}; }
plain::workspace typed(const plain::workspace& workspace) { return workspace; }

template <class T>
constexpr plain::functions<T> functions{
    .attention = [](const auto&... all) { attention(typed(all)...); },
    .local_attention = [](const auto&... all) { local_attention(typed(all)...); },
    .dense_attention = [](const auto&... all) { dense_attention(typed(all)...); },
    .attend =
        [](const auto& query, const auto& key, const auto& value, const auto& far_key, const auto& far_value,
           const auto& seen, const auto&... rest) {
          attend(typed(query), typed(key), typed(value), far_context{typed(far_key), typed(far_value), typed(seen)},
                 typed(rest)...);
        },
    .pool = [](const auto&... all) { pool(typed(all)...); },
    .merge = [](const auto&... all) { merge(typed(all)...); },
    .workspace_size = [](const auto&... all) { return workspace_size(typed(all)...); },
    .attend_workspace_size =
        [](const auto& query, const auto& key, const auto& value, const auto& far_key, const auto& far_value,
           const auto& seen, const auto&... rest) {
          return workspace_size(typed(query), typed(key), typed(value),
                                far_context{typed(far_key), typed(far_value), typed(seen)}, typed(rest)...);
        },
    .attention_gradient = [](const auto&... all) { attention_gradient(typed(all)...); },
    .local_attention_gradient = [](const auto&... all) { local_attention_gradient(typed(all)...); },
    .dense_attention_gradient = [](const auto&... all) { dense_attention_gradient(typed(all)...); },
    .attend_gradient =
        [](const auto& query, const auto& key, const auto& value, const auto& far_key, const auto& far_value,
           const auto& seen, const auto&... rest) {
          attend_gradient(typed(query), typed(key), typed(value),
                          far_context{typed(far_key), typed(far_value), typed(seen)}, typed(rest)...);
        },
    .pool_gradient = [](const auto&... all) { pool_gradient(typed(all)...); },
    .gradient_workspace_size = [](const auto&... all) { return gradient_workspace_size(typed(all)...); },
    .attend_gradient_workspace_size =
        [](const auto& query, const auto& key, const auto& value, const auto& far_key, const auto& far_value,
           const auto& seen, const auto&... rest) {
          return gradient_workspace_size(typed(query), typed(key), typed(value),
                                         far_context{typed(far_key), typed(far_value), typed(seen)}, typed(rest)...);
        }};

template <class T>
kv_cache<T>& cache_at(void* cache) {
  return *static_cast<kv_cache<T>*>(cache);
}
template <class T>
const kv_cache<T>& cache_at(const void* cache) {
  return *static_cast<const kv_cache<T>*>(cache);
}

template <class T>
constexpr plain::cache_functions<T> cache_functions{
    .make = [](const plain::cache_shape& shape, const plain::options& options) -> void* {
      return new kv_cache<T>(typed(shape), typed(options));
    },
    .destroy = [](void* cache) { delete &cache_at<T>(cache); },
    .attend =
        [](void* cache, const auto& b, const auto&... all) {
          b ? cache_at<T>(cache).attend(*b, typed(all)...) : cache_at<T>(cache).attend(typed(all)...);
        },
    .append =
        [](void* cache, const auto& b, const auto&... all) {
          b ? cache_at<T>(cache).append(*b, typed(all)...) : cache_at<T>(cache).append(typed(all)...);
        },
    .truncate = [](void* cache, std::int64_t b, std::int64_t length) { cache_at<T>(cache).truncate(b, length); },
    .reset = [](void* cache, const auto& b) { b ? cache_at<T>(cache).reset(*b) : cache_at<T>(cache).reset(); },
    .fork = [](void* cache, std::int64_t from, std::int64_t to) { cache_at<T>(cache).fork(from, to); },
    .shape =
        [](const void* cache) {
          const cache_shape& s = cache_at<T>(cache).shape();
          return plain::cache_shape{s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
        },
    .settings =
        [](const void* cache) {
          const options& o = cache_at<T>(cache).options();
          return plain::options{
              o.group_size,    o.window,         static_cast<int>(o.pool), static_cast<int>(o.core_heads),
              o.softmax_scale, o.first_position, static_cast<int>(o.unit)};
        },
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
    .load = [](std::istream& stream, int unit) -> void* { return new kv_cache<T>(load<T>(stream, typed(unit))); }};

template <class T>
constexpr plain::kernels<T> kernels{functions<T>, cache_functions<T>};

}}}  // namespace cca::CCA_TARGET

extern "C" {
extern const cca::plain::architecture CCA_DISPATCH_TABLE(CCA_INSTRUCTION_SET);
// Constant-initialised: nothing of this object runs before it is chosen.
constinit const cca::plain::architecture CCA_DISPATCH_TABLE(CCA_INSTRUCTION_SET){
    CCA_NAME(CCA_INSTRUCTION_SET), cca::kernels<float>, cca::kernels<double>, cca::kernels<Eigen::bfloat16>,
    cca::kernels<Eigen::half>};
}
