// One source, compiled with many flags: UNIT names the function. It uses every part of the library, and nothing beside it
// whose inline functions two units could share.
#include "unit.hpp"

#include <Eigen/Core>
#include <cca/cca.hpp>
#include <cca/kv_cache_file.hpp>

namespace {

template <class T>
double sum(const T* x, std::int64_t n) {
  double total = 0;
  for (std::int64_t i = 0; i < n; ++i) total += cca::detail::element_cast<double>(x[i]);
  return total;
}

template <class T>
double in(const float* tokens, std::iostream& stream) {
  constexpr std::int64_t group = 2, groups = length / group, size = length * dim, core_size = groups * dim;
  using number = cca::compute_type<T>;
  T data[size], out[size], core[2][core_size];
  for (std::int64_t i = 0; i < size; ++i) data[i] = cca::detail::element_cast<T>(tokens[i]);
  number lse[length], sink[1] = {0}, grad[3][size], far_grad[2][core_size];
  std::int64_t seen[length];
  for (std::int64_t i = 0; i < length; ++i) seen[i] = i / group;
  const auto tokens_of = [](auto* x) { return cca::bhsd(x, 1, 1, length, dim); };
  const auto cores_of = [](auto* x) { return cca::bhsd(x, 1, 1, groups, dim); };
  const auto view = tokens_of(static_cast<const T*>(data));
  const auto sums = cca::bhs(lse, 1, 1, length);
  const cca::inputs inputs{view, view, view, cca::bhs(sink, 1, 1, 1)};
  const cca::results results{tokens_of(out), sums};
  const cca::cores cores{cores_of(core[0]), cores_of(core[1])};
  const cca::far_context far_context{cores.key, cores.value, cca::bhs(seen, 1, 1, length)};
  cca::gradients gradients{tokens_of(grad[0]), tokens_of(grad[1]), tokens_of(grad[2])};
  double total = 0;

  for (const auto pool : {cca::pooling::last_query, cca::pooling::mean, cca::pooling::max}) {
    const cca::options options{.group_size = group, .window = 4, .pool = pool, .softmax_scale = 0.5};
    cca::pool(inputs, cores, {.group_size = group, .pool = pool});
    total += sum(core[0], core_size) + sum(core[1], core_size);
    cca::attention(inputs, results, options, cca::thread_pool_executor(the_pool));
    total += sum(out, size) + sum(lse, length);
    cca::attention_gradient(inputs, results, cca::incoming{view, sums}, gradients, options);
    total += sum(grad[0], size) + sum(grad[1], size) + sum(grad[2], size);
    cca::kv_cache<T> cache({.batch = 1, .heads = 1, .kv_heads = 1, .dim = dim}, options);
    cache.attend(inputs, results);
    cca::save(cache, stream);
    total += sum(out, size) + static_cast<double>(cca::load<T>(stream).length());
  }
  cca::attend(inputs, far_context, results, {.window = 4});
  gradients.far_key = cores_of(far_grad[0]);
  gradients.far_value = cores_of(far_grad[1]);
  cca::attend_gradient(inputs, far_context, results, cca::incoming{view}, gradients, {.window = 4, .softcap = 3});
  cca::merge(results, results, results);
  return total + sum(out, size) + sum(far_grad[0], core_size) + sum(far_grad[1], core_size);
}

}  // namespace

double UNIT(const float* tokens, std::iostream& stream) {
  double total = in<float>(tokens, stream) + in<Eigen::bfloat16>(tokens, stream);
#if !defined(FEW_TYPES)
  total += in<double>(tokens, stream) + in<Eigen::half>(tokens, stream);
#endif
  return total;
}
