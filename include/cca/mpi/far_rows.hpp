#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../detail/base/validate.hpp"
#include "../detail/context/far_visible.hpp"
#include "../detail/context/source.hpp"
#include "../detail/context/sources.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"
#include "forward.hpp"
#include "rank_call.hpp"
#include "rows.hpp"
#include "validate.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// How many far rows each segment has, and where they lie among those of its sequence: in the order of the tokens.
class far_counts {
 public:
  /// Collective.
  far_counts(const context_parallel& over, const named_view& key)
      : tokens_(&over.tokens),
        own_(over.tokens.segments_of(over.ranks.rank())),
        rows_(std::ssize(over.tokens.segments())),
        before_(rows_.size()),
        of_sequence_(over.tokens.sequences()),
        own_totals_(own_.size() + 1) {
    const row_counts segments(over.ranks.size(), [&](int r) { return over.tokens.segments_of(r).size(); });
    for (std::int64_t b = 0; b < own_.size(); ++b)
      rows_[own_.begin + b] = key.has_lengths() ? key.length(b) : key.length();
    check(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_INT64_T, rows_.data(), segments.counts(), segments.begins(), MPI_INT64_T,
                         over.ranks.get()),
          "counting far rows");
    over.ranks.received().compared += (rows_.size() - own_.size()) * static_cast<std::int64_t>(sizeof(std::int64_t));
    fill_n(before_.data(), before_.size(), 0);
    for (std::int64_t q = 0; q < over.tokens.sequences(); ++q) {
      of_sequence_[q] = 0;
      over.tokens.for_each_holder(q, {0, over.tokens.length(q)}, [&](std::int64_t i, range) {
        before_[i] = of_sequence_[q];
        of_sequence_[q] += rows_[i];
      });
    }
    for (std::int64_t b = 0; b < own_.size(); ++b) own_totals_[b] = of_sequence_[sequence(own_.begin + b)];
  }

  [[nodiscard]] std::int64_t rows(std::int64_t i) const { return rows_[i]; }
  [[nodiscard]] std::int64_t before(std::int64_t i) const { return before_[i]; }
  [[nodiscard]] std::int64_t of_sequence(std::int64_t q) const { return of_sequence_[q]; }

  /// The view of a rank's rows as if each segment had all of its sequence, for who looks at lengths.
  [[nodiscard]] named_view all_rows(const named_view& own) const {
    named_view all = own;
    all.begins = nullptr;
    all.ends = own_totals_.data();
    all.extent[2] = 0;
    for (std::int64_t b = 0; b < own_.size(); ++b) all.extent[2] = larger(all.extent[2], own_totals_[b]);
    return all;
  }

 private:
  [[nodiscard]] std::int64_t sequence(std::int64_t i) const {
    return tokens_->segments()[static_cast<std::size_t>(i)].sequence;
  }

  const layout* tokens_;
  range own_;
  buffer<std::int64_t> rows_, before_, of_sequence_, own_totals_;
};

/// A number per far row of every sequence that is here, if the caller gives some.
template <class T>
struct far_numbers {
  buffer<T> memory;
  tensor_view<T, 3> view{};

  far_numbers(const row_places& places, const tensor_view<const T, 3>& given) {
    view.extent[1] = given.heads();
    if (given.heads() == 0) return;
    memory = buffer<T>(given.heads() * places.rows());
    view = places.view(memory.data(), given.heads());
  }
};

/// A caller's far rows, of which each segment has some: all of them are gathered.
template <class Call, class Key, class Value, class Bias>
class spread_far_rows {
  using T = compute_type<Key, Value>;

 public:
  static constexpr bool staged = true;
  static constexpr std::int64_t queries_at_once = queries_between_progress;

  spread_far_rows(const Call& of, const far_counts& counts, const far_context<Key, Value, Bias>& context)
      : call_(of),
        counts_(counts),
        own_(context),
        rows_(row_places::shared(
                  of.own.size(), of.planned.tokens().sequences(), [&](std::int64_t b) { return of.own[b].sequence; },
                  [&](std::int64_t q) { return of.sequences_here.segment_of(q) >= 0 ? counts.of_sequence(q) : 0; },
                  [&](std::int64_t b) { return counts.of_sequence(of.own[b].sequence); }),
              context.key.heads(), context.key.dim(), context.value.dim(), context.bias.heads()),
        positions_(rows_.places, context.positions),
        from_(rows_.places, context.visible_from),
        until_(rows_.places, context.visible_until),
        all_(of.ranks, of.planned.tokens(),
             bytes_of_row(own_.key, own_.value, own_.bias, own_.positions, own_.visible_from, own_.visible_until),
             [&](std::int64_t i) { return counts.rows(i); }) {
    context_.key = rows_.key;
    context_.value = rows_.value;
    context_.seen = context.seen.data == nullptr ? context.seen : of.own.sized(context.seen);
    context_.bias = rows_.bias;
    context_.positions = positions_.view;
    context_.visible_from = from_.view;
    context_.visible_until = until_.view;
    context_.selected = context.selected;
  }

  [[nodiscard]] bool given() const { return true; }
  [[nodiscard]] bool biased() const { return context_.bias.data != nullptr; }
  [[nodiscard]] std::int64_t head_groups() const { return gcd(call_.in.key.heads(), context_.key.heads()); }
  [[nodiscard]] piece_form pieces() const { return pieces_of(call_.in, context_); }
  [[nodiscard]] auto rows() const { return most_far_rows(context_); }

  void start(const execution&) {
    std::byte* to = all_.own();
    for (std::int64_t b = 0; b < call_.own.size(); ++b)
      to = put_rows(to, b, {0, counts_.rows(call_.own.number(b))}, own_.key, own_.value, own_.bias, own_.positions,
                    own_.visible_from, own_.visible_until);
    all_.start();
  }
  void progress() { all_.progress(); }
  void finish() {
    all_.finish([this](std::int64_t i, const std::byte* from) {
      const segment& s = call_.planned.tokens().segments()[static_cast<std::size_t>(i)];
      const std::int64_t b = call_.sequences_here.segment_of(s.sequence);
      const range rows = shifted({0, counts_.rows(i)}, counts_.before(i));
      if (b >= 0)
        take_rows(from, b, rows, rows_.key, rows_.value, rows_.bias, positions_.view, from_.view, until_.view);
    });
  }

  template <class F>
  void with_source(query_slice& slice, const F& f) const {
    auto context = context_;
    context.seen = slice.of(context.seen);
    // Of the operands only lengths count: the last query is the last token.
    const buffer<std::int64_t> ends(call_.own.size() + 1);
    auto in = call_.in;
    in.query = slice.of(in.query);
    for (std::int64_t b = 0; b < call_.own.size(); ++b) ends[b] = slice.first_position(b) + in.query.length(b);
    in.key.begins = nullptr;
    in.key.ends = ends.data();
    f(seen_source(in, context, call_.options));
  }

 private:
  const Call& call_;
  const far_counts& counts_;
  far_context<Key, Value, Bias> own_;
  held_rows<Key, Value, Bias> rows_;
  far_numbers<std::int64_t> positions_, from_, until_;
  far_context<Key, Value, Bias> context_{};
  gathering all_;
};

/// The far context of a call, as far as one rank can tell.
inline void require_own_far(const context_parallel& over, const input_views& in, const far_views& far_rows,
                            std::size_t number_size) {
  require_far_shapes(in, far_rows, number_size);
  const range own = over.tokens.segments_of(over.ranks.rank());
  for (const named_view* numbers :
       {&far_rows.bias, &far_rows.positions, &far_rows.visible_from, &far_rows.visible_until})
    if (given(*numbers) && numbers->batch() != own.size())
      refuse(numbers->name, {numbers->extents()}, {"numbers for each of the rank's ", own.size(), " segments"});
  for (std::int64_t b = 0; b < own.size(); ++b) {
    const range tokens = over.tokens.segments()[static_cast<std::size_t>(own.begin + b)].tokens;
    const std::int64_t rows = far_rows.key.has_lengths() ? far_rows.key.length(b) : far_rows.key.length();
    if (tokens.empty() && rows > 0)
      refuse("far.key", {rows, " rows in segment ", b},
             {"none in a segment without tokens: rows lie in the order of tokens"});
  }
}

/// What of it has to be the same on all ranks.
template <class FarKey, class FarValue>
void add_far(agreement& same, const far_views& far_rows) {
  same.add_elements<FarKey, FarValue>("elements of far.key and far.value");
  same.add("heads of far.key", far_rows.key.heads());
  same.add("heads of far.bias", far_rows.bias.heads());
  same.add("heads of far.positions", far_rows.positions.heads());
  same.add("heads of far.visible_from", far_rows.visible_from.heads());
  same.add("heads of far.visible_until", far_rows.visible_until.heads());
  same.add("far.seen", given(far_rows.seen), yes_or_no);
  same.add("far.selected", given(far_rows.blocks), yes_or_no);
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
