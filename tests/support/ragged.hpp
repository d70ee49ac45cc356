#pragma once

// Sequences of their own lengths, one after the other or padded, and the same sequences alone.

#include <numeric>

#include "guarded_pages.hpp"

namespace cca::test {

/// How the sequences of a tensor lie in memory.
enum class ragged_layout {
  packed,        ///< `[tokens][heads][dim]`
  packed_heads,  ///< `[heads][tokens][dim]`
  padded,        ///< a batch that is padded behind
  padded_front   ///< before and behind
};
constexpr std::array all_ragged_layouts{ragged_layout::packed, ragged_layout::packed_heads, ragged_layout::padded,
                                        ragged_layout::padded_front};

/// A tensor of sequences of their own lengths, of which `all` are the extents, each a batch of one. What is not a row of
/// theirs is a canary. Packed ones may lie between guards.
template <class T, std::size_t Rank = 4>
class ragged_tensor {
 public:
  ragged_tensor(const std::vector<extents>& all, ragged_layout layout, const guarded_pages* pages = nullptr,
                bool end = false) {
    const std::int64_t before = layout == ragged_layout::padded_front ? 2 : 0;
    const bool is_packed = layout == ragged_layout::packed || layout == ragged_layout::packed_heads;
    std::int64_t total = 0, longest = 0;
    for (const extents& e : all) {
      begins_.push_back(is_packed ? total : before);
      ends_.push_back(begins_.back() + e[2]);
      total += e[2];
      longest = std::max(longest, e[2]);
    }
    const std::int64_t batch = std::ssize(all), heads = all[0][1], dim = Rank == 4 ? all[0][3] : 1;
    const std::int64_t rows = is_packed ? total : longest + 2 * before + 1;
    elements_ = (is_packed ? 1 : batch) * heads * rows * dim;
    if (pages != nullptr) {
      data_ = reinterpret_cast<T*>(pages->at(end, static_cast<std::size_t>(elements_) * sizeof(T)));
    } else {
      memory_.resize(static_cast<std::size_t>(elements_ + 2 * margin));
      data_ = memory_.data() + margin;
      std::fill(memory_.begin(), memory_.end(), canary<T>());
    }
    std::fill_n(data_, elements_, canary<T>());
    const bool heads_outside = layout == ragged_layout::packed_heads || layout == ragged_layout::padded_front;
    view_ = {data_,
             {batch, heads, longest},
             {is_packed ? 0 : heads * rows * dim, heads_outside ? rows * dim : dim, heads_outside ? dim : heads * dim}};
    if constexpr (Rank == 4) view_.extent[3] = dim, view_.stride[3] = 1;
    // A copy would refer to the other's lengths.
    view_.begins = layout == ragged_layout::padded ? nullptr : begins_.data();
    view_.ends = ends_.data();
    if (layout == ragged_layout::padded) view_.extent[2] = rows;  // the padding is part of the view
  }
  ragged_tensor(ragged_tensor&&) = default;

  [[nodiscard]] tensor_view<T, Rank> view() const { return view_; }

  /// Copies the rows of sequence `b` from a view of it alone.
  template <class Element>
  void take(std::int64_t b, const tensor_view<Element, Rank>& alone) {
    for_each_row(alone, [&](std::int64_t, std::int64_t h, std::int64_t i) {
      std::copy_n(alone.row(0, h, i), row_size(alone), view_.row(b, h, i));
    });
  }

  /// Whether nothing is written but rows.
  [[nodiscard]] testing::AssertionResult canaries_intact() const {
    const std::int64_t around = memory_.empty() ? 0 : margin;
    std::vector<bool> element(static_cast<std::size_t>(elements_ + 2 * around));
    for_each_row(view_, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < row_size(view_); ++d)
        element[static_cast<std::size_t>(view_.row(b, h, i) + d - data_ + around)] = true;
    });
    for (std::int64_t i = -around; i < elements_ + around; ++i)
      if (!element[static_cast<std::size_t>(i + around)] && !same_bits(data_[i], canary<T>()))
        return testing::AssertionFailure() << "padding at " << i << " holds " << data_[i];
    return testing::AssertionSuccess();
  }

 private:
  static constexpr std::int64_t margin = 64;

  std::vector<std::int64_t> begins_, ends_;
  std::vector<T> memory_;
  T* data_ = nullptr;
  std::int64_t elements_ = 0;
  tensor_view<T, Rank> view_;
};

/// Queries, keys and far rows of a sequence.
struct lengths {
  std::int64_t queries, keys, far_rows = 0;
};

/// A call of one sequence after the other, each alone in memory: what a call of all of them together has to give.
template <class Pass>
struct alone {
  using T = typename Pass::element;
  std::vector<problem> problems;
  std::vector<typename Pass::memory> memories;

  alone(const problem& p, const std::vector<lengths>& all, random_engine& random) {
    for (const lengths& l : all) {
      problem one = p;
      one.sizes.batch = 1;
      one.sizes.queries = l.queries;
      one.sizes.keys = l.keys;
      one.far_length = l.far_rows;
      problems.push_back(one);
      memories.emplace_back(one).randomize(random);
      Pass::call(one, memories.back().arguments());
    }
  }

  [[nodiscard]] std::int64_t count() const { return std::ssize(problems); }
};

/// The arguments of the same sequences in one call.
template <class Pass>
struct together {
  using T = typename Pass::element;
  problem p;
  std::vector<ragged_tensor<T>> operands, results;
  ragged_tensor<std::int64_t, 3> seen;

  /// `next_layout()` is that of each tensor in turn.
  template <class NextLayout>
  together(const alone<Pass>& from, const NextLayout& next_layout, const std::vector<guarded_pages>* pages = nullptr,
           bool end = false)
      : p(from.problems[0]),
        seen(extents_of(from,
                        [](const auto& m) {
                          const auto& e = m.seen.view().extent;
                          return extents{e[0], e[1], e[2], 1};
                        }),
             next_layout()) {
    std::size_t used = 0;
    const auto place = [&](auto& to, auto member, std::size_t i) {
      to.emplace_back(extents_of(from, [&](const auto& m) { return (m.*member)[i].view().extent; }), next_layout(),
                      pages != nullptr ? &(*pages)[used++] : nullptr, end);
    };
    for (std::size_t i = 0; i < from.memories[0].operands.size(); ++i) {
      place(operands, &Pass::memory::operands, i);
      for (std::int64_t b = 0; b < from.count(); ++b)
        operands.back().take(b, from.memories[static_cast<std::size_t>(b)].operands[i].view());
    }
    for (std::int64_t b = 0; b < from.count(); ++b)
      seen.take(b, from.memories[static_cast<std::size_t>(b)].seen.view());
    for (std::size_t i = 0; i < from.memories[0].results.size(); ++i) place(results, &Pass::memory::results, i);
  }

  [[nodiscard]] test::arguments<T> arguments() const {
    test::arguments<T> a{.operands = {}, .results = {}, .seen = seen.view()};
    for (const auto& t : operands) a.operands.push_back(t.view());
    for (const auto& t : results) a.results.push_back(t.view());
    return a;
  }

  /// Whether every sequence has the bits that it has alone, and nothing else was written.
  [[nodiscard]] testing::AssertionResult same_as(const alone<Pass>& want) const {
    for (std::size_t i = 0; i < results.size(); ++i) {
      for (std::int64_t b = 0; b < want.count(); ++b) {
        const tensor<T>& one = want.memories[static_cast<std::size_t>(b)].results[i];
        if (const auto same = same_bits(results[i].view().sequence(b), one.view()); !same)
          return testing::AssertionFailure() << "result " << i << " of sequence " << b << ": " << same.message();
      }
      if (const auto intact = results[i].canaries_intact(); !intact)
        return testing::AssertionFailure() << "result " << i << ": " << intact.message();
    }
    for (const ragged_tensor<T>& operand : operands)
      if (const auto intact = operand.canaries_intact(); !intact) return intact;
    return testing::AssertionSuccess();
  }

 private:
  template <class Of>
  static std::vector<extents> extents_of(const alone<Pass>& from, const Of& of) {
    std::vector<extents> all;
    for (const auto& memory : from.memories) all.push_back(of(memory));
    return all;
  }
};

}  // namespace cca::test
