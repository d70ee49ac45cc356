#include "tile_sizes.hpp"

#include <cca/dispatch.hpp>
#include <stdexcept>
#include <type_traits>

extern "C" {
#if defined(__x86_64__)
extern const cca::test::tile_sizes CCA_TILE_SIZES(sse2)[2], CCA_TILE_SIZES(sse4_2)[2], CCA_TILE_SIZES(avx2_fma)[2],
    CCA_TILE_SIZES(avx512)[2];
#else
extern const cca::test::tile_sizes CCA_TILE_SIZES(neon64)[2];
#endif
}

namespace cca::test {

template <class T>
tile_sizes tile() {
  const std::string_view used = dispatch::architecture();
  constexpr int of_type = std::is_same_v<T, float> ? 0 : 1;
#if defined(__x86_64__)
  if (used == "sse2") return CCA_TILE_SIZES(sse2)[of_type];
  if (used == "sse4_2") return CCA_TILE_SIZES(sse4_2)[of_type];
  if (used == "avx2_fma") return CCA_TILE_SIZES(avx2_fma)[of_type];
  if (used == "avx512") return CCA_TILE_SIZES(avx512)[of_type];
#else
  if (used == "neon64") return CCA_TILE_SIZES(neon64)[of_type];
#endif
  throw std::logic_error("no tile sizes of " + std::string(used));
}

template tile_sizes tile<float>();
template tile_sizes tile<double>();

}  // namespace cca::test
