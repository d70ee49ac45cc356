#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/target.hpp"
#include "../detail/context/source.hpp"
#include "../detail/engine/backward.hpp"
#include "../detail/engine/bias_sums.hpp"
#include "../detail/engine/gradient_plan.hpp"
#include "../detail/pool/pooler.hpp"
#include "../detail/softmax/score_rule.hpp"
#include "../element.hpp"
#include "../gradient.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"
#include "plan.hpp"
#include "rank_call.hpp"
#include "rows.hpp"
#include "validate.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// Gradients of a number for each head that all ranks share: of this rank's queries, until they are added up.
template <class T>
struct shared_sums {
  buffer<T> numbers;
  tensor_view<T, 3> grad;

  shared_sums(const tensor_view<T, 3>& wanted, bool shared) : grad(wanted) {
    if (wanted.data == nullptr || !shared) return;
    numbers = buffer<T>(wanted.heads());
    grad = bhs(numbers.data(), 1, wanted.heads(), 1);
  }

  /// Collective, where the gradient is wanted: the same on all ranks.
  void finish(const communicator& ranks, const tensor_view<T, 3>& to) const {
    if (numbers.size() == 0) return;
    add_over_ranks(ranks, numbers.data(), numbers.size());
    for (std::int64_t h = 0; h < to.heads(); ++h) *to.row(0, h, 0) = numbers[h];
  }
};

/// Zeros for the gradients of rows, each segment its own, so that its queries can add to them beside those of others.
template <class T, class Tokens>
held_rows<T, T, T> zeros(std::int64_t segments, const Tokens& tokens, std::int64_t heads, std::int64_t dim,
                         std::int64_t value_dim, std::int64_t bias_heads) {
  return {row_places(segments, tokens), heads, dim, value_dim, bias_heads};
}

/// The backward pass of a rank: `attention_gradient` of its queries, whose gradients of halo and cores go home.
template <class T, class Call>
class rank_gradient {
 public:
  rank_gradient(const Call& of, bool bias_wanted)
      : call_(of),
        sinks_(zeros<T>(
            of.own.size(), [&](std::int64_t b) { return of.planned_of(b).sinks; }, of.in.key.heads(), of.in.key.dim(),
            of.in.value.dim(), bias_wanted ? of.in.key_bias.heads() : 0)),
        raw_(zeros<T>(
            of.own.size(), [&](std::int64_t b) { return of.planned_of(b).raw; }, of.in.key.heads(), of.in.key.dim(),
            of.in.value.dim(), bias_wanted ? of.in.key_bias.heads() : 0)),
        seen_cores_(zeros<T>(
            of.own.size(), [&](std::int64_t b) { return of.planned_of(b).cores; }, of.core_heads, of.in.key.dim(),
            of.in.value.dim(), of.biased ? of.core_heads : 0)),
        own_cores_(zeros<T>(
            of.own.size(), [&](std::int64_t b) { return of.planned_of(b).groups; }, of.core_heads, of.in.key.dim(),
            of.in.value.dim(), of.biased ? of.core_heads : 0)) {
    for (const auto* rows : {&sinks_, &raw_, &seen_cores_, &own_cores_}) rows->clear();
  }

  /// Of the queries of this rank, and of all that they see.
  template <class Element, class Results>
  void differentiate(const Results& results, const gradients<T>& to, const execution& run) const {
    const std::int64_t kv_heads = call_.in.key.heads();
    const auto plan = backward_plan<Element>(call_.in.query, call_.in.value.dim(), kv_heads, {}, Call::staged,
                                             call_.options.unit, run);
    const auto sums_for = [&](const held_rows<T, T, T>& rows) {
      return rows.bias.data == nullptr
                 ? bias_sums<T>{}
                 : bias_sums<T>(call_.own.size(), kv_heads, rows.bias.heads(), rows.bias.length());
    };
    const bias_sums<T> of_sinks = sums_for(sinks_), of_cores = sums_for(seen_cores_), of_raw = sums_for(raw_);
    scratch memory({}, plan.bytes() + of_sinks.bytes() + of_cores.bytes() + of_raw.bytes());
    const tensor_view<T, 3> sink_bias = of_sinks.take(memory), core_bias = of_cores.take(memory),
                            raw_bias = of_raw.take(memory);
    const auto rule = make_score_rule<T>(call_.options, call_.in, call_.biased || call_.in.key_bias.data != nullptr);
    const auto first = [this](std::int64_t b) { return call_.own[b].tokens.begin; };
    plan(results, to, rule, run, memory, source_gradient{call_.sink_source(first), sinks_.key, sinks_.value, sink_bias},
         source_gradient{call_.core_source(first), seen_cores_.key, seen_cores_.value, core_bias},
         source_gradient{call_.raw_source(first), raw_.key, raw_.value, raw_bias});
    if (sink_bias.data != nullptr) add_up(sink_bias, sinks_.bias, run);
    if (core_bias.data != nullptr) add_up(core_bias, seen_cores_.bias, run);
    if (raw_bias.data != nullptr) add_up(raw_bias, raw_.bias, run);
  }

  /// The gradients of cores go to where they are pooled, and from there to the tokens of their groups. Collective.
  void finish_cores(const gradients<T>& to, const execution& run) const {
    const piece_exchange home(call_.ranks, call_.planned, call_.planned.core_pieces_of(call_.ranks.rank()));
    bring_home(home, "bringing home gradients of cores", seen_cores_, own_cores_.key, own_cores_.value, own_cores_.bias,
               [this](std::int64_t b) { return own_cores_.places.first(b); });
    const auto plan = call_.pool_memory_plan(run);
    scratch memory({}, plan.bytes());
    const auto at = [](std::int64_t first, std::int64_t i) { return i - first; };
    add_group_gradients<T>(
        call_.heads(), [&](std::int64_t b) { return call_.planned_of(b).groups; },
        [&](std::int64_t b) { return call_.raw.places.first(b); }, call_.in.key.dim(), call_.in.value.dim(),
        call_.options, [&](std::int64_t b, std::int64_t h) { return rows_of(call_.raw.key, call_.raw.value, b, h); },
        [&](std::int64_t b, std::int64_t h) {
          return gradient_rows<T>{raw_.key.row(b, h, 0), raw_.key.stride[2], raw_.value.row(b, h, 0),
                                  raw_.value.stride[2]};
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t t) {
          return call_.in.query.row(b, h, at(call_.own[b].tokens.begin, t));
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t t) {
          return to.query.row(b, h, at(call_.own[b].tokens.begin, t));
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t c) {
          const std::int64_t i = at(own_cores_.places.first(b), c);
          return core_place{own_cores_.key.row(b, h, i), own_cores_.value.row(b, h, i),
                            call_.biased ? own_cores_.bias.row(b, h, i) : nullptr};
        },
        run, plan.take(memory));
  }

  /// The gradients of tokens go to who holds them. Collective.
  void finish_tokens(const gradients<T>& to, const execution& run) const {
    fill_zero(to.key, run);
    fill_zero(to.value, run);
    if (to.key_bias.data != nullptr) fill_zero(to.key_bias);
    bring_home(call_.tokens, "bringing home gradients of tokens", raw_, to.key, to.value, to.key_bias,
               [this](std::int64_t b) { return call_.own[b].tokens.begin; });
  }

 private:
  /// Adds to the gradients of what is held here, the first row of which is `first(b)`, what the readers have, one after the
  /// other.
  template <class Bias, class First>
  void bring_home(const piece_exchange& home, const char* doing, const held_rows<T, T, T>& read,
                  const tensor_view<T>& key, const tensor_view<T>& value, const Bias& bias, const First& first) const {
    call_.ranks.received().gradients += home.move(
        piece_exchange::direction::to_holders, bytes_of_row(read.key, read.value, read.bias), doing,
        [&](const piece& p, std::byte* to) {
          const std::int64_t b = call_.own.index(p.reader);
          const held_rows<T, T, T>& rows = p.in == piece::part::sinks ? sinks_ : read;
          put_rows(to, b, shifted(p.tokens, -rows.places.first(b)), rows.key, rows.value, rows.bias);
        },
        [&](const piece& p, const std::byte* from) {
          const std::int64_t b = call_.own.index(p.holder);
          add_rows(from, b, shifted(p.tokens, -first(b)), key, value, bias);
        });
  }

  const Call& call_;
  held_rows<T, T, T> sinks_, raw_;
  held_rows<T, T, T> seen_cores_,
      own_cores_;  ///< of the cores that queries here see, and of those that are pooled here
};

/// The backward pass of a rank. Collective. `shared_sinks`: sink logits are those of heads, not of queries.
template <class Element, class Call, class Out, class Lse, class GradOut, class GradLse, class T>
void differentiate_over_ranks(const Call& call, const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from,
                              const gradients<T>& to, bool shared_sinks, const execution& run) {
  const auto sized = [&](const auto& view) { return view.data == nullptr ? view : call.own.sized(view); };
  const auto results = results_of<compute_type<Element>>(
      call.in, cca::results<Out, Lse>{sized(of.out), sized(of.lse)},
      incoming<std::remove_const_t<GradOut>, std::remove_const_t<GradLse>>{sized(from.grad_out), sized(from.grad_lse)});
  gradients<T> grad{sized(to.query), sized(to.key), sized(to.value)};
  grad.key_bias = sized(to.key_bias);
  const shared_sums<T> sink_sums(to.sink_logits, shared_sinks), slope_sums(to.alibi_slopes, true);
  grad.sink_logits = shared_sinks ? sink_sums.grad : sized(to.sink_logits);
  grad.alibi_slopes = slope_sums.grad;

  call.exchange_tokens();
  if (call.pooled) {
    call.pool_own_groups(run);
    gathering cores = call.gather_cores();
    call.start_cores(cores);
    call.finish_cores(cores);
  }
  const rank_gradient<T, Call> gradient(call, given(to.key_bias));
  gradient.template differentiate<Element>(results, grad, run);
  if (call.pooled) gradient.finish_cores(grad, run);
  gradient.finish_tokens(grad, run);
  sink_sums.finish(call.ranks, to.sink_logits);
  slope_sums.finish(call.ranks, to.alibi_slopes);
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
