// A few hundred random calls of every entry point, whose results were saved before the kernels were rewritten: a sample of
// their elements, and their errors. Today's may differ from them by rounding alone.
//
// With CCA_SAVE_CALLS set to a file, the test appends what it computes to that file, and compares nothing.

#include "saved_calls.hpp"

#include <cstdlib>

#include "saved_calls_adapter.hpp"
#if defined(CCA_TEST_UNITS)
#include "amx_emulator.hpp"
#endif

namespace cca::test { namespace {

/// Sections of the file.
enum class section : std::uint32_t { float32, float64, bfloat16, half, cache };

const char* output_file() { return std::getenv("CCA_SAVE_CALLS"); }

/// Of results of one kind, how large their errors are beside what they may be. Each result counts in its own unit, so that
/// none hides behind larger ones; all of a kind are judged together, since of a few elements the error is a matter of luck.
class pooled_ratio {
 public:
  void add(long double squares, std::int64_t count, long double bound, const std::string& label) {
    const long double here = squares == 0 ? 0 : squares / (bound * bound);
    squares_ += here;
    count_ += count;
    if (here / static_cast<long double>(count) >= worst_) {
      worst_ = here / static_cast<long double>(count);
      label_ = label;
    }
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    const long double ratio = std::sqrt(squares_ / static_cast<long double>(std::max<std::int64_t>(count_, 1)));
    if (ratio <= 1) return testing::AssertionSuccess() << ratio;
    return testing::AssertionFailure() << ratio << " times what it may be; most, " << std::sqrt(worst_) << ", in "
                                       << label_;
  }

 private:
  long double squares_ = 0, worst_ = 0;
  std::int64_t count_ = 0;
  std::string label_;
};

/// Compares results with saved ones, or saves them.
class saved_results {
 public:
  explicit saved_results(section section) : section_(section) {}

  /// The record of the next call. `bits` says what its operands are.
  void begin(const std::string& label, std::uint32_t bits) {
    label_ = label;
    record_ = output_file() ? saved_record() : file().find({static_cast<std::uint32_t>(section_), place_});
    std::uint32_t saved_bits = bits;
    record_.exchange(saved_bits);
    ASSERT_EQ(saved_bits, bits) << "operands of another call: " << label;
  }
  void end() {
    EXPECT_TRUE(record_.used_up()) << label_;
    if (!record_.reading()) saved_file::append(output_file(), {static_cast<std::uint32_t>(section_), place_}, record_);
    skip();
  }
  /// Leaves a record out.
  void skip() { ++place_; }

  /// The next result of the call; those of the same `kind` are judged together.
  template <class T, class Exact>
  void add(const std::string& kind, const tensor_view<const T>& got, const reference::tensor<Exact>& exact) {
    ASSERT_EQ(got.extent, exact.extent) << kind << " of " << label_;
    const auto count = std::ssize(exact.data);
    if (count == 0) return;
    long double errors = 0, squares = 0;
    std::vector<T> all;
    for_each_row(got, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < got.dim(); ++d) {
        const auto x = static_cast<long double>(exact.view().row(b, h, i)[d]);
        const long double error = distance(got.row(b, h, i)[d], x);
        errors += error * error;
        if (std::isfinite(x)) squares += x * x;
        all.push_back(got.row(b, h, i)[d]);
      }
    });
    const auto mean = [&](long double x) { return static_cast<float>(std::sqrt(x / static_cast<long double>(count))); };
    float error = mean(errors), size = mean(squares);
    record_.exchange(error);
    record_.exchange(size);
    // No exact result of today's, which might be wrong like today's results, has a say in the bounds.
    const auto rounding = static_cast<long double>(std::numeric_limits<T>::epsilon()) * static_cast<long double>(size);
    const long double bound = 2 * static_cast<long double>(error) + rounding;
    ASSERT_TRUE(std::isfinite(bound)) << kind << " of " << label_;
    errors_[kind].add(errors, count, bound, label_);
    const std::int64_t sample = std::min<std::int64_t>(count, sample_size);
    long double distances = 0;
    for (std::int64_t j = 0; j < sample; ++j) {
      T& x = all[static_cast<std::size_t>(place_of(j, sample, count))];
      const T here = x;
      record_.exchange(x);
      distances += std::pow(distance(here, x), 2);
    }
    distances_[kind].add(distances, sample, bound + static_cast<long double>(error), label_);
  }

  void expect() const {
    for (const auto& [kind, ratio] : errors_) EXPECT_TRUE(report(kind + ", errors", ratio));
    for (const auto& [kind, ratio] : distances_)
      EXPECT_TRUE(report(kind + ", distances from the saved results", ratio));
  }

 private:
  static constexpr std::int64_t sample_size = 20;

  static const saved_file& file() {
    static const saved_file all(CCA_SAVED_CALLS);
    return all;
  }

  static testing::AssertionResult report(const std::string& what, const pooled_ratio& ratio) {
    const auto result = ratio.holds();
    if (std::getenv("CCA_SHOW_RATIOS")) std::printf("%-60s %s\n", what.c_str(), result.message());
    return result ? testing::AssertionSuccess() : testing::AssertionFailure() << what << ": " << result.message();
  }

  /// Spread over the elements, but not at equal distances, which might always hit the same column.
  static std::int64_t place_of(std::int64_t j, std::int64_t sample, std::int64_t count) {
    if (sample == count) return j;
    hash_numbers hash(static_cast<std::uint64_t>(j));
    return (j * count + hash.draw(0, count - 1)) / sample;
  }

  section section_;
  std::uint32_t place_ = 0;
  std::string label_;
  saved_record record_;
  std::map<std::string, pooled_ratio> errors_, distances_;
};

/// A hash of bits.
template <class T>
void add_bits(std::uint32_t& hash, const T& x) {
  std::array<unsigned char, sizeof x> bytes;
  std::memcpy(bytes.data(), &x, sizeof x);
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 16777619u;  // FNV-1a
}

template <class T>
std::uint32_t bits_of(const std::vector<tensor<T>>& tensors, std::uint32_t hash = 2166136261u) {
  for (const tensor<T>& t : tensors)
    for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < t.view().dim(); ++d) add_bits(hash, t.row(b, h, i)[d]);
    });
  return hash;
}

template <class T>
void fill(tensor<T>& t, hash_numbers& random, double deviation = 1) {
  t.generate([&] { return static_cast<T>(static_cast<compute_type<T>>(deviation * random.number())); });
}

/// Log-sum-exps of parts, of which some are empty.
template <class T>
void fill_lse(tensor<T>& t, hash_numbers& random) {
  t.generate([&] {
    const double x = 3 * random.number();
    return static_cast<T>(random.once_in(6) ? -std::numeric_limits<double>::infinity() : x);
  });
}

/// Makes a call and its gradient, and compares the results.
template <class T>
void check(const saved_call& c, const std::string& kind, saved_results& saved) {
  using R = compute_type<T>;
  using Exact = exact_type<R>;
  hash_numbers random(c.seed);
  const problem p = problem_of(c);
  std::vector<tensor<T>> operands, grad_results;
  std::vector<tensor<R>> results, grad_operands;
  for (const extents& e : operand_extents(p)) {
    operands.emplace_back(e, random.layout(true));
    fill(operands.back(), random, operands.size() <= 2 ? c.spread : 1.0);
    if (c.entry == entry::merge && operands.size() % 2 == 0) fill_lse(operands.back(), random);
    grad_operands.emplace_back(e, random.layout(false));
  }
  for (const extents& e : result_extents(p)) {
    results.emplace_back(e, random.layout(false));
    grad_results.emplace_back(e, random.layout(true));
    fill(grad_results.back(), random);
  }
  tensor<R> grad_lse(results.back().view().extent, random.layout(true));
  fill(grad_lse, random);
  tensor<std::int64_t, 3> seen({c.sizes.batch, c.sizes.heads, c.entry == entry::attend ? c.sizes.queries : 0},
                               random.layout(true));
  seen.generate([&] { return random.draw(0, c.far_length); });

  saved_arguments<T> a{.operands = {},
                       .seen = seen.view(),
                       .results = {},
                       .grad_results = {},
                       .grad_lse = grad_lse.view(),
                       .grad_operands = {}};
  for (tensor<T>& t : operands) a.operands.push_back(t.view());
  for (tensor<R>& t : results) a.results.push_back(t.view());
  for (tensor<R>& t : grad_operands) a.grad_operands.push_back(t.view());
  for (tensor<T>& t : grad_results) a.grad_results.push_back(t.view());
  if (c.entry != entry::pool) a.grad_results.resize(1);

  std::ostringstream label;
  label << c;
  saved.begin(label.str(), bits_of(operands));
  const auto compare = [&](const std::vector<tensor_view<R>>& got, const auto& exact, const std::string& of) {
    for (std::size_t i = 0; i < got.size(); ++i) saved.add<R>(kind + of + std::to_string(i), got[i], exact[i]);
  };
  forward(c, a);
  compare(a.results, exact_forward<Exact>(c, a), ", result ");
  if (c.entry != entry::merge) {
    backward(c, a);
    compare(a.grad_operands, exact_backward<Exact>(c, a), ", gradient ");
  }
  saved.end();
  for (const auto* tensors : {&results, &grad_operands})
    for (const tensor<R>& t : *tensors) EXPECT_TRUE(t.canaries_intact()) << label.str();
}

template <class T, class Entries>
void check_calls(section section, const Entries& entries, int units, int count) {
  saved_results saved(section);
  hash_numbers random(static_cast<std::uint64_t>(section) + 1);
  for (const entry entry : entries)
    for (int unit = 0; unit < units; ++unit)
      for (int i = 0; i < count; ++i) {
        saved_call c = draw_call(entry, i, random);
        c.unit = unit;
        if (!has_saved_unit<T>(unit)) {
          saved.skip();
          continue;
        }
        std::ostringstream kind;
        kind << entry << ", unit " << unit;
        ASSERT_NO_FATAL_FAILURE(check<T>(c, kind.str(), saved));
      }
  saved.expect();
}

TEST(SavedCalls, Float) { check_calls<float>(section::float32, all_entries, 1, 24); }
TEST(SavedCalls, Double) { check_calls<double>(section::float64, all_entries, 1, 16); }

// --------------------------------------------------------------------------------------------------------- caches

/// Sequences of a cache, and all that they were given.
template <class T>
struct saved_sequence {
  operands<T> tokens;                    // the first `length` of them
  std::int64_t length = 0, longest = 0;  // longest: since it was empty
};

/// A cache that is given tokens one by one and in chunks, truncated, forked, and reset.
template <class T, class Core>
void check_life(const saved_life& life, const std::string& kind, saved_results& saved) {
  using R = compute_type<T>;
  using Exact = exact_type<R>;
  hash_numbers random(life.options.seed);
  const cache_setup setup = setup_of(life);
  auto cache = setup.make<T, Core>();
  std::ostringstream label;
  label << life;
  std::vector<saved_sequence<T>> known;
  for (std::int64_t b = 0; b < life.batch; ++b) {
    const sizes s = setup.step(1, longest_life);
    known.push_back({.tokens = {tensor<T>({1, s.heads, s.keys, s.dim}), tensor<T>({1, s.kv_heads, s.keys, s.dim}),
                                tensor<T>({1, s.kv_heads, s.keys, s.value_dim})}});
  }
  saved.begin(label.str(), static_cast<std::uint32_t>(random.next()));

  const auto step_of = [&](range batch, std::int64_t count) {
    const sizes s = setup.step(batch.size(), count);
    operands<T> fresh{tensor<T>({s.batch, s.heads, count, s.dim}, random.layout(true)),
                      tensor<T>({s.batch, s.kv_heads, count, s.dim}, random.layout(true)),
                      tensor<T>({s.batch, s.kv_heads, count, s.value_dim}, random.layout(true))};
    for (tensor<T>* t : {&fresh.query, &fresh.key, &fresh.value}) fill(*t, random);
    const token_views<T> tokens = views_of(fresh);
    const layout out_layout = random.layout(false), lse_layout = random.layout(false);
    const results<R> got = collect<R>(
        s,
        [&](tensor_view<R> out, lse_view<R> lse) {
          step(cache, batch.size() == life.batch ? std::nullopt : std::optional(batch.begin), tokens, out, lse);
        },
        out_layout, lse_layout);
    for (std::int64_t b = batch.begin; b < batch.end; ++b) {
      saved_sequence<T>& of = known[static_cast<std::size_t>(b)];
      const token_views<T> added = sequence_of(tokens, b - batch.begin);
      const range place{of.length, of.length + count};
      copy<T>(added.query, tokens_of(of.tokens.query.view(), place));
      copy<T>(added.key, tokens_of(of.tokens.key.view(), place));
      copy<T>(added.value, tokens_of(of.tokens.value.view(), place));
      of.length += count;
      of.longest = std::max(of.longest, of.length);
      const auto exact = exact_step<Exact>(tokens_of(of.tokens, {0, of.length}), count, setup.options);
      const auto answer = sequence_of(got, b - batch.begin);
      saved.add<R>(kind + ", out", answer.out.view(), exact.out);
      saved.add<R>(kind + ", lse", with_dim(answer.lse.view()), exact.lse);
    }
  };
  for (int i = 0; i < 9; ++i) {
    const std::int64_t b = random.draw(0, life.batch - 1);
    saved_sequence<T>& of = known[static_cast<std::size_t>(b)];
    const range batch = random.once_in(3) ? range{0, life.batch} : range{b, b + 1};
    std::int64_t room = longest_life;
    for (std::int64_t j = batch.begin; j < batch.end; ++j)
      room = std::min(room, longest_life - known[static_cast<std::size_t>(j)].length);
    const std::int64_t most = random.choice(std::array<std::int64_t, 5>{1, 1, 4, 20, 50}),
                       kind_of_step = random.draw(0, 9);
    if (kind_of_step == 0) {
      const std::int64_t to = random.draw(0, life.batch - 1);
      cache.fork(b, to);
      known[static_cast<std::size_t>(to)] = saved_sequence<T>(of);
    } else if (kind_of_step == 1 && random.once_in(3)) {
      cache.reset(b);
      of.length = of.longest = 0;
    } else if (kind_of_step <= 3) {
      // As far as every cache goes, whatever else it keeps.
      of.length = random.draw(std::max<std::int64_t>(of.longest - life.rewind, 0), of.length);
      cache.truncate(b, of.length);
    } else if (room > 0) {
      ASSERT_NO_FATAL_FAILURE(step_of(batch, random.draw(1, std::min(most, room))));
    }
  }
  saved.end();
}

/// Places of the cache section, of each kind of cache.
constexpr std::uint32_t lives = 8;

template <class T, class Core = T>
void check_lives(std::uint32_t kind, int unit = 0) {
  if (!has_saved_unit<T>(unit)) GTEST_SKIP() << "not on this processor";
  saved_results saved(section::cache);
  for (std::uint32_t i = 0; i < kind * lives; ++i) saved.skip();
  hash_numbers random(100 + kind);
  for (std::uint32_t i = 0; i < lives; ++i) {
    saved_life life = draw_life(random);
    life.options.unit = unit;
    ASSERT_NO_FATAL_FAILURE((check_life<T, Core>(life, "cache", saved)));
  }
  saved.expect();
}

TEST(SavedCaches, Float) { check_lives<float>(0); }
TEST(SavedCaches, Double) { check_lives<double>(3); }
#if !defined(CCA_TEST_THROUGH_DISPATCH)
TEST(SavedCaches, FloatAndBfloat16Cores) { check_lives<float, Eigen::bfloat16>(1); }
TEST(SavedCaches, FloatAndHalfCores) { check_lives<float, Eigen::half>(2); }
TEST(SavedCaches, DoubleAndFloatCores) { check_lives<double, float>(4); }
#endif

#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone

/// A processor without AMX has it emulated, where it can be.
class SavedUnits : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto& present = detail::present_units();
    if (!present.amx_bf16 && install_amx_emulator()) present.amx_bf16 = present.amx_fp16 = true;
  }
};

TEST_F(SavedUnits, Bfloat16) { check_calls<Eigen::bfloat16>(section::bfloat16, unit_entries, 3, 10); }
TEST_F(SavedUnits, Half) { check_calls<Eigen::half>(section::half, unit_entries, 3, 10); }
TEST_F(SavedUnits, CacheOfBfloat16) { check_lives<Eigen::bfloat16>(5); }
TEST_F(SavedUnits, CacheOfHalf) { check_lives<Eigen::half>(6); }
TEST_F(SavedUnits, CacheOnAvx512) { check_lives<Eigen::bfloat16>(7, 1); }
TEST_F(SavedUnits, CacheOnAmx) { check_lives<Eigen::bfloat16>(8, 2); }

#endif

}}  // namespace cca::test
