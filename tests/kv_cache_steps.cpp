// The kernels of the tests that include kv_cache_steps.hpp.

#include "kv_cache_steps.hpp"

namespace cca::test {

template <class T, class Core>
void append(kv_cache<T, Core>& cache, const token_views<T>& tokens, const any_executor& run) {
  cache.append(tokens.query, tokens.key, tokens.value, run);
}

template <class T, class Core>
void append(kv_cache<T, Core>& cache, std::int64_t b, const token_views<T>& tokens, const any_executor& run) {
  cache.append(b, tokens.query, tokens.key, tokens.value, run);
}

template <class T, class Core>
void attend(kv_cache<T, Core>& cache, const token_views<T>& tokens, tensor_view<T> out, lse_view<T> lse,
            const any_executor& run) {
  cache.attend({tokens.query, tokens.key, tokens.value, tokens.sinks, tokens.slopes}, {out, lse}, run);
}

template <class T, class Core>
void attend(kv_cache<T, Core>& cache, std::int64_t b, const token_views<T>& tokens, tensor_view<T> out, lse_view<T> lse,
            const any_executor& run) {
  cache.attend(b, {tokens.query, tokens.key, tokens.value, tokens.sinks, tokens.slopes}, {out, lse}, run);
}

template void append(kv_cache<float>&, const token_views<float>&, const any_executor&);
template void append(kv_cache<float>&, std::int64_t, const token_views<float>&, const any_executor&);
template void attend(kv_cache<float>&, const token_views<float>&, tensor_view<float>, lse_view<float>,
                     const any_executor&);
template void attend(kv_cache<float>&, std::int64_t, const token_views<float>&, tensor_view<float>, lse_view<float>,
                     const any_executor&);

template void append(kv_cache<float, Eigen::bfloat16>&, const token_views<float>&, const any_executor&);
template void append(kv_cache<float, Eigen::bfloat16>&, std::int64_t, const token_views<float>&, const any_executor&);
template void attend(kv_cache<float, Eigen::bfloat16>&, const token_views<float>&, tensor_view<float>, lse_view<float>,
                     const any_executor&);
template void attend(kv_cache<float, Eigen::bfloat16>&, std::int64_t, const token_views<float>&, tensor_view<float>,
                     lse_view<float>, const any_executor&);

template void append(kv_cache<float, Eigen::half>&, const token_views<float>&, const any_executor&);
template void append(kv_cache<float, Eigen::half>&, std::int64_t, const token_views<float>&, const any_executor&);
template void attend(kv_cache<float, Eigen::half>&, const token_views<float>&, tensor_view<float>, lse_view<float>,
                     const any_executor&);
template void attend(kv_cache<float, Eigen::half>&, std::int64_t, const token_views<float>&, tensor_view<float>,
                     lse_view<float>, const any_executor&);

template void append(kv_cache<double>&, const token_views<double>&, const any_executor&);
template void append(kv_cache<double>&, std::int64_t, const token_views<double>&, const any_executor&);
template void attend(kv_cache<double>&, const token_views<double>&, tensor_view<double>, lse_view<double>,
                     const any_executor&);
template void attend(kv_cache<double>&, std::int64_t, const token_views<double>&, tensor_view<double>, lse_view<double>,
                     const any_executor&);

template void append(kv_cache<double, float>&, const token_views<double>&, const any_executor&);
template void append(kv_cache<double, float>&, std::int64_t, const token_views<double>&, const any_executor&);
template void attend(kv_cache<double, float>&, const token_views<double>&, tensor_view<double>, lse_view<double>,
                     const any_executor&);
template void attend(kv_cache<double, float>&, std::int64_t, const token_views<double>&, tensor_view<double>,
                     lse_view<double>, const any_executor&);

}  // namespace cca::test
