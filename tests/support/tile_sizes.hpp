#pragma once

// Sizes of the kernels' tiles, which tests choose lengths around.

#include <cca/detail/simd/register_block.hpp>
#include <cstdint>

namespace cca::test {

/// The numbers of `detail::tile_shape`, and the width of a vector.
struct tile_sizes {
  std::int64_t width, lanes, block, least_stack, stack, gradient_block, gradient_stack;
};

namespace {  // of each translation unit its own, for which it is compiled

template <class T, class Shape = detail::tile_shape<T>>
constexpr tile_sizes own_tile_sizes{detail::width<T>, Shape::lanes,          Shape::block,         Shape::least_stack,
                                    Shape::stack,     Shape::gradient_block, Shape::gradient_stack};

}  // namespace

/// Those of the kernels that the entry points call.
template <class T>
tile_sizes tile();

#if !defined(CCA_TEST_THROUGH_DISPATCH)
template <class T>
tile_sizes tile() {
  return own_tile_sizes<T>;
}
#endif

}  // namespace cca::test

/// The sizes of one architecture of cca::dispatch, for float and double.
#define CCA_TILE_SIZES(architecture) CCA_TILE_SIZES_NAMED(architecture)
#define CCA_TILE_SIZES_NAMED(architecture) cca_tile_sizes_##architecture
