#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "layout.hpp"

/// What a call across ranks reads, sends and computes, from its layout and options alone: no message is needed to know, so
/// that every rank plans the same, and the cost of any number of ranks can be counted on one.
namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// What the queries of a segment see, and what is pooled there.
struct segment_plan {
  range sinks;   ///< the first tokens of the sequence that some query sees whatever its window
  range raw;     ///< the tokens that some query sees behind them, or that a group of the segment needs: its own, a halo
  range cores;   ///< the cores that some query sees
  range groups;  ///< the groups that are pooled there: those whose last token is in the segment, and that a query sees
  range sent;    ///< those of them that a query on another rank sees
};

/// Tokens that lie in one segment and are read in another, or in the same.
struct piece {
  enum class part { sinks, raw, cores };  ///< which of the reader's rows they are

  std::int64_t holder = 0;  ///< the number of the segment that holds them
  std::int64_t reader = 0;  ///< of the one whose queries see them
  part in = part::raw;      ///< among which of the reader's rows
  range tokens{};           ///< their positions in the sequence; of cores, the numbers of their groups
};

/// The plan of a call.
class plan {
 public:
  /// @param tokens  who holds which; outlives the plan
  /// @param by  who sees what
  /// @param pooled  whether there are groups whose cores some query sees
  plan(const layout& tokens, const partition& by, bool pooled) : plan(tokens, by, pooled, false) {}

  /// The plan of pooling alone: every complete group is pooled, and none is sent.
  [[nodiscard]] static plan of_pooling(const layout& tokens, const partition& by) { return {tokens, by, true, true}; }

  [[nodiscard]] const layout& tokens() const { return *tokens_; }       ///< who holds which
  [[nodiscard]] const partition& who_sees_what() const { return by_; }  ///< who sees what
  /// Whether ranks keep cores, since queries see some.
  [[nodiscard]] bool keeps_cores() const { return pooled_ && !pooling_alone_; }

  /// Of segment i of the layout.
  [[nodiscard]] const segment_plan& operator[](std::int64_t i) const { return segments_[static_cast<std::size_t>(i)]; }

  /// Calls `f(piece)` for all that the queries of segment `reader` see raw, its own tokens among them: first the sink
  /// tokens, then the others, upwards.
  template <class F>
  void for_each_piece(std::int64_t reader, const F& f) const {
    const std::int64_t sequence = segment_of(reader).sequence;
    const auto each = [&](piece::part in, range tokens) {
      if (!tokens.empty())
        tokens_->for_each_holder(sequence, tokens, [&](std::int64_t holder, range some) {
          f(piece{holder, reader, in, some});
        });
    };
    each(piece::part::sinks, (*this)[reader].sinks);
    each(piece::part::raw, (*this)[reader].raw);
  }

  /// Calls `f(piece)` for the cores that the queries of segment `reader` see, upwards: `tokens` are numbers of groups,
  /// the holder is where they are pooled.
  template <class F>
  void for_each_core_piece(std::int64_t reader, const F& f) const {
    const range seen = (*this)[reader].cores;
    if (seen.empty()) return;
    const range last_tokens{by_.group(seen.begin).end - 1, by_.group(seen.end - 1).end};
    tokens_->for_each_holder(segment_of(reader).sequence, last_tokens, [&](std::int64_t holder, range) {
      const range groups = intersection((*this)[holder].groups, seen);
      if (!groups.empty()) f(piece{holder, reader, piece::part::cores, groups});
    });
  }

  /// @{
  /// The pieces that a rank holds or reads, by reader: the order in which messages carry them, and in which gradients are
  /// added up.
  [[nodiscard]] std::vector<piece> pieces_of(std::int64_t rank) const {
    return of_rank(rank, [&](std::int64_t reader, const auto& f) { for_each_piece(reader, f); });
  }
  [[nodiscard]] std::vector<piece> core_pieces_of(std::int64_t rank) const {
    return of_rank(rank, [&](std::int64_t reader, const auto& f) { for_each_core_piece(reader, f); });
  }
  /// @}

  /// The rank that holds a segment.
  [[nodiscard]] std::int64_t rank_of(std::int64_t i) const { return segment_of(i).rank; }

  /// Rows that a rank receives: raw tokens of others, and cores. A row is a key and a value of all heads.
  struct counts {
    std::int64_t raw = 0, cores = 0;
    std::int64_t messages = 0;  ///< of raw tokens: the ranks that they come from
  };
  [[nodiscard]] counts received_by(std::int64_t rank) const {
    counts all;
    std::vector<range> from(static_cast<std::size_t>(tokens_->ranks()));
    const range own = tokens_->segments_of(rank);
    for (std::int64_t i = own.begin; i < own.end; ++i)
      for_each_piece(i, [&](const piece& p) {
        if (rank_of(p.holder) == rank) return;
        all.raw += p.tokens.size();
        from[static_cast<std::size_t>(rank_of(p.holder))].end = 1;
      });
    for (const range& f : from) all.messages += f.end;
    for (std::int64_t i = 0; i < std::ssize(segments_); ++i)
      if (rank_of(i) != rank) all.cores += (*this)[i].sent.size();
    return all;
  }

  /// Query-key pairs of a rank's queries, per head: the scores that it computes. And the tokens that it pools, per head of
  /// cores: each is scored as well, and added.
  struct pair_counts {
    std::int64_t raw = 0, cores = 0, pooled = 0;
  };
  [[nodiscard]] pair_counts pairs_of(std::int64_t rank) const {
    pair_counts pairs;
    const range own = tokens_->segments_of(rank);
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      const segment& s = segment_of(i);
      const range all{0, tokens_->length(s.sequence)};
      pairs.pooled += (*this)[i].groups.size() * by_.group_size;
      for (std::int64_t t = s.tokens.begin; t < s.tokens.end; ++t) {
        pairs.cores += cores_at(t);
        pairs.raw += intersection(by_.sinks(t), all).size() + intersection(by_.raw(t), all).size();
      }
    }
    return pairs;
  }

 private:
  plan(const layout& tokens, const partition& by, bool pooled, bool pooling_alone)
      : tokens_(&tokens), by_(by), pooled_(pooled), pooling_alone_(pooling_alone) {
    for (const segment& s : tokens.segments()) segments_.push_back(plan_of(s));
    if (keeps_cores()) share_cores();
  }

  [[nodiscard]] const segment& segment_of(std::int64_t i) const {
    return tokens_->segments()[static_cast<std::size_t>(i)];
  }

  [[nodiscard]] std::int64_t cores_at(std::int64_t t) const { return pooled_ ? by_.core_count(t) : 0; }

  [[nodiscard]] segment_plan plan_of(const segment& s) const {
    if (s.tokens.empty()) return {};
    const std::int64_t first = s.tokens.begin, last = s.tokens.end - 1, length = tokens_->length(s.sequence);
    segment_plan of;
    if (pooled_) {
      const std::int64_t seen = pooling_alone_ ? by_.group_count(length) : cores_at(length - 1);
      of.groups = {detail::smaller(by_.group_count(first), seen), detail::smaller(by_.group_count(s.tokens.end), seen)};
    }
    if (pooling_alone_) {
      if (!of.groups.empty()) of.raw = hull(by_.group(of.groups.begin), by_.group(of.groups.end - 1));
      return of;
    }
    of.cores = {0, cores_at(last)};
    of.sinks = intersection(by_.sinks(last), {0, length});
    of.raw = intersection({by_.raw(first).begin, by_.raw(last).end}, {by_.sink_count(length), length});
    if (of.raw.empty()) of.raw = {};
    return of;
  }

  /// Those pieces of `for_each(reader, f)` that a rank holds or reads. Readers of other sequences than its own are not
  /// looked at.
  template <class ForEach>
  [[nodiscard]] std::vector<piece> of_rank(std::int64_t rank, const ForEach& for_each) const {
    const range own = tokens_->segments_of(rank);
    std::vector<range> held(static_cast<std::size_t>(tokens_->sequences()));  // the hull of what the rank holds
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      range& hull_of = held[static_cast<std::size_t>(segment_of(i).sequence)];
      hull_of = hull(hull_of, segment_of(i).tokens);
    }
    std::vector<piece> all;
    for (std::int64_t reader = 0; reader < std::ssize(segments_); ++reader)
      if (!held[static_cast<std::size_t>(segment_of(reader).sequence)].empty() || own.contains(reader))
        for_each(reader, [&](const piece& p) {
          if (own.contains(p.reader) || own.contains(p.holder)) all.push_back(p);
        });
    return all;
  }

  /// Which cores travel: of a sequence those that a query on another rank sees.
  void share_cores() {
    struct most_seen {
      std::int64_t rank = -1, most = 0, most_of_others = 0;
    };
    std::vector<most_seen> of(static_cast<std::size_t>(tokens_->sequences()));
    const auto& all = tokens_->segments();
    for (std::size_t i = 0; i < all.size(); ++i) {
      most_seen& m = of[static_cast<std::size_t>(all[i].sequence)];
      const std::int64_t cores = segments_[i].cores.end;
      if (cores > m.most) {
        if (m.rank != all[i].rank) m.most_of_others = m.most;
        m.most = cores, m.rank = all[i].rank;
      } else if (m.rank != all[i].rank) {
        m.most_of_others = detail::larger(m.most_of_others, cores);
      }
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      const most_seen& m = of[static_cast<std::size_t>(all[i].sequence)];
      const std::int64_t elsewhere = m.rank == all[i].rank ? m.most_of_others : m.most;
      const range groups = segments_[i].groups;
      segments_[i].sent = intersection(groups, {groups.begin, elsewhere});
      if (segments_[i].sent.empty()) segments_[i].sent = {};
    }
  }

  const layout* tokens_;
  partition by_;
  bool pooled_, pooling_alone_;
  std::vector<segment_plan> segments_;
};

}}}  // namespace cca::CCA_TARGET::mpi
