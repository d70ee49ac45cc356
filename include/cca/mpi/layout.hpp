#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../detail/base/numbers.hpp"
#include "../detail/base/refuse.hpp"
#include "../detail/base/target.hpp"
#include "../partition.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// Consecutive tokens of one sequence, which one rank holds. There may be none.
struct segment {
  std::int64_t rank = 0;      ///< the rank of the communicator that holds them
  std::int64_t sequence = 0;  ///< the sequence, counted over all ranks
  range tokens{};             ///< their positions in it, `[begin, end)`

  /// Of every member.
  friend constexpr bool operator==(const segment&, const segment&) = default;
};

/// Which rank holds which tokens: the same object on every rank.
///
/// A rank's views have a sequence for each of its segments, in their order here: entry i of the batch is the rank's segment
/// i, of as many tokens. `packed`, `with_lengths` and, where the segments are all as long as the extent says, plain views
/// serve.
class layout {
 public:
  /// @param ranks  of the communicator
  /// @param lengths  tokens of each sequence
  /// @param segments  in the order of their ranks; together they hold every token of every sequence once
  /// @throws std::invalid_argument  where they do not
  layout(std::int64_t ranks, std::span<const std::int64_t> lengths, std::span<const segment> segments)
      : segments_(segments.begin(), segments.end()) {
    require_ranks(ranks);
    for (const std::int64_t length : lengths) {
      if (length < 0) detail::refuse("layout.lengths", {length}, {"at least 0"});
      sequences_.push_back({length, {}});
    }
    firsts_.assign(static_cast<std::size_t>(ranks) + 1, {});
    for (std::size_t i = 0; i < segments_.size(); ++i) require_segment(i);
    for (std::size_t r = 1; r < firsts_.size(); ++r) firsts_[r].begin += firsts_[r - 1].begin;
    for (std::size_t r = 0; r + 1 < firsts_.size(); ++r) firsts_[r].end = firsts_[r + 1].begin;
    firsts_.pop_back();
    order();
  }

  /// Rank r holds the tokens `[L r / ranks, L (r + 1) / ranks)` of every sequence of L tokens, one segment of each.
  [[nodiscard]] static layout contiguous(std::int64_t ranks, std::span<const std::int64_t> lengths) {
    require_ranks(ranks);
    std::vector<segment> all;
    for (std::int64_t r = 0; r < ranks; ++r)
      for (std::size_t q = 0; q < lengths.size(); ++q)
        all.push_back({r, static_cast<std::int64_t>(q), share(lengths[q], r, ranks)});
    return {ranks, lengths, all};
  }

  /// Of `2 ranks` equal parts of every sequence rank r holds part r and part `2 ranks - 1 - r`, two segments of each
  /// sequence: under a causal mask every rank then has the same work.
  [[nodiscard]] static layout head_to_tail(std::int64_t ranks, std::span<const std::int64_t> lengths) {
    require_ranks(ranks);
    std::vector<segment> all;
    for (std::int64_t r = 0; r < ranks; ++r)
      for (std::size_t q = 0; q < lengths.size(); ++q)
        for (const std::int64_t part : {r, 2 * ranks - 1 - r})
          all.push_back({r, static_cast<std::int64_t>(q), share(lengths[q], part, 2 * ranks)});
    return {ranks, lengths, all};
  }

  /// The sequences one after the other, cut into as many equal parts as there are ranks: for packed documents, most of
  /// which then lie on one rank.
  [[nodiscard]] static layout concatenated(std::int64_t ranks, std::span<const std::int64_t> lengths) {
    require_ranks(ranks);
    std::int64_t total = 0;
    for (const std::int64_t length : lengths) total += length;
    std::vector<segment> all;
    for (std::int64_t r = 0; r < ranks; ++r) {
      const range part = share(total, r, ranks);
      std::int64_t begin = 0;
      for (std::size_t q = 0; q < lengths.size(); begin += lengths[q++]) {
        const range tokens = intersection(shifted(part, -begin), {0, lengths[q]});
        if (!tokens.empty()) all.push_back({r, static_cast<std::int64_t>(q), tokens});
      }
    }
    return {ranks, lengths, all};
  }

  /// @{
  /// How many there are.
  [[nodiscard]] std::int64_t ranks() const { return static_cast<std::int64_t>(firsts_.size()); }
  [[nodiscard]] std::int64_t sequences() const { return static_cast<std::int64_t>(sequences_.size()); }
  /// @}

  /// Tokens of a sequence.
  [[nodiscard]] std::int64_t length(std::int64_t sequence) const { return at(sequence).length; }

  /// All segments, in the order of their ranks.
  [[nodiscard]] std::span<const segment> segments() const { return segments_; }

  /// The numbers of a rank's segments, among all.
  [[nodiscard]] range segments_of(std::int64_t rank) const { return firsts_[static_cast<std::size_t>(rank)]; }

  /// Tokens of a rank's segments, together.
  [[nodiscard]] std::int64_t tokens_of(std::int64_t rank) const {
    std::int64_t tokens = 0;
    const range own = segments_of(rank);
    for (std::int64_t i = own.begin; i < own.end; ++i) tokens += segments_[static_cast<std::size_t>(i)].tokens.size();
    return tokens;
  }

  /// Calls `f(number of the segment, tokens)` for the segments of a sequence that hold some of these tokens, upwards.
  template <class F>
  void for_each_holder(std::int64_t sequence, range tokens, const F& f) const {
    const auto& held = at(sequence).held;
    auto next =
        std::partition_point(held.begin(), held.end(), [&](const holder& h) { return h.tokens.end <= tokens.begin; });
    for (; next != held.end() && next->tokens.begin < tokens.end; ++next)
      f(next->segment, intersection(next->tokens, tokens));
  }

  /// A number of 63 bits that two layouts share only where they are the same.
  [[nodiscard]] std::int64_t fingerprint() const {
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a, of whole numbers
    const auto mix = [&](std::int64_t number) {
      for (int byte = 0; byte < 8; ++byte)
        hash = (hash ^ ((static_cast<std::uint64_t>(number) >> (8 * byte)) & 255)) * 1099511628211u;
    };
    mix(ranks());
    for (const auto& s : sequences_) mix(s.length);
    for (const segment& s : segments_)
      for (const std::int64_t number : {s.rank, s.sequence, s.tokens.begin, s.tokens.end}) mix(number);
    return static_cast<std::int64_t>(hash >> 1);
  }

 private:
  struct holder {
    std::int64_t segment;
    range tokens;
  };
  struct sequence_entry {
    std::int64_t length;
    std::vector<holder> held;  ///< those with tokens, upwards
  };

  static void require_ranks(std::int64_t ranks) {
    if (ranks < 1) detail::refuse("layout.ranks", {ranks}, {"at least 1"});
  }

  /// Part i of `parts` equal ones.
  static range share(std::int64_t length, std::int64_t i, std::int64_t parts) {
    const std::int64_t each = length / parts, rest = length % parts;  // no product that may overflow
    const auto begin = [&](std::int64_t k) { return k * each + k * rest / parts; };
    return {begin(i), begin(i + 1)};
  }

  [[nodiscard]] const sequence_entry& at(std::int64_t sequence) const {
    return sequences_[static_cast<std::size_t>(sequence)];
  }

  void require_segment(std::size_t i) {
    const segment& s = segments_[i];
    if (s.rank < 0 || s.rank + 1 >= static_cast<std::int64_t>(firsts_.size()))
      detail::refuse("layout.segments", {"rank ", s.rank}, {"one of ", firsts_.size() - 1, " ranks"});
    if (i > 0 && s.rank < segments_[i - 1].rank)
      detail::refuse("layout.segments", {"rank ", s.rank, " behind rank ", segments_[i - 1].rank},
                     {"segments in the order of their ranks"});
    if (s.sequence < 0 || s.sequence >= sequences())
      detail::refuse("layout.segments", {"sequence ", s.sequence}, {"one of ", sequences(), " sequences"});
    if (s.tokens.begin < 0 || s.tokens.end < s.tokens.begin || s.tokens.end > length(s.sequence))
      detail::refuse("layout.segments", {"tokens [", s.tokens.begin, ", ", s.tokens.end, ") of sequence ", s.sequence},
                     {"tokens in [0, ", length(s.sequence), ")"});
    ++firsts_[static_cast<std::size_t>(s.rank) + 1].begin;
    if (!s.tokens.empty())
      sequences_[static_cast<std::size_t>(s.sequence)].held.push_back({static_cast<std::int64_t>(i), s.tokens});
  }

  /// Sorts what is held of each sequence, of which nothing may be missing or be there twice.
  void order() {
    for (std::size_t q = 0; q < sequences_.size(); ++q) {
      auto& held = sequences_[q].held;
      std::sort(held.begin(), held.end(),
                [](const holder& a, const holder& b) { return a.tokens.begin < b.tokens.begin; });
      std::int64_t next = 0;
      for (const holder& h : held) {
        if (h.tokens.begin != next)
          detail::refuse("layout.segments",
                         {"token ", detail::smaller(next, h.tokens.begin), " of sequence ", q,
                          h.tokens.begin > next ? " on no rank" : " twice"},
                         {"every token once"});
        next = h.tokens.end;
      }
      if (next != sequences_[q].length)
        detail::refuse("layout.segments", {"token ", next, " of sequence ", q, " on no rank"}, {"every token once"});
    }
  }

  std::vector<segment> segments_;
  std::vector<range> firsts_;  ///< of each rank, the numbers of its segments
  std::vector<sequence_entry> sequences_;
};

}}}  // namespace cca::CCA_TARGET::mpi
