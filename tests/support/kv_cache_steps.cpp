#include "kv_cache_steps.hpp"

namespace cca::test {

template struct cache_steps<kv_cache<float>>;
template struct cache_steps<kv_cache<double>>;
template struct cache_steps<kv_cache<q8>>;
template struct cache_steps<kv_cache<q8>, q8>;

}  // namespace cca::test
