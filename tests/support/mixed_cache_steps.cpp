#include "kv_cache_steps.hpp"

namespace cca::test {

template struct cache_steps<kv_cache<float, Eigen::bfloat16>>;
template struct cache_steps<kv_cache<float, Eigen::half>>;
template struct cache_steps<kv_cache<double, float>>;
template struct cache_steps<kv_cache<float, q8>>;

}  // namespace cca::test
