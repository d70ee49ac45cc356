#include "kv_cache_steps.hpp"

namespace cca::test {

template struct cache_steps<kv_cache<float, q8>>;
template struct cache_steps<kv_cache<q8>>;

}  // namespace cca::test
