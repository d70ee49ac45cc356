#pragma once

// Every entry point as one kind of call: a test of robustness is written once for all of them.
//
// With CCA_TEST_THROUGH_DISPATCH the calls go to the kernels of cca::dispatch: the tests are compiled once, and run for each
// of its architectures. Without, they are those of the headers, which are compiled once, in entry_points.cpp, for all tests
// of an instruction set.

#include <cstddef>
#include <functional>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "support.hpp"
#include "tile_sizes.hpp"
#if defined(CCA_TEST_THROUGH_DISPATCH)
#include <cca/dispatch.hpp>
#endif

namespace cca::test {

/// Where the functions of the library come from.
namespace through {
#if defined(CCA_TEST_THROUGH_DISPATCH)
using namespace cca::dispatch;
#else
using namespace cca;
#endif
}  // namespace through

enum class entry { dense, local, attention, attend, pool, merge };

inline constexpr std::array all_entries{entry::dense,  entry::local, entry::attention,
                                        entry::attend, entry::pool,  entry::merge};

inline std::ostream& operator<<(std::ostream& to, entry entry) {
  return to << std::array{"dense", "local", "attention", "attend", "pool", "merge"}[static_cast<std::size_t>(entry)];
}

/// What a call is about. Far context is for `attend` alone. `merge` joins parts that have the extents of the output and
/// takes no options.
struct problem {
  test::entry entry = entry::dense;
  test::sizes sizes{};
  std::int64_t far_heads = 1, far_length = 0;
  cca::options options{};

  friend std::ostream& operator<<(std::ostream& to, const problem& p) {
    return to << p.entry << ", " << describe(p.sizes) << ", far " << p.far_heads << " x " << p.far_length << ", "
              << describe(p.options);
  }
};

/// The entry point with the sizes and options that fit it: a window that is shorter than most lengths, groups where
/// there are any, far context with as many heads as the keys have.
inline problem example(entry entry, const sizes& s) {
  problem p{.entry = entry, .sizes = s};
  if (entry == entry::attention || entry == entry::pool) p.sizes.queries = s.keys;
  if (entry == entry::attention || entry == entry::local) p.options = {.group_size = 3, .window = 7};
  if (entry == entry::pool) p.options = {.group_size = 3};
  if (entry == entry::attend) {
    p.options = {.window = 7};
    p.far_heads = s.kv_heads;
    p.far_length = s.keys + 3;
  }
  return p;
}

using extents = std::array<std::int64_t, 4>;

/// Operands in the order of the entry point's parameters. The log-sum-exps among them, and among the results, are of
/// dim 1 here, so that one kind of memory serves all.
inline std::vector<extents> operand_extents(const problem& p) {
  const sizes& s = p.sizes;
  if (p.entry == entry::merge) {
    const extents out{s.batch, s.heads, s.queries, s.value_dim}, lse{s.batch, s.heads, s.queries, 1};
    return {out, lse, out, lse};
  }
  std::vector<extents> all{{s.batch, s.heads, s.queries, s.dim},
                           {s.batch, s.kv_heads, s.keys, s.dim},
                           {s.batch, s.kv_heads, s.keys, s.value_dim}};
  if (p.entry == entry::attend) {
    all.push_back({s.batch, p.far_heads, p.far_length, s.dim});
    all.push_back({s.batch, p.far_heads, p.far_length, s.value_dim});
  }
  return all;
}

/// The output and its log-sum-exps, or core keys and values.
inline std::vector<extents> result_extents(const problem& p) {
  const sizes& s = p.sizes;
  if (p.entry != entry::pool) return {{s.batch, s.heads, s.queries, s.value_dim}, {s.batch, s.heads, s.queries, 1}};
  const std::int64_t heads = detail::core_head_count(p.options, s.heads, s.kv_heads);
  const std::int64_t groups = partition_of(p.options).group_count(s.keys);
  return {{s.batch, heads, groups, s.dim}, {s.batch, heads, groups, s.value_dim}};
}

/// How many far rows query `i` sees: none, all, and much between.
inline std::int64_t seen_count(const problem& p, std::int64_t b, std::int64_t h, std::int64_t i) {
  return (7 * i + 3 * h + b) % (p.far_length + 1);
}

template <class T>
struct arguments {
  std::vector<tensor_view<const T>> operands;
  std::vector<tensor_view<T>> results;
  lse_view<const std::int64_t> seen;
  // With their gradients, where gradients are asked for.
  lse_view<const T> sinks{}, slopes{}, key_bias{}, far_bias{};
  lse_view<T> grad_sinks{}, grad_slopes{}, grad_key_bias{}, grad_far_bias{};
  lse_view<const std::int64_t> positions{};  // of far rows
  lse_view<const std::int64_t> visible_from{}, visible_until{};
  far_selection selected{};
};

/// The first operands as those of attention.
template <class T>
inputs<T> inputs_of(const arguments<T>& a) {
  return {a.operands[0], a.operands[1], a.operands[2], a.sinks, a.slopes, a.key_bias};
}

/// The operands behind them as far context.
template <class T>
far_context<T> far_of(const arguments<T>& a) {
  return {a.operands[3], a.operands[4],  a.seen,          a.far_bias,
          a.positions,   a.visible_from, a.visible_until, a.selected};
}

/// An executor that is chosen at run time.
struct any_executor {
  std::int64_t threads = 1;
  std::function<void(std::int64_t, const std::function<void(std::int64_t)>&)> run = serial_executor{};

  [[nodiscard]] std::int64_t concurrency() const { return threads; }

  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    run(n, std::ref(f));
  }
};

template <class T>
void call(const problem& p, const arguments<T>& a, const any_executor& run = {}, std::span<std::byte> workspace = {});

/// What `workspace_size` says; 0 for `merge`, which needs none.
template <class T>
std::size_t workspace_size(const problem& p, const arguments<T>& a, const any_executor& run = {});

/// Memory for all arguments of a call. Layouts are drawn by `next_layout()`, in the order operands, seen, results.
template <class T>
struct argument_memory {
  std::vector<tensor<T>> operands, results;
  tensor<std::int64_t, 3> seen;

  template <class NextLayout>
  argument_memory(const problem& p, const NextLayout& next_layout)
      : seen({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0}) {
    for (const extents& e : operand_extents(p)) operands.emplace_back(e, next_layout(true));
    seen = tensor<std::int64_t, 3>(seen.view().extent, next_layout(true));
    for (const extents& e : result_extents(p)) results.emplace_back(e, next_layout(false));
    for_each_row(seen.view(),
                 [&](std::int64_t b, std::int64_t h, std::int64_t i) { *seen.row(b, h, i) = seen_count(p, b, h, i); });
  }

  explicit argument_memory(const problem& p) : argument_memory(p, [](bool) { return layout{}; }) {}

  argument_memory& randomize(random_engine& random) {
    for (tensor<T>& operand : operands) operand.randomize(random);
    return *this;
  }

  [[nodiscard]] test::arguments<T> arguments() {
    test::arguments<T> a{.operands = {}, .results = {}, .seen = seen.view()};
    for (const tensor<T>& operand : operands) a.operands.push_back(operand.view());
    for (tensor<T>& result : results) a.results.push_back(result.view());
    return a;
  }

  [[nodiscard]] testing::AssertionResult canaries_intact() const {
    for (const auto* tensors : {&operands, &results})
      for (const tensor<T>& t : *tensors)
        if (const auto intact = t.canaries_intact(); !intact) return intact;
    return seen.canaries_intact();
  }
};

/// All results alike.
template <class T>
testing::AssertionResult same_bits(const std::vector<tensor_view<T>>& a, const std::vector<tensor_view<T>>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (const auto same = same_bits(a[i], b[i]); !same)
      return testing::AssertionFailure() << "result " << i << ": " << same.message();
  return testing::AssertionSuccess();
}

/// Copies the elements of one view to another of the same extents.
template <class T>
void copy(tensor_view<const std::type_identity_t<T>> from, tensor_view<T> to) {
  for_each_row(to, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    std::copy_n(from.row(b, h, i), to.dim(), to.row(b, h, i));
  });
}

/// The reference of most tests here: the same call on operands that lie one after the other, alone in memory, serially.
template <class T>
argument_memory<T> plain_call(const problem& p, const std::vector<tensor_view<const T>>& operands) {
  argument_memory<T> memory(p);
  for (std::size_t i = 0; i < operands.size(); ++i) copy(operands[i], memory.operands[i].view());
  call(p, memory.arguments());
  return memory;
}

}  // namespace cca::test
