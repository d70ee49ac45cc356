#pragma once

// Problems across ranks: every rank makes the same one, holds its own part, and gets the whole of the results back.

#include "layouts.hpp"
#include "ragged.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/mpi.hpp>
#include <cstdlib>
#include <numeric>
#include <optional>

namespace cca::test {

/// Of all tests of this program.
inline const mpi::communicator& world() {
  static const auto* const ranks = new mpi::communicator(MPI_COMM_WORLD);  // as long as the program
  return *ranks;
}

/// What a problem across ranks is about.
struct spread_problem {
  std::vector<std::int64_t> lengths;
  mpi::layout layout;
  std::int64_t heads = 4, kv_heads = 2, dim = 8, value_dim = 5;
  cca::options options{};
  bool sink_logits = false, sinks_per_query = false, alibi = false, key_bias = false;
};

inline std::ostream& operator<<(std::ostream& text, const spread_problem& p) {
  text << "lengths " << testing::PrintToString(p.lengths) << ", heads " << p.heads << "/" << p.kv_heads << ", dims "
       << p.dim << " " << p.value_dim << ", " << describe(p.options) << (p.sink_logits ? ", sink logits" : "")
       << (p.sinks_per_query ? ", for each query" : "") << (p.alibi ? ", slopes" : "") << (p.key_bias ? ", biases" : "")
       << ", segments";
  for (const mpi::segment& s : p.layout.segments())
    text << " " << s.rank << ":" << s.sequence << "[" << s.tokens.begin << "," << s.tokens.end << ")";
  return text;
}

/// As many as a landing has time for, which are enough for the error rule; or more, as CCA_MPI_PROBLEMS says.
inline int problems(int few) {
  const char* const said = std::getenv("CCA_MPI_PROBLEMS");
  return said != nullptr ? std::max(std::atoi(said), few) : few;
}

inline mpi::context_parallel over(const spread_problem& p, bool overlap = true) { return {world(), p.layout, overlap}; }

inline mpi::layout random_spread(random_engine& random, std::int64_t ranks, const std::vector<std::int64_t>& lengths) {
  switch (draw(random, 0, 3)) {
    case 0:
      return mpi::layout::contiguous(ranks, lengths);
    case 1:
      return mpi::layout::head_to_tail(ranks, lengths);
    case 2:
      return mpi::layout::concatenated(ranks, lengths);
    default:
      return random_segments(random, ranks, lengths);
  }
}

/// Options of every kind, and lengths at every edge.
inline spread_problem random_problem(random_engine& random, std::int64_t ranks) {
  cca::options o;
  const bool groups = draw(random, 0, 3) > 0;
  if (groups) {
    o.group_size = draw(random, 1, 12);
    o.window = draw(random, 1, 50);
    o.pool = draw_from(random, group_poolings);
    o.core_heads = draw_from(random, all_core_heads);
    if (o.pool == pooling::last_query && draw(random, 0, 2) == 0) o.pooling_scale = 1.5;
    if ((o.pool == pooling::last_query || o.pool == pooling::mean) && draw(random, 0, 1) == 0)
      o.core_bias = core_bias::entropy;
  } else {
    if (draw(random, 0, 2) > 0) o.window = draw(random, 1, 70);
    if (draw(random, 0, 3) == 0) o.lookahead = draw_from(random, std::array<std::int64_t, 3>{1, 9, unlimited});
    if (draw(random, 0, 3) == 0) o.prefix = draw(random, 0, 40);
  }
  if (draw(random, 0, 1) == 0) o.sink_tokens = draw(random, 0, 14);
  if (draw(random, 0, 2) == 0) o.softcap = 3;
  if (draw(random, 0, 2) == 0) o.softmax_scale = 0.7;
  const std::int64_t g = std::max<std::int64_t>(o.group_size, 2);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(draw(random, 1, 4)));
  for (std::int64_t& length : lengths)
    length = draw(random, 0, 1) == 0 ? draw(random, 20, 160)
                                     : draw_from(random, std::array<std::int64_t, 5>{7, 0, 1, g - 1, 5 * g + 3});
  spread_problem p{lengths, random_spread(random, ranks, lengths)};
  p.options = o;
  std::tie(p.heads, p.kv_heads) =
      draw_from(random, std::array<std::pair<std::int64_t, std::int64_t>, 4>{{{1, 1}, {4, 2}, {3, 1}, {2, 2}}});
  p.dim = draw_from(random, std::array<std::int64_t, 3>{3, 8, 17});
  p.value_dim = draw_from(random, std::array<std::int64_t, 3>{1, 8, 13});
  p.sink_logits = draw(random, 0, 2) == 0;
  p.sinks_per_query = p.sink_logits && draw(random, 0, 1) == 0;
  p.alibi = draw(random, 0, 2) == 0;
  p.key_bias = !groups && draw(random, 0, 2) == 0;
  return p;
}

/// A tensor of all tokens: one for each sequence, alone in memory.
template <class T>
using whole_tensor = std::vector<tensor<T>>;

template <class T>
whole_tensor<T> make_whole(const spread_problem& p, std::int64_t heads, std::int64_t dim) {
  whole_tensor<T> all;
  for (const std::int64_t length : p.lengths)
    all.emplace_back(std::array{std::int64_t{1}, heads, length, dim}).fill(T(0));
  return all;
}

template <class T>
whole_tensor<T> random_whole(const spread_problem& p, std::int64_t heads, std::int64_t dim, random_engine& random,
                             double deviation = 1) {
  whole_tensor<T> all = make_whole<T>(p, heads, dim);
  for (tensor<T>& one : all) one.randomize(random, deviation);
  return all;
}

/// What this rank holds of it, in any layout of memory.
template <class T, std::size_t Rank = 4>
class own_part {
 public:
  own_part(const spread_problem& p, std::int64_t heads, std::int64_t dim, ragged_layout memory)
      : heads_(heads), dim_(dim) {
    const range own = p.layout.segments_of(world().rank());
    for (std::int64_t i = own.begin; i < own.end; ++i)
      segments_.push_back(p.layout.segments()[static_cast<std::size_t>(i)]);
    std::vector<extents> all;
    for (const mpi::segment& s : segments_) all.push_back({1, heads, s.tokens.size(), dim});
    if (!all.empty()) rows_.emplace(all, memory);
  }

  [[nodiscard]] tensor_view<T, Rank> view() const {
    if (rows_) return rows_->view();
    tensor_view<T, Rank> none{};
    none.extent[1] = heads_;
    none.stride[Rank - 1] = 1;
    if constexpr (Rank == 4) none.extent[3] = dim_;
    return none;
  }

  template <class From>
  void take(const whole_tensor<From>& from) {
    each([&](T* mine, std::int64_t q, std::int64_t h, std::int64_t t) {
      copy_row(from[static_cast<std::size_t>(q)].row(0, h, t), mine);
    });
  }
  /// What all ranks have: each its bits, and zeros elsewhere.
  [[nodiscard]] whole_tensor<T> whole(const spread_problem& p) const {
    whole_tensor<T> all = make_whole<T>(p, heads_, dim_);
    each([&](T* mine, std::int64_t q, std::int64_t h, std::int64_t t) {
      copy_row(mine, all[static_cast<std::size_t>(q)].row(0, h, t));
    });
    for (tensor<T>& one : all) {  // rows without gaps
      const std::int64_t bytes = heads_ * one.view().length() * dim_ * static_cast<std::int64_t>(sizeof(T));
      EXPECT_EQ(MPI_SUCCESS, MPI_Allreduce(MPI_IN_PLACE, one.view().data, static_cast<int>(bytes), MPI_BYTE, MPI_BOR,
                                           MPI_COMM_WORLD));
    }
    return all;
  }

  /// Calls `f(row, sequence, head, token)` for all rows.
  template <class F>
  void each(const F& f) const {
    for (std::size_t b = 0; b < segments_.size(); ++b)
      for (std::int64_t h = 0; h < heads_; ++h)
        for (std::int64_t i = 0; i < segments_[b].tokens.size(); ++i)
          f(rows_->view().row(static_cast<std::int64_t>(b), h, i), segments_[b].sequence, h,
            segments_[b].tokens.begin + i);
  }

  /// Whether nothing was written, into rows neither.
  [[nodiscard]] bool untouched() const {
    bool all = true;
    each([&](const T* mine, std::int64_t, std::int64_t, std::int64_t) {
      for (std::int64_t d = 0; d < dim_; ++d) all &= same_bits(mine[d], canary<T>());
    });
    return all && canaries_intact();
  }

  [[nodiscard]] testing::AssertionResult canaries_intact() const {
    return rows_ ? rows_->canaries_intact() : testing::AssertionSuccess();
  }

 private:
  template <class From>
  void copy_row(const From* from, T* to) const {
    std::transform(from, from + dim_, to, [](From x) { return static_cast<T>(x); });
  }

  std::int64_t heads_, dim_;
  std::vector<mpi::segment> segments_;
  std::optional<ragged_tensor<T, Rank>> rows_;
};

/// The operands of a problem, of all ranks: of T, what is computed in, but no more precise than `Element`.
template <class T, class Element = T>
struct whole_operands {
  whole_tensor<T> query, key, value, sinks_per_query, key_bias;
  tensor<T, 3> sinks, slopes;

  whole_operands(const spread_problem& p, random_engine& random)
      : query(random_whole<T>(p, p.heads, p.dim, random)),
        key(random_whole<T>(p, p.kv_heads, p.dim, random)),
        value(random_whole<T>(p, p.kv_heads, p.value_dim, random)),
        sinks_per_query(random_whole<T>(p, p.heads, 1, random)),
        key_bias(random_whole<T>(p, p.kv_heads, 1, random)),
        sinks({1, p.heads, 1}),
        slopes({1, p.heads, 1}) {
    sinks.randomize(random);
    slopes.generate([&] { return static_cast<T>(draw(random, 1, 8)) / 16; });
    for (auto* all : {&query, &key, &value})
      for (tensor<T>& one : *all)
        for_each_row(one.view(), [&](std::int64_t, std::int64_t h, std::int64_t t) {
          T* const row = one.row(0, h, t);
          std::transform(row, row + one.view().dim(), row, [](T x) { return static_cast<T>(static_cast<Element>(x)); });
        });
  }

  /// Sequence q in one process.
  [[nodiscard]] inputs<T> sequence(const spread_problem& p, std::size_t q) const {
    inputs<T> in{query[q].view(), key[q].view(), value[q].view()};
    if (p.sink_logits) in.sink_logits = p.sinks_per_query ? without_dim(sinks_per_query[q].view()) : sinks.view();
    if (p.alibi) in.alibi_slopes = slopes.view();
    if (p.key_bias) in.key_bias = without_dim(key_bias[q].view());
    return in;
  }
};

/// This rank's part of them.
template <class T, class Element = T>
struct own_operands {
  own_part<Element> query, key, value;
  own_part<T> sinks_per_query, key_bias;
  inputs<Element> in;

  own_operands(const spread_problem& p, const whole_operands<T, Element>& all, ragged_layout memory)
      : query(p, p.heads, p.dim, memory),
        key(p, p.kv_heads, p.dim, memory),
        value(p, p.kv_heads, p.value_dim, memory),
        sinks_per_query(p, p.heads, 1, memory),
        key_bias(p, p.kv_heads, 1, memory) {
    query.take(all.query);
    key.take(all.key);
    value.take(all.value);
    sinks_per_query.take(all.sinks_per_query);
    key_bias.take(all.key_bias);
    in = {query.view(), key.view(), value.view()};
    if (p.sink_logits) in.sink_logits = p.sinks_per_query ? without_dim(sinks_per_query.view()) : all.sinks.view();
    if (p.alibi) in.alibi_slopes = all.slopes.view();
    if (p.key_bias) in.key_bias = without_dim(key_bias.view());
  }
};

/// Results of a call.
template <class T>
struct own_results {
  own_part<T> out, lse;
  own_results(const spread_problem& p, ragged_layout memory)
      : out(p, p.heads, p.value_dim, memory), lse(p, p.heads, 1, memory) {}
  [[nodiscard]] cca::results<T, T> view() const { return {out.view(), without_dim(lse.view())}; }
};

/// All gradients of a problem.
template <class T>
struct spread_gradient {
  own_part<T> query, key, value, sinks_per_query, key_bias;
  tensor<T, 3> sinks, slopes;

  spread_gradient(const spread_problem& p, ragged_layout memory)
      : query(p, p.heads, p.dim, memory),
        key(p, p.kv_heads, p.dim, memory),
        value(p, p.kv_heads, p.value_dim, memory),
        sinks_per_query(p, p.heads, 1, memory),
        key_bias(p, p.kv_heads, 1, memory),
        sinks({1, p.heads, 1}),
        slopes({1, p.heads, 1}) {}

  [[nodiscard]] gradients<T> view(const spread_problem& p) {
    gradients<T> to{query.view(), key.view(), value.view()};
    if (p.sink_logits) to.sink_logits = p.sinks_per_query ? without_dim(sinks_per_query.view()) : sinks.view();
    if (p.alibi) to.alibi_slopes = slopes.view();
    if (p.key_bias) to.key_bias = without_dim(key_bias.view());
    return to;
  }
};

/// The error rule, which rank 0 applies for all.
template <class T>
void add_whole(error_rule<T>& rule, const tensor<T>& got, const reference::tensor<T>& textbook,
               const reference::tensor<exact_type<T>>& exact, const std::string& label) {
  rule.add(std::as_const(got).view(), textbook.view(), exact.view(), label);
}

/// What a call throws, which is the same on every rank.
template <class Call>
std::string refusal(const Call& call) {
  std::string said = "nothing";
  try {
    call();
  } catch (const std::exception& why) {
    said = why.what();
  }
  std::array<char, 1200> of_first{};
  std::copy_n(said.begin(), std::min(said.size(), of_first.size() - 1), of_first.begin());
  MPI_Bcast(of_first.data(), static_cast<int>(of_first.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
  EXPECT_EQ(of_first.data(), said) << "on rank " << world().rank();
  return said;
}

}  // namespace cca::test
