#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "call.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "reference_operands.hpp"
#include "reference_pooling.hpp"
#include "tensor_view.hpp"

/// The textbook: attention and its gradients as their formulas read, one query after the other, O(length^2). In double it
/// is the oracle of the tests; in float it is what the error of the kernels is measured against. It checks nothing and
/// hides nothing: shapes and options are those of the entry points of the same name, which do the validation. Sequences with
/// lengths of their own are taken one after the other; in tensors of results zeros follow the rows of a shorter one.
namespace cca { inline namespace CCA_TARGET { namespace reference {

/// Scores of a query and keys: `x = scale q . k`, and with a softcap `cap tanh(x / cap)` in its place.
template <class Scalar>
vector<Scalar> scores(const matrix<Scalar>& keys, const vector<Scalar>& query, const options& options) {
  const vector<Scalar> x = static_cast<Scalar>(cca::detail::softmax_scale(options, keys.cols())) * (keys * query);
  const auto cap = static_cast<Scalar>(options.softcap);
  return cap > 0 ? vector<Scalar>(cap * (x / cap).array().tanh()) : x;
}

/// The sink logit of query `i`; where there is none, that of no weight.
template <class Scalar>
Scalar sink_logit(const lse_view<const Scalar>& sinks, std::int64_t b, std::int64_t h, std::int64_t i) {
  if (sinks.data == nullptr) return -std::numeric_limits<Scalar>::infinity();
  return *sinks.row(b % sinks.batch(), h, i % sinks.length());
}

/// What is known of rows beside their keys and values: their positions, and biases.
template <class Scalar>
struct row_terms {
  std::function<std::int64_t(std::int64_t b, std::int64_t h, std::int64_t j)> position;  ///< none: no distance counts
  std::function<Scalar(std::int64_t b, std::int64_t h, std::int64_t j)> bias;            ///< none: 0
};

/// A number per row, of query head `h` of `heads`, in a view that sequences and heads may share.
template <class T>
const T& shared(const lse_view<const T>& view, std::int64_t heads, std::int64_t b, std::int64_t h, std::int64_t j) {
  return *view.row(b % view.batch(), h / (heads / view.heads()), j);
}

/// Those of such views.
template <class Scalar>
std::function<Scalar(std::int64_t, std::int64_t, std::int64_t)> biases(lse_view<const Scalar> view,
                                                                       std::int64_t heads) {
  if (view.data == nullptr) return {};
  return [=](std::int64_t b, std::int64_t h, std::int64_t j) { return shared(view, heads, b, h, j); };
}

/// Numbers of rows.
using row_numbers = vector<std::int64_t>;

/// The first `count` rows.
inline row_numbers first_rows(std::int64_t count) {
  row_numbers rows(count);
  for (std::int64_t j = 0; j < count; ++j) rows(j) = j;
  return rows;
}

/// Those of `rows` that a condition holds for.
template <class Condition>
row_numbers rows_where(std::int64_t count, const Condition& holds) {
  row_numbers rows(count);
  std::int64_t some = 0;
  for (std::int64_t j = 0; j < count; ++j)
    if (holds(j)) rows(some++) = j;
  return rows.head(some);
}

/// `|t - position|` of the query at `t` and these rows.
template <class Scalar>
vector<Scalar> distances(const row_terms<Scalar>& terms, std::int64_t b, std::int64_t h, std::int64_t t,
                         const row_numbers& rows) {
  vector<Scalar> all = vector<Scalar>::Zero(rows.size());
  for (std::int64_t i = 0; i < rows.size() && terms.position; ++i)
    all(i) = static_cast<Scalar>(std::abs(t - terms.position(b, h, rows(i))));
  return all;
}

/// Adds to the scores of rows what is not of their keys: `x -= slope |t - position|`, `x += bias`.
template <class Scalar, class Scores>
void shift(Scores&& scores, const lse_view<const Scalar>& slopes, const row_terms<Scalar>& terms, std::int64_t b,
           std::int64_t h, std::int64_t t, const row_numbers& rows) {
  if (slopes.data != nullptr)
    scores -= *slopes.row(b % slopes.batch(), h, 0) * distances(terms, b, h, t, rows);
  for (std::int64_t i = 0; i < rows.size() && terms.bias; ++i) scores(i) += terms.bias(b, h, rows(i));
}

/// Of the raw tokens of a call.
template <class Scalar>
row_terms<Scalar> raw_terms(const operands<Scalar>& in) {
  return {[](std::int64_t, std::int64_t, std::int64_t j) { return j; }, biases(in.key_bias, in.query.heads())};
}

/// Of a caller's far rows.
template <class Scalar>
row_terms<Scalar> far_terms(const far_operands<Scalar>& context, std::int64_t query_heads) {
  row_terms<Scalar> terms{{}, biases(context.bias, query_heads)};
  if (context.positions.data != nullptr)
    terms.position = [positions = context.positions, heads = query_heads](
                         std::int64_t b, std::int64_t h, std::int64_t j) { return shared(positions, heads, b, h, j); };
  return terms;
}

/// Of cores, which lie where the last tokens of their groups do. They may have biases, `core_biases`.
template <class Scalar>
row_terms<Scalar> core_terms(const options& options, const tensor<Scalar>& of, std::int64_t heads) {
  const auto [batch, core_heads, groups, one] = of.extent;
  const lse_view<const Scalar> view = bhs(of.data.data(), batch, core_heads, groups);
  return {[partition = partition_of(options)](std::int64_t, std::int64_t, std::int64_t c) {
            return partition.group(c).end - 1;
          },
          biases(view, heads)};
}

/// The keys or the values that a query sees: the far rows `pooled`, then those of `tokens`.
template <class Scalar>
matrix<Scalar> seen_rows(const matrix<Scalar>& far_rows, const row_numbers& pooled, const matrix<Scalar>& rows,
                         const row_numbers& tokens) {
  matrix<Scalar> seen(pooled.size() + tokens.size(), rows.cols());
  for (std::int64_t i = 0; i < pooled.size(); ++i) seen.row(i) = far_rows.row(pooled(i));
  for (std::int64_t i = 0; i < tokens.size(); ++i) seen.row(pooled.size() + i) = rows.row(tokens(i));
  return seen;
}

/// The far rows that query `i` sees.
using seen_rows_of = std::function<row_numbers(std::int64_t b, std::int64_t h, std::int64_t i)>;
/// The tokens that query `i` sees raw.
using raw_tokens_of = std::function<row_numbers(std::int64_t i)>;

/// Attention of every query to the far rows `seen(b, h, i)` and the tokens `raw(i)`, in one softmax.
template <class Scalar>
result<Scalar> attend(const operands<Scalar>& in, tensor_view<const Scalar> far_key,
                      tensor_view<const Scalar> far_value, const options& options, const seen_rows_of& seen,
                      const raw_tokens_of& raw, const row_terms<Scalar>& far_at = {}) {
  const auto& query = in.query;
  const std::int64_t first = cca::detail::first_position(options, query.length(), in.key.length());
  const row_terms<Scalar> raw_at = raw_terms(in);
  const std::int64_t value_dim = in.value.dim();
  result<Scalar> result{{query.batch(), query.heads(), query.length(), value_dim},
                        {query.batch(), query.heads(), query.length(), 1}};
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv_head = h / (query.heads() / in.key.heads()),
                         far_head = h / (query.heads() / far_key.heads());
      const matrix<Scalar> q = head(query, b, h);
      const matrix<Scalar> k = head(in.key, b, kv_head), v = head(in.value, b, kv_head);
      const matrix<Scalar> fk = head(far_key, b, far_head), fv = head(far_value, b, far_head);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const row_numbers pooled = seen(b, h, i), tokens = raw(i);
        const matrix<Scalar> keys = seen_rows(fk, pooled, k, tokens), values = seen_rows(fv, pooled, v, tokens);
        vector<Scalar> weights = scores(keys, vector<Scalar>(q.row(i)), options);
        shift(weights.head(pooled.size()), in.alibi_slopes, far_at, b, h, first + i, pooled);
        shift(weights.tail(tokens.size()), in.alibi_slopes, raw_at, b, h, first + i, tokens);
        *result.lse.view().row(b, h, i) = softmax(weights, sink_logit(in.sink_logits, b, h, i));
        Eigen::Map<vector<Scalar>>(result.out.view().row(b, h, i), value_dim) = values.transpose() * weights;
      }
    }
  return result;
}

/// The tokens among the first `length` that the query at `t` sees raw: the first ones, and those of its window.
inline row_numbers raw_tokens(const partition& partition, std::int64_t t, std::int64_t length) {
  const range sinks = partition.sinks(t), window = partition.raw(t);
  const std::int64_t end = (std::min)(length, (std::max)(sinks.end, window.end));
  return rows_where(end, [&](std::int64_t j) { return sinks.contains(j) || window.contains(j); });
}

/// Those of each of the last `queries` queries, or of those from the options' first position on, to `keys` tokens.
inline raw_tokens_of raw_tokens(const options& options, std::int64_t queries, std::int64_t keys) {
  const std::int64_t first = cca::detail::first_position(options, queries, keys);
  return [partition = partition_of(options), first, keys](std::int64_t i) {
    return raw_tokens(partition, first + i, keys);
  };
}

/// None of the far rows.
inline row_numbers none_seen(std::int64_t, std::int64_t, std::int64_t) { return {}; }

/// The raw part of attention alone: the window, or with the default options every token up to the query's own.
template <class Scalar>
result<Scalar> local_attention(const operands<Scalar>& in, const options& options) {
  if (detail::have_lengths(in.query, in.key))
    return detail::each_alone(in.query, in.value.dim(),
                              [&](std::int64_t b) { return local_attention(detail::sequence_of(in, b), options); });
  return attend(in, in.key, in.value, options, none_seen, raw_tokens(options, in.query.length(), in.key.length()));
}
template <class Scalar, class Query, class Key, class Value, class Sink>
result<Scalar> local_attention(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  converter<Scalar> numbers;
  return local_attention(numbers(in), options);
}

/// `cca::attention`: cores, where something is pooled, then raw tokens.
template <class Scalar>
result<Scalar> attention(const operands<Scalar>& in, const options& options) {
  if (!cca::detail::pools(options)) return local_attention(in, options);
  if (detail::have_lengths(in.query, in.key))
    return detail::each_alone(in.query, in.value.dim(),
                              [&](std::int64_t b) { return attention(detail::sequence_of(in, b), options); });
  const auto cores = pool(in, options);
  const tensor<Scalar> biases = core_biases(in, options);
  return attend(
      in, cores.first.view(), cores.second.view(), options,
      [&](std::int64_t, std::int64_t, std::int64_t t) { return first_rows(partition_of(options).core_count(t)); },
      raw_tokens(options, in.query.length(), in.key.length()), core_terms(options, biases, in.query.heads()));
}
template <class Scalar, class Query, class Key, class Value, class Sink>
result<Scalar> attention(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  converter<Scalar> numbers;
  return attention(numbers(in), options);
}

/// The far rows that query i of head h sees, at position t: what none of `seen`, `visible_from`, `visible_until` and
/// `selected` keeps from it.
template <class Scalar>
seen_rows_of far_rows(const operands<Scalar>& in, const far_operands<Scalar>& context, const options& options) {
  const std::int64_t first = cca::detail::first_position(options, in.query.length(), in.key.length());
  return [context, heads = in.query.heads(), first](std::int64_t b, std::int64_t h, std::int64_t i) {
    const auto& [blocks, block_rows, block_queries] = context.selected;
    const std::int64_t t = first + i, most = blocks.data ? blocks.dim() : 0;
    const std::int64_t* list =
        blocks.data ? blocks.row(b % blocks.batch(), h / (heads / blocks.heads()), i / block_queries) : nullptr;
    const auto row_block = [rows = block_rows](std::int64_t j) { return j / rows; };
    const std::int64_t seen = context.seen.data ? *context.seen.row(b, h, i) : context.key.length();
    return rows_where(context.key.length(), [&](std::int64_t j) {
      if (j >= seen) return false;
      if (context.visible_from.data && t < shared(context.visible_from, heads, b, h, j)) return false;
      if (context.visible_until.data && t >= shared(context.visible_until, heads, b, h, j)) return false;
      return list == nullptr || std::find(list, list + most, row_block(j)) != list + most;
    });
  };
}

/// `cca::attend`: the caller's far rows, then raw tokens.
template <class Scalar>
result<Scalar> attend(const operands<Scalar>& in, const far_operands<Scalar>& context, const options& options) {
  if (detail::have_lengths(in.query, in.key, context.key))
    return detail::each_alone(in.query, in.value.dim(), [&](std::int64_t b) {
      return attend(detail::sequence_of(in, b), detail::sequence_of(context, b), options);
    });
  return attend(in, context.key, context.value, options, far_rows(in, context, options),
                raw_tokens(options, in.query.length(), in.key.length()), far_terms(context, in.query.heads()));
}
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class Bias>
result<Scalar> attend(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, Bias>& context,
                      const options& options) {
  converter<Scalar> numbers;
  return attend(numbers(in), numbers(context), options);
}

}}}  // namespace cca::CCA_TARGET::reference
