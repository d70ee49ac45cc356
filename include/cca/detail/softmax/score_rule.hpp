#pragma once

#include "../../options.hpp"
#include "../../tensor_view.hpp"
#include "../base/target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What happens between `q . k` and the softmax.
template <class T>
struct score_rule {
  T scale;                                ///< of `q . k`
  tensor_view<const T, 3> sink_logits{};  ///< `[1 or batch, heads, 1 or length]`; without data there are none
};

/// The rule that the options ask for, for queries and keys of `dim` elements.
template <class T>
score_rule<T> make_score_rule(const options& options, std::int64_t dim, tensor_view<const T, 3> sink_logits = {}) {
  return {static_cast<T>(softmax_scale(options, dim)), sink_logits};
}

}}}  // namespace cca::CCA_TARGET::detail
