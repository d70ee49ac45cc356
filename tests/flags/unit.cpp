// One source, compiled with many flags: UNIT names the function. It uses every part of the library, and nothing beside
// it whose inline functions two units could share.
#include "unit.hpp"

#include <Eigen/Core>
#include <cca/cca.hpp>
#include <cca/kv_cache_file.hpp>

namespace {

// The rounding of results and of what gradients are computed from, and the sums of a few dozen terms.
template <class T>
inline constexpr double tolerance = 1e-13;
template <>
inline constexpr double tolerance<float> = 1e-5;
template <>
inline constexpr double tolerance<Eigen::half> = 0x1p-9;
template <>
inline constexpr double tolerance<Eigen::bfloat16> = 0x1p-6;

template <class T>
void in(const float* tokens, std::iostream& stream, numbers& to) {
  constexpr std::int64_t group = 2, groups = length / group, size = length * dim, core_size = groups * dim;
  using number = cca::compute_type<T>;
  T data[size], out[size], core[2][core_size];
  for (std::int64_t i = 0; i < size; ++i) data[i] = cca::detail::element_cast<T>(tokens[i]);
  number lse[length], sink[1] = {0}, grad[3][size], far_grad[2][core_size], grad_core[core_size];
  for (std::int64_t i = 0; i < core_size; ++i) grad_core[i] = tokens[i];
  std::int64_t seen[length];
  for (std::int64_t i = 0; i < length; ++i) seen[i] = i / group;
  const auto tokens_of = [](auto* x) { return cca::bhsd(x, 1, 1, length, dim); };
  const auto cores_of = [](auto* x) { return cca::bhsd(x, 1, 1, groups, dim); };
  const auto view = tokens_of(static_cast<const T*>(data));
  const auto sums = cca::bhs(lse, 1, 1, length);
  const cca::inputs pooled{view, view, view};
  const cca::inputs inputs{view, view, view, cca::bhs(sink, 1, 1, 1)};
  const cca::results results{tokens_of(out), sums};
  const cca::cores cores{cores_of(core[0]), cores_of(core[1])};
  const cca::far_context far_context{cores.key, cores.value, cca::bhs(seen, 1, 1, length)};
  cca::gradients gradients{tokens_of(grad[0]), tokens_of(grad[1]), tokens_of(grad[2])};
  const auto grad_cores_view = cores_of(static_cast<const number*>(grad_core));
  const cca::cores grad_cores{grad_cores_view, grad_cores_view};
  const auto append = [&to](const auto& rows) {
    for (const auto x : rows) to.append(cca::detail::element_cast<double>(x), tolerance<T>);
  };
  const auto append_gradients = [&] {
    for (const auto& rows : grad) append(rows);
  };

  for (const auto pool : {cca::pooling::last_query, cca::pooling::mean, cca::pooling::max, cca::pooling::select,
                          cca::pooling::select_by_mass}) {
    const bool observed = pool == cca::pooling::select_by_mass;
    const cca::options pooling{.group_size = group, .window = observed ? 4 : cca::unlimited, .pool = pool};
    const cca::options options{.group_size = group, .window = 4, .pool = pool};
    cca::pool(pooled, cores, pooling);
    for (const auto& rows : core) append(rows);
    cca::attention(inputs, results, options, cca::thread_pool_executor(the_pool));
    append(out), append(lse);
    cca::attention_gradient(inputs, results, cca::incoming{view, sums}, gradients, options);
    append_gradients();
    cca::pool_gradient(pooled, grad_cores, gradients, pooling);
    append_gradients();
    cca::kv_cache<T> cache({.batch = 1, .heads = 1, .kv_heads = 1, .dim = dim}, options);
    cache.attend(inputs, results);
    append(out), append(lse);
    cca::save(cache, stream);
    to.append(static_cast<double>(cca::load<T>(stream).length()), 0);
  }
  cca::attend(inputs, far_context, results, {.window = 4});
  gradients.far_key = cores_of(far_grad[0]);
  gradients.far_value = cores_of(far_grad[1]);
  cca::attend_gradient(inputs, far_context, results, cca::incoming{view}, gradients, {.window = 4, .softcap = 3});
  append_gradients();
  for (const auto& rows : far_grad) append(rows);
  cca::merge(results, results, results);
  append(out), append(lse);
}

}  // namespace

unit UNIT;
void UNIT(const float* tokens, std::iostream& stream, numbers& to) {
  in<float>(tokens, stream, to);
  in<Eigen::bfloat16>(tokens, stream, to);
#if !defined(FEW_TYPES)
  in<double>(tokens, stream, to);
  in<Eigen::half>(tokens, stream, to);
#endif
}
