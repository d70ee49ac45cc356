#pragma once

// The textbook of integers of 8 bits: the formulas, of numbers that are rounded to them. Queries, keys and values are
// rounded row by row; weights, in the scales of their values, relative to the largest of a block of rows.

#include "textbooks.hpp"

namespace cca::test {

/// The scale of a row: its largest element is 127 of them.
template <class Row>
float byte_scale_of(const Row& row) {
  return std::max(row.cwiseAbs().maxCoeff(), 0x1p-64f) / 127.0f;
}

/// A row as bytes stand for it.
template <class Row>
reference::vector<float> rounded_to_bytes(const Row& row) {
  const float scale = byte_scale_of(row);
  return (row / scale).array().round() * scale;
}

inline reference::matrix<float> rows_rounded_to_bytes(reference::matrix<float> rows) {
  for (Eigen::Index j = 0; j < rows.rows(); ++j) rows.row(j) = rounded_to_bytes(rows.row(j)).transpose();
  return rows;
}

/// Adds weighted values, block by block of rows.
inline void add_byte_weighted(const reference::vector<float>& logits, const reference::row_numbers& rows,
                              const reference::matrix<float>& values, float lse, reference::vector<float>& out) {
  constexpr std::int64_t block = detail::eight_bits::shape::block;
  for (Eigen::Index begin = 0, end = 0; begin < rows.size(); begin = end) {
    while (end < rows.size() && rows(end) / block == rows(begin) / block) ++end;
    reference::vector<float> weights(end - begin);  // of bytes, not of values
    for (Eigen::Index j = begin; j < end; ++j)
      weights(j - begin) = std::exp(logits(j) - lse) * byte_scale_of(values.row(rows(j)));
    const float unit = weights.maxCoeff() / 255.0f;
    if (unit == 0.0f) continue;
    for (Eigen::Index j = begin; j < end; ++j) {
      const auto value = values.row(rows(j));
      out += std::round(weights(j - begin) / unit) * unit / byte_scale_of(value) * rounded_to_bytes(value);
    }
  }
}

/// Of rows before the raw tokens, whatever they are: as `reference::attend`.
inline reference::result<float> byte_textbook_of(const reference::operands<float>& in,
                                                 const tensor_view<const float>& far_key,
                                                 const tensor_view<const float>& far_value, const options& o,
                                                 const reference::seen_rows_of& seen,
                                                 const reference::row_terms<float>& far_terms) {
  using reference::head;
  using vector = reference::vector<float>;
  const auto& query = in.query;
  reference::result<float> result{{query.batch(), query.heads(), query.length(), in.value.dim()},
                                  {query.batch(), query.heads(), query.length(), 1}};
  const auto near_terms = reference::raw_terms(in);
  const auto raw = reference::raw_tokens(o, query.length(), in.key.length());
  const std::int64_t first = detail::first_position(o, query.length(), in.key.length());
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv = h / (query.heads() / in.key.heads()), fh = h / (query.heads() / far_key.heads());
      const auto q = rows_rounded_to_bytes(head(query, b, h)), k = rows_rounded_to_bytes(head(in.key, b, kv));
      const auto fk = rows_rounded_to_bytes(head(far_key, b, fh));
      const reference::matrix<float> v = head(in.value, b, kv), fv = head(far_value, b, fh);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const reference::row_numbers near_rows = raw(i), far_rows = seen(b, h, i);
        float& lse = *result.lse.view().row(b, h, i);
        lse = reference::sink_logit(in.sink_logits, b, h, i);
        if (far_rows.size() + near_rows.size() == 0) continue;
        const vector x = reference::scores(reference::seen_rows(fk, far_rows, k, near_rows), vector(q.row(i)), o);
        vector of_far = x.head(far_rows.size()), of_near = x.tail(near_rows.size());
        reference::shift(of_far, in.alibi_slopes, far_terms, b, h, first + i, far_rows);
        reference::shift(of_near, in.alibi_slopes, near_terms, b, h, first + i, near_rows);
        const float sink = lse, maximum = std::max(std::max(of_far.size() ? of_far.maxCoeff() : sink, sink),
                                                   of_near.size() ? of_near.maxCoeff() : sink);
        lse = maximum + std::log((of_far.array() - maximum).exp().sum() + (of_near.array() - maximum).exp().sum() +
                                 std::exp(sink - maximum));
        vector out = vector::Zero(v.cols());
        add_byte_weighted(of_far, far_rows, fv, lse, out);
        add_byte_weighted(of_near, near_rows, v, lse, out);
        std::copy_n(out.data(), out.size(), result.out.view().row(b, h, i));
      }
    }
  return result;
}

/// Of a call, as `textbook_attention`.
template <class Inputs, class Context>
reference::result<float> byte_textbook(const problem& p, const Inputs& inputs, const Context& context) {
  reference::converter<float> numbers;
  const reference::operands<float> in = numbers(inputs);
  const options& o = p.options;
  if (p.entry == entry::attend) {
    const reference::far_operands<float> far_rows = numbers(context);
    return byte_textbook_of(in, far_rows.key, far_rows.value, o, reference::far_rows(in, far_rows, o),
                            reference::far_terms(far_rows, in.query.heads()));
  }
  if (p.entry != entry::attention) return byte_textbook_of(in, in.key, in.value, o, reference::none_seen, {});
  const auto cores = reference::pool(in, o);
  const auto biases = reference::core_biases(in, o);
  const partition partition = partition_of(o);
  return byte_textbook_of(
      in, cores.first.view(), cores.second.view(), o,
      [&](std::int64_t, std::int64_t, std::int64_t t) { return reference::first_rows(partition.core_count(t)); },
      reference::core_terms(o, biases, in.query.heads()));
}

}  // namespace cca::test
