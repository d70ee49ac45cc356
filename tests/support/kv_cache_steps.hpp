#pragma once

// The steps of a cache, like entry_points.hpp; and what the tests of caches share.

#include "entry_points.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/kv_cache_file.hpp>
#include <optional>

namespace cca::test {

/// Tokens, `[batch, heads, count, dim]` each; keys and values may be rows of 8 bits with scales.
template <class T, class Row = T>
struct token_views {
  tensor_view<const T> query;
  tensor_view<const Row> key, value;
  lse_view<const T> sinks{}, slopes{};
  lse_view<const float> key_scales{}, value_scales{};

  [[nodiscard]] inputs<T, Row> in() const {
    return {query, key, value, sinks, slopes, {}, key_scales, value_scales};
  }

  [[nodiscard]] std::int64_t count() const { return query.length(); }
};

#if defined(CCA_TEST_THROUGH_DISPATCH)
/// Whose cores are of the type of its tokens.
template <class T = float, class Core = T>
requires std::is_same_v<T, Core>
using kv_cache = dispatch::kv_cache<T>;
#else
template <class T = float, class Core = T>
using kv_cache = cca::kv_cache<T, Core>;
#endif

template <class T, class Core = T>
kv_cache<T, Core> load(std::istream& stream, matrix_unit unit = matrix_unit::none) {
#if defined(CCA_TEST_THROUGH_DISPATCH)
  return dispatch::load<T>(stream, unit);
#else
  return cca::load<T, Core>(stream, unit);
#endif
}

/// Of tokens, queries and answers of a cache: floats where it rounds them to rows of 8 bits.
template <class Element>
using number_of = std::conditional_t<std::is_same_v<Element, q8>, float, Element>;

/// `cache.append` and `cache.attend`, for sequence `b` or for all: compiled once, in kv_cache_steps.cpp and, where cores are
/// of another type, in mixed_cache_steps.cpp.
template <class Cache, class Row = number_of<typename Cache::element_type>>
struct cache_steps {
  using T = number_of<typename Cache::element_type>;

  static void append(Cache& cache, std::optional<std::int64_t> b, const token_views<T, Row>& tokens,
                     const any_executor& run);
  static void attend(Cache& cache, std::optional<std::int64_t> b, const token_views<T, Row>& tokens,
                     tensor_view<T> out, lse_view<T> lse, const any_executor& run);
};

template <class Cache, class Row>
void cache_steps<Cache, Row>::append(Cache& cache, std::optional<std::int64_t> b, const token_views<T, Row>& tokens,
                                     const any_executor& run) {
  if constexpr (std::is_same_v<Row, T>)
    b ? cache.append(*b, tokens.query, tokens.key, tokens.value, run)
      : cache.append(tokens.query, tokens.key, tokens.value, run);
  else
    b ? cache.append(*b, tokens.in(), run) : cache.append(tokens.in(), run);
}

template <class Cache, class Row>
void cache_steps<Cache, Row>::attend(Cache& cache, std::optional<std::int64_t> b, const token_views<T, Row>& tokens,
                                     tensor_view<T> out, lse_view<T> lse, const any_executor& run) {
  const cca::results<T, T> to{out, lse};
  b ? cache.attend(*b, tokens.in(), to, run) : cache.attend(tokens.in(), to, run);
}

extern template struct cache_steps<kv_cache<float>>;
extern template struct cache_steps<kv_cache<double>>;
extern template struct cache_steps<kv_cache<q8>>;
extern template struct cache_steps<kv_cache<q8>, q8>;
#if !defined(CCA_TEST_THROUGH_DISPATCH)
extern template struct cache_steps<kv_cache<float, Eigen::bfloat16>>;
extern template struct cache_steps<kv_cache<float, Eigen::half>>;
extern template struct cache_steps<kv_cache<double, float>>;
extern template struct cache_steps<kv_cache<float, q8>>;
#endif

template <class Cache, class T, class Row>
void append(Cache& cache, const token_views<T, Row>& tokens, const any_executor& run = {}) {
  cache_steps<Cache, Row>::append(cache, {}, tokens, run);
}
template <class Cache, class T, class Row>
void append(Cache& cache, std::int64_t b, const token_views<T, Row>& tokens, const any_executor& run = {}) {
  cache_steps<Cache, Row>::append(cache, b, tokens, run);
}
template <class Cache, class T, class Row>
void attend(Cache& cache, const token_views<T, Row>& tokens, tensor_view<T> out, lse_view<T> lse,
            const any_executor& run = {}) {
  cache_steps<Cache, Row>::attend(cache, {}, tokens, out, lse, run);
}
template <class Cache, class T, class Row>
void attend(Cache& cache, std::int64_t b, const token_views<T, Row>& tokens, tensor_view<T> out, lse_view<T> lse,
            const any_executor& run = {}) {
  cache_steps<Cache, Row>::attend(cache, b, tokens, out, lse, run);
}

/// What a cache is made from.
struct cache_setup {
  cache_shape shape{};
  cca::options options{};

  template <class T = float, class Core = T>
  [[nodiscard]] kv_cache<T, Core> make() const {
    return {shape, options};
  }

  [[nodiscard]] std::int64_t value_dim() const { return shape.value_dim > 0 ? shape.value_dim : shape.dim; }

  /// Raw entries that a sequence of any length needs; with an unlimited window there is no such number.
  [[nodiscard]] std::int64_t raw_limit() const {
    return options.window == unlimited ? unlimited : options.window + options.group_size + 2 * shape.rewind;
  }

  /// Extents of `count` tokens of each sequence, or of one.
  [[nodiscard]] sizes step(std::int64_t batch, std::int64_t count) const {
    return {.batch = batch,
            .heads = shape.heads,
            .kv_heads = shape.kv_heads,
            .queries = count,
            .keys = count,
            .dim = shape.dim,
            .value_dim = value_dim()};
  }
};

inline std::string describe(const cache_setup& s) {
  return describe(s.step(s.shape.batch, 0)) + ", " + describe(s.options) + ", capacity " +
         std::to_string(s.shape.capacity) + ", rewind " + std::to_string(s.shape.rewind);
}

/// The tokens `part` of a view's.
template <class T, std::size_t Rank>
tensor_view<T, Rank> tokens_of(tensor_view<T, Rank> view, range part) {
  view.data += part.begin * view.stride[2];
  view.extent[2] = part.size();
  return view;
}

/// Sequence `b` of a view's.
template <class T, std::size_t Rank>
tensor_view<T, Rank> sequence_of(tensor_view<T, Rank> view, std::int64_t b) {
  view.data += b * view.stride[0];
  view.extent[0] = 1;
  return view;
}

/// `count` random tokens of each of `batch` sequences.
template <class T = float>
operands<T> random_tokens(const cache_setup& setup, std::int64_t batch, std::int64_t count, random_engine& random) {
  return random_operands<T>(setup.step(batch, count), random);
}

/// A setup in which nothing is left to symmetry: heads share keys, and dims differ.
inline cache_setup example_cache(const options& options, cache_shape shape = {}) {
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.dim = 5;
  shape.value_dim = 3;
  return {shape, options};
}

template <class T>
token_views<T> views_of(const operands<T>& all) {
  return {all.query.view(), all.key.view(), all.value.view()};
}

template <class T>
token_views<T> tokens_of(const operands<T>& all, range part) {
  return {tokens_of(all.query.view(), part), tokens_of(all.key.view(), part), tokens_of(all.value.view(), part)};
}

template <class T>
token_views<T> sequence_of(const token_views<T>& all, std::int64_t b) {
  return {sequence_of(all.query, b), sequence_of(all.key, b), sequence_of(all.value, b)};
}

template <class T, class Row>
sizes sizes_of(const token_views<T, Row>& tokens) {
  return {.batch = tokens.query.batch(),
          .heads = tokens.query.heads(),
          .kv_heads = tokens.key.heads(),
          .queries = tokens.count(),
          .keys = tokens.count(),
          .dim = tokens.query.dim(),
          .value_dim = tokens.value.dim()};
}

/// Tokens whose keys and values are rounded to rows of 8 bits, in any layout.
class rounded_tokens {
  struct rows {
    tensor<q8> elements;
    tensor<float, 3> scales;

    rows(const tensor_view<const float>& from, random_engine& random)
        : elements(from.extent, random_layout(random)),
          scales({from.batch(), from.heads(), from.length()}, random_layout(random)) {
      through::quantize(from, elements.view(), scales.view());
    }
  };

 public:
  rounded_tokens(const token_views<float>& tokens, random_engine& random)
      : query_(tokens.query), key_(tokens.key, random), value_(tokens.value, random) {}

  [[nodiscard]] token_views<float, q8> views() const {
    return {.query = query_,
            .key = key_.elements.view(),
            .value = value_.elements.view(),
            .key_scales = key_.scales.view(),
            .value_scales = value_.scales.view()};
  }

 private:
  tensor_view<const float> query_;
  rows key_, value_;
};

/// Results of a step in memory of their own.
template <class Cache, class T, class Row>
results<T> attend(Cache& cache, const token_views<T, Row>& tokens, const any_executor& run = {}) {
  return collect<T>(sizes_of(tokens),
                    [&](tensor_view<T> out, lse_view<T> lse) { attend(cache, tokens, out, lse, run); });
}
template <class Cache, class T, class Row>
results<T> attend(Cache& cache, std::int64_t b, const token_views<T, Row>& tokens, const any_executor& run = {}) {
  return collect<T>(sizes_of(tokens),
                    [&](tensor_view<T> out, lse_view<T> lse) { attend(cache, b, tokens, out, lse, run); });
}

/// Those of sequence `b` alone.
template <class T>
results<T> sequence_of(const results<T>& all, std::int64_t b) {
  const auto out = sequence_of(all.out.view(), b);
  const auto lse = sequence_of(all.lse.view(), b);
  results<T> one{tensor<T>(out.extent), tensor<T, 3>(lse.extent)};
  copy<T>(out, one.out.view());
  copy<T>(with_dim(lse), with_dim(one.lse.view()));
  return one;
}

/// All that a cache holds: equal for caches that answer alike from now on.
template <class Cache>
std::string content(const Cache& cache) {
  std::ostringstream stream;
  save(cache, stream);
  return std::move(stream).str();
}

}  // namespace cca::test
