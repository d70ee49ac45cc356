#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../cache_shape.hpp"
#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/validate.hpp"
#include "../detail/context/row_store.hpp"
#include "../detail/context/source.hpp"
#include "../detail/engine/plan.hpp"
#include "../detail/pool/pooler.hpp"
#include "../detail/softmax/score_rule.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../pooling.hpp"
#include "../tensor_view.hpp"
#include "agreement.hpp"
#include "cache_share.hpp"
#include "communicator.hpp"
#include "exchange.hpp"
#include "merge.hpp"
#include "prompt.hpp"
#include "rows.hpp"
#include "validate.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi {
/// A cache of keys and values across ranks, for decoding: each rank keeps every `ranks`-th core, one of them the sink tokens
/// and the raw tokens of the window as well. Every rank gives the same queries and tokens, answers for what it keeps, and
/// all get the joint answer, merged by log-sum-exps in the order of the ranks: the same bits on all of them.
///
/// What a step sends: the cores of the groups that it completes, from the rank of the window to their owners; and the
/// partial answers, `heads * (value_dim + 1)` numbers for each token and rank, and the joint ones back.
///
/// @tparam Element,Core  as for `cca::kv_cache`
/// All members but those that only ask are collective. Source: arXiv 2412.12465, section 3.4 (inference).
template <class Element = float, class Core = Element>
class kv_cache : private detail::cache_share<Element, Core> {
  using share = detail::cache_share<Element, Core>;
  using share::by, share::biased, share::has_window, share::group_count, share::shape_, share::options_, share::share_,
      share::core_heads_, share::length_, share::oldest_, share::held_, share::window_rank_;
  using typename share::sequence;
  static_assert(cca::detail::check_cache_elements<Element, Core>() && cca::detail::check_elements<Element, Core>());
  using T = compute_type<Element>;

 public:
  using element_type = Element;  ///< of keys and values

  /// @param ranks  outlives the cache
  /// @param shape  its sequences grow together; without `rewind` and `capacity`
  /// @param options  as for `cca::kv_cache`, without a matrix unit and the pooling `select_by_mass`
  /// @param window_rank  who keeps the window
  /// @throws std::invalid_argument  on every rank, where one refuses its arguments or two differ
  kv_cache(const communicator& ranks, const cache_shape& shape, const cca::options& options, int window_rank = 0)
      : share(shape, options, window_rank, {ranks.rank(), ranks.size()}), ranks_(&ranks) {
    detail::agreement same("kv_cache");
    detail::check_on_all_ranks(ranks, same, [&] {
      shape_ = cca::detail::complete(shape);
      if (shape_.rewind != 0)
        detail::refuse("shape.rewind", {shape_.rewind}, {"0: no token is taken back across ranks"});
      if (shape_.capacity != 0)
        detail::refuse("shape.capacity", {shape_.capacity}, {"0: memory is taken as tokens come"});
      if (window_rank < 0 || window_rank >= ranks.size())
        detail::refuse("window_rank", {window_rank}, {"one of ", ranks.size(), " ranks"});
      detail::require_options<Element>(options);
      detail::require_unobserved(options);
      detail::require_grouping(options);
      detail::require_causal(options, "a cache does not know the tokens to come");
      detail::require_unset(options, &cca::options::first_position, "a cache knows its positions");
      detail::require_unset(options, &cca::options::unit, "a step of decoding is bound by memory");
      same.add("window_rank", window_rank);
      same.add(options);
      same.add_elements<Element, Core>("elements of the cache");
      for (const auto& [name, value] : {named_number{"shape.batch", shape_.batch},
                                        {"shape.heads", shape_.heads},
                                        {"shape.kv_heads", shape_.kv_heads},
                                        {"shape.dim", shape_.dim},
                                        {"shape.value_dim", shape_.value_dim}})
        same.add(name, value);
    });
    this->begin();
  }

  /// Tokens of each sequence.
  [[nodiscard]] std::int64_t length() const { return length_; }
  /// Cores that this rank keeps of each sequence, per core head.
  [[nodiscard]] std::int64_t core_count() const { return share_.count(group_count(length_)); }
  /// Raw tokens that this rank keeps of each sequence, sink tokens among them.
  [[nodiscard]] std::int64_t raw_count() const {
    return has_window() ? by().sink_count(length_) + range{oldest_, length_}.size() : 0;
  }

  /// Appends the same number of tokens to every sequence and answers their queries. Every rank gives the same tokens: only
  /// the rank of the window reads `key` and `value`.
  ///
  /// @param in,to  as for `cca::kv_cache::attend`; the results are the same bits on all ranks
  /// @param run  an executor; the results are bitwise the same for any
  /// @throws std::invalid_argument  before anything changes, on every rank
  template <class Query = Element, class Sink = T, cca::detail::written Out = Element, class Lse = T>
  void attend(const inputs<Query, Element, Element, Sink>& in, const results<Out, Lse>& to, const execution& run = {}) {
    using Number = compute_type<Query, Element>;
    static_assert(std::is_same_v<Number, T> && std::is_same_v<std::remove_const_t<Sink>, T>,
                  "cca: queries and sink logits are of the type that the cache computes in, or of 16 bits");
    detail::agreement same("kv_cache::attend");
    detail::check_on_all_ranks(*ranks_, same, [&] {
      const auto views = detail::named(in);
      require_step(views);
      detail::require_results(views, shape_.value_dim, detail::named(to));
      same.add("new tokens", in.query.length());
      same.add("tokens in the cache", length_);
      same.add_elements<Query, Out, Lse>("elements of query, out and lse");
      same.add("sink_logits", detail::given(views.sink_logits), detail::yes_or_no);
      same.add_shared("alibi_slopes", in.alibi_slopes, detail::form_for_heads(in.alibi_slopes));
    });
    const std::int64_t tokens = in.query.length();
    if (tokens == 0 || shape_.batch == 0) return;
    if (has_window()) this->take_in(in);
    spread_new_cores(in, run);
    const detail::buffer<T> out(shape_.batch * shape_.heads * tokens * shape_.value_dim),
        lse(shape_.batch * shape_.heads * tokens);
    const results<T, T> part{bhsd(out.data(), shape_.batch, shape_.heads, tokens, shape_.value_dim),
                             bhs(lse.data(), shape_.batch, shape_.heads, tokens)};
    answer(in, part, run);
    detail::merge_over_ranks(*ranks_, part, to);
    length_ += tokens;
  }

  /// Takes over a prompt that lies across the ranks, which `attention` answers. The cache is empty. Every rank gives its own
  /// tokens: each keeps its share of the cores, and the rank of the window what later queries see.
  ///
  /// @param over  the cache's ranks in their order, by its communicator or another; the layout's sequences are the cache's, all
  ///   of one length
  /// @param in  as for `attention`
  /// @param run  an executor; the results are bitwise the same for any
  /// @throws std::invalid_argument  before anything changes, on every rank
  template <class Query = Element>
  void append(const context_parallel& over, const inputs<Query, Element, Element, T>& in, const execution& run = {}) {
    detail::agreement same("kv_cache::append");
    const std::int64_t tokens = over.tokens.sequences() > 0 ? over.tokens.length(0) : 0;
    detail::check_on_all_ranks(*ranks_, same, [&] {
      require_prompt(over, detail::named(in), tokens);
      same.add("layout", over.tokens.fingerprint(), detail::hidden_number);
      same.add("tokens in the cache", length_);
      same.add_elements<Query>("elements of query");
    });
    const context_parallel here{*ranks_, over.tokens, over.overlap};  // messages are the cache's
    if (detail::pools(options_)) {
      for (sequence& s : held_) this->reserve_cores(s, share_.count(group_count(tokens)));
      detail::gather_prompt_cores<Core>(here, in, options_, run,
                                        [&](std::int64_t q, std::int64_t c, const std::byte* from) {
                                          if (share_.owner(c) == share_.rank)
                                            this->take_core(held_[static_cast<std::size_t>(q)], c / share_.ranks, from);
                                        });
    }
    const range kept{detail::smaller(by().raw(tokens).begin, tokens), tokens};
    const std::int64_t sinks = by().sink_count(tokens);
    for (sequence& s : held_) {
      if (!has_window()) continue;
      s.sinks.reserve(sinks, unlimited);
      s.raw.reserve(kept.size(), unlimited);
    }
    detail::gather_prompt_tokens(here, in, sinks, kept, [&](std::int64_t q, std::int64_t t, const std::byte* from) {
      if (!has_window()) return;
      sequence& s = held_[static_cast<std::size_t>(q)];
      if (t < sinks) this->take_row(s.sinks, t, from);
      if (kept.contains(t)) this->take_row(s.raw, t - kept.begin, from);
    });
    oldest_ = kept.begin;
    length_ = tokens;
  }

 private:
  struct named_number {
    const char* name;
    std::int64_t value;
  };
  void require_step(const cca::detail::input_views& in) const {
    detail::require_operand(in.query);
    const std::int64_t tokens = in.query.length();
    if (in.query.has_lengths() || in.key.has_lengths())
      detail::refuse("query", {"lengths per sequence"}, {"as many tokens for each"});
    detail::require_extents(in.query, {shape_.batch, shape_.heads, tokens, shape_.dim});
    detail::require_key_value(in.query, in);
    detail::require_extents(in.key, {shape_.batch, shape_.kv_heads, tokens, shape_.dim});
    detail::require_extents(in.value, {shape_.batch, shape_.kv_heads, tokens, shape_.value_dim});
    detail::require_sink_logits(in.query, in.sink_logits);
    detail::require_alibi_slopes(in.query, in.alibi_slopes);
    detail::require_none(in.key_bias, "a cache keeps no biases of its tokens");
  }

  void require_prompt(const context_parallel& over, const cca::detail::input_views& in, std::int64_t tokens) const {
    if (!ranks_->alike(over.ranks))
      detail::refuse("ranks", {"a communicator of other ranks, or in another order"},
                     {"the cache's ranks in their order"});
    detail::require_layout(over);
    if (length_ != 0) detail::refuse("cache", {length_, " tokens"}, {"none: a prompt is taken over first"});
    if (over.tokens.sequences() != shape_.batch)
      detail::refuse("layout", {over.tokens.sequences(), " sequences"}, {"the cache's ", shape_.batch});
    for (std::int64_t q = 0; q < shape_.batch; ++q)
      if (over.tokens.length(q) != tokens)
        detail::refuse("layout", {over.tokens.length(q), " tokens in sequence ", q}, {tokens, ", as in sequence 0"});
    detail::require_operand(in.query);
    detail::require_key_value(in.query, in);
    const std::int64_t segments = over.tokens.segments_of(ranks_->rank()).size();
    detail::require_extents(in.query, {segments, shape_.heads, in.query.length(), shape_.dim});
    detail::require_extents(in.key, {segments, shape_.kv_heads, in.key.length(), shape_.dim});
    detail::require_extents(in.value, {segments, shape_.kv_heads, in.value.length(), shape_.value_dim});
    detail::require_segments(over, in.query);
    detail::require_segments(over, in.key);
    detail::require_none(in.sink_logits, "no query is answered");
    detail::require_none(in.alibi_slopes, "no query is answered");
    detail::require_none(in.key_bias, "a cache keeps no biases of its tokens");
  }

  /// The cores of the groups that the new tokens complete go to their owners.
  template <class Inputs>
  void spread_new_cores(const Inputs& in, const execution& run) {
    const range groups{group_count(length_), group_count(length_ + in.query.length())};
    if (groups.empty()) return;
    const std::int64_t row = core_heads_ * ((shape_.dim + shape_.value_dim) * static_cast<std::int64_t>(sizeof(Core)) +
                                            (biased() ? static_cast<std::int64_t>(sizeof(T)) : 0));
    // In the order of their owners, so that each gets one message.
    const detail::row_counts places(ranks_->size(), [&](int r) {
      const detail::core_share of_rank{r, ranks_->size()};
      return shape_.batch * (of_rank.count(groups.end) - of_rank.count(groups.begin));
    });
    const range mine = places.of(ranks_->rank());
    const detail::buffer<std::byte> rows((has_window() ? places.total() : mine.size()) * row);
    const detail::row_type type(row);
    if (has_window()) this->pool_new(in, groups, rows.data(), run);
    detail::check(MPI_Scatterv(rows.data(), places.counts(), places.begins(), type.get(),
                               has_window() ? MPI_IN_PLACE : static_cast<void*>(rows.data()),
                               static_cast<int>(mine.size()), type.get(), window_rank_, ranks_->get()),
                  "sending new cores to their owners");
    if (!has_window()) ranks_->received().cores += mine.size() * row;
    this->keep_cores(groups, rows.data() + (has_window() ? mine.begin * row : 0));
  }

  /// The part of the answer that this rank has: of its cores, and of the window where it has that.
  template <class Inputs>
  void answer(const Inputs& in, const results<T, T>& part, const execution& run) const {
    using Query = std::remove_const_t<typename decltype(in.query)::element_type>;
    using Product = cca::detail::product_type<Query, Element, Core>;
    const auto of = [this](std::int64_t b) -> const sequence& { return held_[static_cast<std::size_t>(b)]; };
    const auto each = [](std::int64_t count) { return [count](std::int64_t) { return count; }; };
    const auto at = [this](std::int64_t token) {
      return [=, this](std::int64_t, std::int64_t) {
        return cca::detail::row_terms<T>{{.first = token - length_, .step = 1}};
      };
    };
    const std::int64_t length = length_ + in.query.length(), window = has_window() ? length : 0;
    const std::int64_t core_heads = core_heads_, sharing = shape_.heads / core_heads_;
    const partition sees = by();
    const cca::detail::source sinks{
        shape_.kv_heads, each(sees.sink_count(window)),
        [=](std::int64_t b, std::int64_t h) { return of(b).sinks.rows(h, 0); },
        [=, this](std::int64_t, std::int64_t, std::int64_t i) { return sees.sinks(length_ + i); }, at(0)};
    const cca::detail::source cores{
        core_heads, each(share_.count(group_count(length))),
        [=](std::int64_t b, std::int64_t h) { return of(b).cores.rows(h, 0); },
        [=, this](std::int64_t, std::int64_t, std::int64_t i) {
          return range{0, share_.count(detail::pools(options_) ? sees.core_count(length_ + i) : 0)};
        },
        [=, this](std::int64_t b, std::int64_t h) {
          return cca::detail::row_terms<T>{share_.positions(sees, length_),
                                           biased() ? of(b).biases.key(h / sharing, 0) : nullptr, 1};
        }};
    const cca::detail::source raw{
        shape_.kv_heads, each(range{oldest_, window}.size()),
        [=](std::int64_t b, std::int64_t h) { return of(b).raw.rows(h, 0); },
        [=, this](std::int64_t, std::int64_t, std::int64_t i) { return shifted(sees.raw(length_ + i), -oldest_); },
        at(oldest_)};
    auto rule = cca::detail::make_score_rule<T>(options_, in, biased());
    if (!has_window()) rule.sink_logits = {};  // counted once
    const auto attend = [&](const auto&... sources) {
      const auto forward =
          cca::detail::plan<Product>({shape_.batch, true}, in.query, shape_.value_dim, shape_.kv_heads, {},
                                     !cca::detail::in_place<T, Element, Core>, options_.unit, run, sources.length...);
      cca::detail::scratch memory({}, forward.bytes());
      forward(in.query, part.out, part.lse, rule, run, memory, sources...);
    };
    if (has_window())
      attend(sinks, cores, raw);
    else
      attend(cores);
  }

  const communicator* ranks_;
};

}}}  // namespace cca::CCA_TARGET::mpi
