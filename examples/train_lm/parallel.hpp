#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cca/executor.hpp>
#include <cstdint>
#include <unsupported/Eigen/CXX11/ThreadPool>

namespace train_lm {

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using column = Eigen::Array<T, Eigen::Dynamic, 1>;

/// The threads of the training: attention and the dense layers take turns with them.
using executor = cca::thread_pool_executor<Eigen::ThreadPool>;

/// Tokens that one task takes through a layer: enough to reuse each weight from cache, few enough to balance.
inline constexpr std::int64_t token_block = 256;

/// Rows of a weight's gradient that one task sums over all tokens.
inline constexpr std::int64_t row_block = 64;

/// Calls `f(first, count)` for the blocks that make up `[0, length)`. They do not depend on the number of threads, so
/// neither does any result.
template <class Function>
void for_blocks(const executor& run, std::int64_t length, std::int64_t block, const Function& f) {
  run((length + block - 1) / block, [&](std::int64_t i) { f(i * block, std::min(block, length - i * block)); });
}

}  // namespace train_lm
