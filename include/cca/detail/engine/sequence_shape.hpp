#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/function_ref.hpp"
#include "../base/numbers.hpp"
#include "../context/tasks.hpp"
#include "few_queries.hpp"
#include "partial_result.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// How long a sequence is: its queries, per head, those of them that share lists, and the parts of its context, which few
/// queries' is cut into. `alone`: each head fills lanes of its own, which after a context of one part go as a stack.
struct sequence_shape {
  std::int64_t queries, block, parts;
  bool alone;

  [[nodiscard]] bool few() const { return queries <= smaller(most_few_queries, block) && !(alone && parts == 1); }
  /// Whether the few queries of each list go by themselves.
  [[nodiscard]] bool in_lists() const { return queries > block && block <= most_few_of_block; }

  /// Lists.
  [[nodiscard]] std::int64_t lists() const { return (queries + block - 1) / block; }
  /// Tasks of few queries, for each group of heads.
  [[nodiscard]] std::int64_t few_tasks() const { return few() && queries > 0 ? parts : 0; }
  /// Stacks of many queries of a head, if every tile, of so many lanes, were one of its own. How many tiles a stack has depends
  /// on the context, and a workspace is sized for more of that than some entry points have.
  [[nodiscard]] std::int64_t most_stacks(std::int64_t lanes) const {
    return (query_cuts(queries, block, lanes).items() + lanes - 1) / lanes;
  }
};
using shape_of_sequence = function_ref<sequence_shape(std::int64_t)>;

/// What few queries work with beside the scratch of each worker.
template <class T>
struct few_memory {
  shape_of_sequence measure;
  const task_list& tasks;
  const sequence_offsets& first;
  T* partials;
  std::int64_t value_dim;

  /// What the queries of sequence `b` have seen of a part, from the first of a head on.
  [[nodiscard]] few_results<T> results(std::int64_t b, const sequence_shape& s, std::int64_t head, std::int64_t part) const {
    const std::int64_t size = partial_result<T>::size(value_dim);
    return {partials + first[b] + (head * s.queries * s.parts + part) * size, s.parts * size, value_dim};
  }
};

/// Rows of a source that the last query of a sequence sees, at most.
template <class Source>
[[nodiscard]] std::int64_t seen_by_last(const Source& source, std::int64_t b, std::int64_t queries) {
  if (source.in_pieces() || queries == 0 || source.length(b) == 0) return source.most_seen(b);
  range seen;
  source.visible(b, 0, {queries - 1, queries}, {0, source.length(b)}, &seen);
  return seen.size();
}

}}}  // namespace cca::CCA_TARGET::detail
