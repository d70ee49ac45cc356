#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/target.hpp"
#include "../detail/context/source.hpp"
#include "../detail/engine/plan.hpp"
#include "../detail/pool/pooler.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../pooling.hpp"
#include "../tensor_view.hpp"
#include "communicator.hpp"
#include "exchange.hpp"
#include "layout.hpp"
#include "plan.hpp"
#include "rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// The segments of one rank.
class own_segments {
 public:
  own_segments(const layout& tokens, std::int64_t rank)
      : tokens_(&tokens), own_(tokens.segments_of(rank)), sizes_(own_.size() + 1) {
    for (std::int64_t b = 0; b < own_.size(); ++b) sizes_[b] = (*this)[b].tokens.size();
  }

  [[nodiscard]] std::int64_t size() const { return own_.size(); }
  /// Segment b of the rank, and its number among all.
  [[nodiscard]] const segment& operator[](std::int64_t b) const {
    return tokens_->segments()[static_cast<std::size_t>(own_.begin + b)];
  }
  [[nodiscard]] std::int64_t number(std::int64_t b) const { return own_.begin + b; }
  /// The other way round.
  [[nodiscard]] std::int64_t index(std::int64_t number) const { return number - own_.begin; }

  /// A view that says how long each segment is.
  template <class T, std::size_t Rank>
  [[nodiscard]] tensor_view<T, Rank> sized(const tensor_view<T, Rank>& view) const {
    if (view.has_lengths()) return view;
    return {view.data, view.extent, view.stride, nullptr, sizes_.data()};
  }

 private:
  const layout* tokens_;
  range own_;
  buffer<std::int64_t> sizes_;
};

/// Some queries of every segment: the same part of each.
class query_slice {
 public:
  query_slice(const own_segments& own, range queries) : own_(&own), bounds_(2 * own.size() + 2) {
    for (std::int64_t b = 0; b < own.size(); ++b) {
      begin(b) = smaller(queries.begin, own[b].tokens.size());
      end(b) = smaller(queries.end, own[b].tokens.size());
    }
  }

  /// The position of its first query in its sequence.
  [[nodiscard]] std::int64_t first_position(std::int64_t b) const { return (*own_)[b].tokens.begin + begin(b); }

  /// The rows of these queries. Makes a table of where they lie for each view that it is called for.
  template <class T, std::size_t Rank>
  [[nodiscard]] tensor_view<T, Rank> of(const tensor_view<T, Rank>& view) {
    if (view.data == nullptr) return view;
    const buffer<std::int64_t>& table = tables_.emplace_back(buffer<std::int64_t>(2 * own_->size() + 2));
    for (std::int64_t b = 0; b < own_->size(); ++b) {
      const std::int64_t before = view.begins != nullptr ? view.begins[b] : 0;
      table[b] = before + begin(b);
      table[own_->size() + 1 + b] = before + end(b);
    }
    return {view.data, view.extent, view.stride, table.data(), table.data() + own_->size() + 1};
  }

 private:
  [[nodiscard]] std::int64_t& begin(std::int64_t b) const { return bounds_[b]; }
  [[nodiscard]] std::int64_t& end(std::int64_t b) const { return bounds_[own_->size() + 1 + b]; }

  const own_segments* own_;
  buffer<std::int64_t> bounds_;
  std::vector<buffer<std::int64_t>> tables_;
};

/// Which of a rank's segments are of the same sequence, and how many cores of it are kept.
class own_sequences {
 public:
  own_sequences(const plan& of, const own_segments& own)
      : own_(&own), segment_(of.tokens().sequences()), cores_(of.tokens().sequences()) {
    fill_n(segment_.data(), segment_.size(), -1);
    fill_n(cores_.data(), cores_.size(), 0);
    for (std::int64_t b = 0; b < own.size(); ++b) {
      const segment_plan& planned = of[own.number(b)];
      segment_[own[b].sequence] = b;
      if (of.keeps_cores())
        cores_[own[b].sequence] = larger(cores_[own[b].sequence], larger(planned.cores.end, planned.groups.end));
    }
  }

  /// A segment of the rank that is of a sequence; -1 where none is.
  [[nodiscard]] std::int64_t segment_of(std::int64_t sequence) const { return segment_[sequence]; }
  /// Those up to the last that is seen or pooled on the rank.
  [[nodiscard]] std::int64_t cores_of(std::int64_t sequence) const { return cores_[sequence]; }

  /// Where they are: segments of one sequence share them, and see those that the plan says.
  [[nodiscard]] row_places core_places(const plan& of) const {
    return row_places::shared(
        own_->size(), segment_.size(), [&](std::int64_t b) { return (*own_)[b].sequence; },
        [&](std::int64_t q) { return cores_[q]; }, [&](std::int64_t b) { return of[own_->number(b)].cores.end; });
  }

 private:
  const own_segments* own_;
  buffer<std::int64_t> segment_, cores_;
};

/// What one rank does of a call: it gets the tokens that its queries see, pools its groups, gives their cores to all, and
/// answers. `Element` is the operands' `product_type`, `Core` what cores are kept in.
template <class Element, class Core, class Query, class Key, class Value, class Sink>
class rank_call {
  using T = compute_type<Element>;

 public:
  const communicator& ranks;
  const plan& planned;
  cca::options options;
  own_segments own;
  own_sequences sequences_here;
  inputs<Query, Key, Value, Sink> in;
  std::int64_t core_heads;
  bool pooled, biased;  ///< whether queries see cores, and whether these have biases
  held_rows<Key, Value, Sink> sinks, raw;
  held_rows<Core, Core, T> cores;  ///< of each sequence; segments of one share them
  piece_exchange tokens;

  rank_call(const communicator& comm, const plan& of, const inputs<Query, Key, Value, Sink>& operands,
            const cca::options& by)
      : ranks(comm),
        planned(of),
        options(by),
        own(of.tokens(), comm.rank()),
        sequences_here(of, own),
        in{own.sized(operands.query), own.sized(operands.key), own.sized(operands.value),
           operands.sink_logits,      operands.alibi_slopes,   operands.key_bias},
        core_heads(core_head_count(by, in.query.heads(), in.key.heads())),
        pooled(of.keeps_cores()),
        biased(pooled && has_core_biases(by)),
        sinks(row_places(own.size(), [&](std::int64_t b) { return planned_of(b).sinks; }), in.key.heads(), in.key.dim(),
              in.value.dim(), in.key_bias.heads()),
        raw(row_places(own.size(), [&](std::int64_t b) { return planned_of(b).raw; }), in.key.heads(), in.key.dim(),
            in.value.dim(), in.key_bias.heads()),
        cores(sequences_here.core_places(of), core_heads, in.key.dim(), in.value.dim(), biased ? core_heads : 0),
        tokens(comm, of, of.pieces_of(comm.rank())) {
    if (in.key_bias.data != nullptr) in.key_bias = own.sized(in.key_bias);
    if (in.sink_logits.data != nullptr && in.sink_logits.length() != 1) in.sink_logits = own.sized(in.sink_logits);
  }

  [[nodiscard]] const segment_plan& planned_of(std::int64_t b) const { return planned[own.number(b)]; }

  /// Gets what the queries see raw, and gives what others see. Collective.
  void exchange_tokens() const {
    ranks.received().raw += tokens.move(
        piece_exchange::direction::to_readers, bytes_of_row(in.key, in.value, in.key_bias),
        "exchanging the tokens of windows",
        [&](const piece& p, std::byte* to) {
          const std::int64_t b = own.index(p.holder), first = own[b].tokens.begin;
          put_rows(to, b, shifted(p.tokens, -first), in.key, in.value, in.key_bias);
        },
        [&](const piece& p, const std::byte* from) {
          const std::int64_t b = own.index(p.reader);
          const auto& rows = p.in == piece::part::sinks ? sinks : raw;
          take_rows(from, b, shifted(p.tokens, -rows.places.first(b)), rows.key, rows.value, rows.bias);
        });
  }

  /// Pools the groups that are this rank's, to where `core(b, h, group)` says.
  template <class Place>
  void pool_own_groups(const execution& run, const Place& core) const {
    const auto plan = pool_memory_plan(run);
    scratch memory({}, plan.bytes());
    pool_groups<T>(
        heads(), [&](std::int64_t b) { return planned_of(b).groups; }, in.key.dim(), in.value.dim(), options,
        [&](auto& pooling, std::int64_t b, std::int64_t h, range group) {
          pooling.absorb(rows_of(raw.key, raw.value, b, h), shifted(group, -raw.places.first(b)));
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t t) { return in.query.row(b, h, t - own[b].tokens.begin); },
        core, run, plan.take(memory));
  }
  void pool_own_groups(const execution& run) const {
    pool_own_groups(run, [&](std::int64_t b, std::int64_t h, std::int64_t c) {
      return core_place{cores.key.row(b, h, c), cores.value.row(b, h, c), biased ? cores.bias.row(b, h, c) : nullptr};
    });
  }

  /// Of pooling, or of its gradient.
  [[nodiscard]] pool_plan<T> pool_memory_plan(const execution& run) const {
    const std::int64_t tasks = task_list::size(
        {own.size(), false}, in.key.heads(), [&](std::int64_t b) { return planned_of(b).groups.size(); },
        [&](std::int64_t) { return groups_per_task(options.group_size); });
    return {worker_count(run, tasks), group_rows<T>::size(in.key.dim(), in.value.dim(), !in_place<T, Key, Value>),
            own.size()};
  }
  [[nodiscard]] pool_heads heads() const { return {{own.size(), false}, in.query.heads(), in.key.heads(), core_heads}; }

  /// The cores that others see, on their way: `finish_cores` takes in those of others.
  [[nodiscard]] gathering gather_cores() const {
    return gathering(ranks, planned.tokens(), bytes_of_row(cores.key, cores.value, cores.bias),
                     [&](std::int64_t i) { return planned[i].sent.size(); });
  }
  void start_cores(gathering& all) const {
    std::byte* to = all.own();
    for (std::int64_t b = 0; b < own.size(); ++b)
      to = put_rows(to, b, planned_of(b).sent, cores.key, cores.value, cores.bias);
    all.start();
  }
  void finish_cores(gathering& all) const {
    all.finish([this](std::int64_t i, const std::byte* rows) {
      const segment& s = planned.tokens().segments()[static_cast<std::size_t>(i)];
      const std::int64_t b = sequences_here.segment_of(s.sequence);
      if (s.rank == ranks.rank() || b < 0) return;
      // Others may see more of the sequence than this rank does.
      const range sent = planned[i].sent, kept{sent.begin, smaller(sent.end, sequences_here.cores_of(s.sequence))};
      take_rows(rows, b, kept, cores.key, cores.value, cores.bias);
    });
  }

  /// @{
  /// What the queries see, the first of which are at the positions `first(b)`, as sources: sink tokens, cores and the other
  /// raw tokens. They refer to the call.
  template <class First>
  [[nodiscard]] auto sink_source(const First& first) const {
    return token_source(
        sinks, first, [by = partition_of(options)](std::int64_t t) { return by.sinks(t); },
        [this](std::int64_t b) { return planned_of(b).sinks; });
  }
  template <class First>
  [[nodiscard]] auto raw_source(const First& first) const {
    return token_source(
        raw, first, [by = partition_of(options)](std::int64_t t) { return by.raw(t); },
        [this](std::int64_t b) { return planned_of(b).raw; });
  }
  template <class First>
  [[nodiscard]] auto core_source(const First& first) const {
    const partition by = partition_of(options);
    return view_source(
        cores.key, cores.value,
        [by, key = cores.key, first](std::int64_t b, std::int64_t, std::int64_t i) {
          return range{0, smaller(by.core_count(first(b) + i), key.length(b))};
        },
        terms_of([by, first](std::int64_t b) { return core_positions(by, first(b)); },
                 tensor_view<const T, 3>(cores.bias), in.query.heads()));
  }
  /// @}

  /// Whether elements are converted where kernels read them.
  static constexpr bool staged = !in_place<T, Key, Value, Core>;

 private:
  template <class Rows, class First, class Which, class Held>
  [[nodiscard]] auto token_source(const Rows& rows, const First& first, const Which& which, const Held& held) const {
    return view_source(
        rows.key, rows.value,
        [=, &rows](std::int64_t b, std::int64_t, std::int64_t i) {
          const range seen = intersection(which(first(b) + i), held(b));
          return seen.empty() ? range{} : shifted(seen, -rows.places.first(b));
        },
        terms_of(
            [=, &rows](std::int64_t b) { return row_positions{.first = rows.places.first(b) - first(b), .step = 1}; },
            tensor_view<const Sink, 3>(rows.bias), in.query.heads()));
  }
};

}}}}  // namespace cca::CCA_TARGET::mpi::detail
