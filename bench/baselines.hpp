#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include <Eigen/Core>

#include <cca/options.hpp>
#include <cca/partition.hpp>
#include <cca/tensor_view.hpp>

/// What one would write with Eigen for the same result: matrix products over blocks of queries, a mask, a softmax.
namespace bench {

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class T>
auto as_matrix(cca::tensor_view<const T> view, std::int64_t b, std::int64_t h) {
  return Eigen::Map<const matrix<T>, 0, Eigen::OuterStride<>>(view.row(b, h, 0), view.length(), view.dim(),
                                                              Eigen::OuterStride<>(view.stride[2]));
}

template <class Rows>
void softmax_rows(Rows&& scores) {
  for (Eigen::Index i = 0; i < scores.rows(); ++i) {
    auto row = scores.row(i).array();
    row = (row - row.maxCoeff()).exp();
    row /= row.sum();
  }
}

/// CCA attention, one query for every key.
template <class T>
void eigen_attention(cca::tensor_view<const T> query, cca::tensor_view<const T> key, cca::tensor_view<const T> value,
                     cca::tensor_view<T> out, const cca::options& options) {
  const cca::partition partition = cca::partition_of(options);
  const std::int64_t length = key.length(), g = options.group_size, groups = partition.core_count(length - 1);
  const T scale = T(1) / std::sqrt(static_cast<T>(key.dim()));
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const auto q = as_matrix(query, b, h);
      const auto k = as_matrix(key, b, h / (query.heads() / key.heads()));
      const auto v = as_matrix(value, b, h / (query.heads() / key.heads()));
      matrix<T> core_key(groups, key.dim()), core_value(groups, value.dim()), scores;
      for (std::int64_t c = 0; c < groups; ++c) {
        scores.noalias() = scale * q.row((c + 1) * g - 1) * k.middleRows(c * g, g).transpose();
        softmax_rows(scores);
        core_key.row(c).noalias() = scores * k.middleRows(c * g, g);
        core_value.row(c).noalias() = scores * v.middleRows(c * g, g);
      }
      constexpr std::int64_t block = 128;
      for (std::int64_t first = 0; first < length; first += block) {
        const std::int64_t rows = std::min(block, length - first), last = first + rows - 1;
        const std::int64_t cores = partition.core_count(last), begin = partition.raw(first).begin;
        const std::int64_t near = last + 1 - begin;
        scores.resize(rows, cores + near);
        scores.leftCols(cores).noalias() = scale * q.middleRows(first, rows) * core_key.topRows(cores).transpose();
        scores.rightCols(near).noalias() = scale * q.middleRows(first, rows) * k.middleRows(begin, near).transpose();
        for (std::int64_t i = 0; i < rows; ++i) {
          const std::int64_t seen = partition.core_count(first + i);
          const cca::range raw = partition.raw(first + i);
          const auto hide = [&](std::int64_t from, std::int64_t to) {
            scores.row(i).segment(from, to - from).setConstant(-std::numeric_limits<T>::infinity());
          };
          hide(seen, cores + raw.begin - begin);
          hide(cores + raw.end - begin, cores + near);
        }
        softmax_rows(scores);
        Eigen::Map<matrix<T>, 0, Eigen::OuterStride<>> o(out.row(b, h, first), rows, value.dim(),
                                                         Eigen::OuterStride<>(out.stride[2]));
        o.noalias() = scores.leftCols(cores) * core_value.topRows(cores);
        o.noalias() += scores.rightCols(near) * v.middleRows(begin, near);
      }
    }
}

}  // namespace bench
