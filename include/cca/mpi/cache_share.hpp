#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../cache_shape.hpp"
#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/context/row_store.hpp"
#include "../detail/context/source.hpp"
#include "../detail/pool/pooler.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"
#include "rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// Which cores of a sequence a rank keeps: group `rank + j ranks` in row j.
struct core_share {
  std::int64_t rank, ranks;

  [[nodiscard]] std::int64_t owner(std::int64_t group) const { return group % ranks; }
  /// Of the first `groups` groups.
  [[nodiscard]] std::int64_t count(std::int64_t groups) const {
    return groups <= rank ? 0 : (groups - rank + ranks - 1) / ranks;
  }
  /// Where its rows lie, seen from a query 0 at `position`.
  [[nodiscard]] row_positions positions(const partition& by, std::int64_t position) const {
    return {.first = by.group(rank).end - 1 - position, .step = ranks * by.group_size};
  }
};

/// What one rank keeps of the sequences of a cache, and how tokens and cores come in: no message is sent here.
template <class Element, class Core>
class cache_share {
  using T = compute_type<Element>;

 protected:
  struct sequence {
    row_store<Core> cores;
    row_store<T> biases;       ///< of the cores, keys of one element
    row_store<Element> sinks;  ///< row t: sink token t
    row_store<Element> raw;    ///< row i: token `oldest_ + i`
  };

  [[nodiscard]] partition by() const { return partition_of(options_); }
  [[nodiscard]] bool biased() const { return has_core_biases(options_); }
  [[nodiscard]] bool has_window() const { return share_.rank == window_rank_; }
  [[nodiscard]] std::int64_t group_count(std::int64_t length) const {
    return pools(options_) ? by().group_count(length) : 0;
  }

  cache_share(const cache_shape& shape, const cca::options& options, int window_rank, const core_share& share)
      : shape_(shape), options_(options), window_rank_(window_rank), share_(share) {}

  /// Once shape and options are known to make sense.
  void begin() {
    core_heads_ = core_head_count(options_, shape_.heads, shape_.kv_heads);
    for (std::int64_t b = 0; b < shape_.batch; ++b)
      held_.push_back({{core_heads_, shape_.dim, shape_.value_dim},
                       {core_heads_, biased() ? 1 : 0, 0},
                       {shape_.kv_heads, shape_.dim, shape_.value_dim},
                       {shape_.kv_heads, shape_.dim, shape_.value_dim}});
  }

  /// The rank of the window keeps the new tokens, and lets those go that no query sees any more.
  template <class Inputs>
  void take_in(const Inputs& in) {
    const std::int64_t tokens = in.query.length(), length = length_ + tokens;
    // Of the next query, and of the group that is not complete yet.
    const std::int64_t first = smaller(larger(by().raw(length_).begin, oldest_), length_);
    for (std::int64_t b = 0; b < shape_.batch; ++b) {
      sequence& s = held_[static_cast<std::size_t>(b)];
      s.sinks.reserve(by().sink_count(length), unlimited);
      const bool moves = length - oldest_ > s.raw.capacity() && first > oldest_;
      if (!moves) s.raw.reserve(length - oldest_, unlimited);
      if (moves) s.raw.reserve(length - first, unlimited);
      for (std::int64_t h = 0; h < shape_.kv_heads; ++h) {
        if (moves) s.raw.copy_rows(h, 0, s.raw.rows(h, first - oldest_), length_ - first);
        const std::int64_t from = moves ? first : oldest_;
        const auto rows = rows_of(in.key, in.value, b, h);
        s.raw.copy_rows(h, length_ - from, rows, tokens);
        s.sinks.copy_rows(h, smaller(by().sink_count(length_), length_), rows,
                          by().sink_count(length) - by().sink_count(length_));
      }
      if (b + 1 == shape_.batch && moves) oldest_ = first;
    }
  }

  /// Pools new groups into a message.
  template <class Inputs>
  void pool_new(const Inputs& in, range groups, std::byte* rows, const execution& run) {
    const std::int64_t count = groups.size();
    const buffer<Core> keys(shape_.batch * core_heads_ * count * shape_.dim),
        values(shape_.batch * core_heads_ * count * shape_.value_dim);
    const buffer<T> biases(biased() ? shape_.batch * core_heads_ * count : 0);
    const auto key = bhsd(keys.data(), shape_.batch, core_heads_, count, shape_.dim);
    const auto value = bhsd(values.data(), shape_.batch, core_heads_, count, shape_.value_dim);
    const auto bias = bhs(biases.data(), shape_.batch, biased() ? core_heads_ : 0, count);
    const pool_plan<T> plan{worker_count(run, shape_.batch * shape_.kv_heads * count),
                            group_rows<T>::size(shape_.dim, shape_.value_dim, !in_place<T, Element>), 0};
    scratch memory({}, plan.bytes());
    pool_groups<T>(
        {{shape_.batch, true}, shape_.heads, shape_.kv_heads, core_heads_}, [&](std::int64_t) { return groups; },
        shape_.dim, shape_.value_dim, options_,
        [&](auto& pooling, std::int64_t b, std::int64_t h, range group) {
          pooling.absorb(held_[static_cast<std::size_t>(b)].raw.rows(h, 0), shifted(group, -oldest_));
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t t) { return in.query.row(b, h, t - length_); },
        [&](std::int64_t b, std::int64_t h, std::int64_t c) {
          const std::int64_t i = c - groups.begin;
          return core_place{key.row(b, h, i), value.row(b, h, i), biased() ? bias.row(b, h, i) : nullptr};
        },
        run, plan.take(memory));
    for (std::int64_t r = 0; r < share_.ranks; ++r)
      for (std::int64_t b = 0; b < shape_.batch; ++b)
        for (std::int64_t c = groups.begin; c < groups.end; ++c)
          if (share_.owner(c) == r) {
            const std::int64_t i = c - groups.begin;
            rows = put_rows(rows, b, {i, i + 1}, key, value, bias);
          }
  }

  /// Takes this rank's new cores from a message.
  void keep_cores(range groups, const std::byte* from) {
    const range rows{share_.count(groups.begin), share_.count(groups.end)};
    for (sequence& s : held_) {
      reserve_cores(s, rows.end);
      for (std::int64_t j = rows.begin; j < rows.end; ++j) from = take_core(s, j, from);
    }
  }
  void reserve_cores(sequence& s, std::int64_t rows) const {
    s.cores.reserve(rows, unlimited);
    if (biased()) s.biases.reserve(rows, unlimited);
  }
  /// Takes core `j` of those kept.
  const std::byte* take_core(sequence& s, std::int64_t j, const std::byte* from) const {
    from = take_row(s.cores, j, from);
    if (!biased()) return from;
    return take_rows(from, 0, {j, j + 1}, bhs(s.biases.key(0, 0), 1, core_heads_, s.biases.capacity()));
  }

  /// Takes a row of all heads from a message. Returns what is behind it.
  template <class Row>
  const std::byte* take_row(const row_store<Row>& to, std::int64_t i, const std::byte* from) const {
    return take_rows(from, 0, {i, i + 1}, bhsd(to.key(0, 0), 1, to.heads(), to.capacity(), shape_.dim),
                     bhsd(to.value(0, 0), 1, to.heads(), to.capacity(), shape_.value_dim));
  }

  cache_shape shape_;
  cca::options options_;
  int window_rank_;
  detail::core_share share_;
  std::int64_t core_heads_ = 0, length_ = 0;
  std::int64_t oldest_ = 0;  ///< of the raw tokens that are kept
  std::vector<sequence> held_;
};

}}}}  // namespace cca::CCA_TARGET::mpi::detail
