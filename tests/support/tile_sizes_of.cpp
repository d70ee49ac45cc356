// Compiled once for each architecture of cca::dispatch, CCA_ARCHITECTURE. No code is in it, which another processor could
// not run.

#include "tile_sizes.hpp"

extern "C" {
extern const cca::test::tile_sizes CCA_TILE_SIZES(CCA_ARCHITECTURE)[2];
constinit const cca::test::tile_sizes CCA_TILE_SIZES(CCA_ARCHITECTURE)[2]{cca::test::own_tile_sizes<float>,
                                                                          cca::test::own_tile_sizes<double>};
}
