// Decoding through a cache. A case checks its last answer against the textbook before it is timed. Its counters:
//   byte/s     cores and window read, each byte once for all heads that share it
//   bandwidth  the share of the speed at which a plain loop reads as many bytes
//   dense/cca  how much longer a step over all keys and values takes
//   append/step  a token that comes without asking, pooling included, averaged over a group
//   speedup    of threads, where read_1_thread and read_threads are the plain loop's bytes per second; or of a cache of 16
//              or 8 bits over one of floats
//   cache_bytes, dense_bytes  what the cache holds, and all keys and values

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/kv_cache.hpp>
#include <cca/quantize.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "shape.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct decode_case {
  std::int64_t heads = 8, kv_heads = 8, length = 0, dim = 128, group_size = 16, window = 1024;
  cca::core_heads cores = cca::core_heads::per_query_head;
  int threads = 1;

  [[nodiscard]] cca::options options() const {
    return {.group_size = group_size, .window = window, .core_heads = cores};
  }

  [[nodiscard]] std::string name(const std::string& element) const {
    std::string text = "decode/" + element + "/D:" + std::to_string(dim) + "/H:" + std::to_string(heads);
    if (kv_heads != heads) {
      text += "/Hkv:" + std::to_string(kv_heads);
      text += cores == cca::core_heads::per_kv_head ? "/cores_per_kv_head" : "/cores_per_query_head";
    }
    text += "/L:" + std::to_string(length) + "/g:" + std::to_string(group_size) + "/s:" + std::to_string(window);
    return threads > 1 ? text + "/threads:" + std::to_string(threads) : text;
  }
};

/// Rounds rows to elements of the type, as a cache keeps them.
template <class Stored, class Scalar>
void round_to(tensor<Scalar>& rows) {
  if constexpr (std::is_same_v<Stored, cca::q8>) {
    const auto [batch, heads, length, dim] = rows.extent;
    std::vector<cca::q8> elements(static_cast<std::size_t>(dim));
    float scale = 0;
    for (std::int64_t i = 0; i < batch * heads * length; ++i) {
      Scalar* const row = rows.data.data() + i * dim;
      cca::quantize(cca::bhsd(std::as_const(row), 1, 1, 1, dim), cca::bhsd(elements.data(), 1, 1, 1, dim),
                    cca::bhs(&scale, 1, 1, 1));
      std::transform(elements.begin(), elements.end(), row,
                     [&](cca::q8 x) { return static_cast<Scalar>(x) * static_cast<Scalar>(scale); });
    }
  } else {
    for (Scalar& x : rows.data) x = static_cast<Scalar>(static_cast<Stored>(x));
  }
}

/// A cache that all but the last tokens have come to, and that last step. It answers in the type that it computes in.
template <class Element, class Core = Element>
class decoder {
 public:
  using T = cca::compute_type<Element>;
  using Token = typename cca::kv_cache<Element, Core>::number_type;

  explicit decoder(const decode_case& c)
      : case_(c),
        data_(1, c.heads, c.kv_heads, c.length, c.length, c.dim),
        answer_(1, c.heads, 1, c.dim),
        cache_({.heads = c.heads, .kv_heads = c.kv_heads, .dim = c.dim, .capacity = c.length, .rewind = 16},
               c.options()),
        visible_(1, 1, 1, visible_size() / static_cast<std::int64_t>(sizeof(float))),
        helpers_(c.threads - 1),
        none_(0) {
    cache_.append(tokens(data_.query, before()), tokens(data_.key, before()), tokens(data_.value, before()));
  }

  [[nodiscard]] const cca::kv_cache<Element, Core>& cache() const { return cache_; }
  [[nodiscard]] std::size_t visible_bytes() const { return visible_.data.size() * sizeof(float); }
  [[nodiscard]] std::size_t dense_bytes() const {
    return (data_.key.data.size() + data_.value.data.size()) * sizeof(Token);
  }

  /// The last token comes, completes a group that is pooled, and asks.
  double step(bool threads) {
    cache_.truncate(0, case_.length - 1);
    return clock(threads, [&](const auto& run) {
      cache_.attend(tokens(data_.query, last()), tokens(data_.key, last()), tokens(data_.value, last()), answer_.view(),
                    run);
    });
  }

  /// The same token asks all keys and values.
  double dense_step() {
    return seconds([&] {
      cca::attention(tokens(data_.query, last()), std::as_const(data_.key).view(), std::as_const(data_.value).view(),
                     answer_.view());
    });
  }

  /// The ruler: a plain loop over as many bytes as the step has to read.
  double read(bool threads) {
    return clock(threads, [&](const auto& run) {
      const std::int64_t pieces = cca::detail::concurrency(run);
      const std::int64_t count = static_cast<std::int64_t>(visible_.data.size()) / pieces;
      run(pieces, [&](std::int64_t i) { bench::read(visible_.data.data() + i * count, count); });
    });
  }

  /// The average of the tokens of one group that come without asking; the last of them completes it.
  double append() {
    const std::int64_t group = case_.options().group_size;
    cache_.truncate(0, case_.length - group);
    return seconds([&] {
             for (std::int64_t t = case_.length - group; t < case_.length; ++t)
               cache_.append(tokens(data_.query, {t, t + 1}), tokens(data_.key, {t, t + 1}),
                             tokens(data_.value, {t, t + 1}));
           }) /
           static_cast<double>(group);
  }

  /// Whether the last answer is right.
  [[nodiscard]] bool agrees() const {
    return bench::agrees(answer_, textbook<exact_type<T>, exact_type<T>>(), textbook<T, Core>());
  }

 private:
  [[nodiscard]] cca::range before() const { return {0, case_.length - 1}; }
  [[nodiscard]] cca::range last() const { return {case_.length - 1, case_.length}; }

  static cca::tensor_view<const Token> tokens(const tensor<Token>& of, cca::range part) {
    cca::tensor_view<const Token> view = of.view();
    view.data = view.row(0, 0, part.begin);
    view.extent[2] = part.size();
    return view;
  }

  /// Bytes of cores and window that the last token sees: each counts once for all heads that share it.
  [[nodiscard]] std::int64_t visible_size() const {
    const cca::partition partition = cca::partition_of(case_.options());
    const std::int64_t core_heads = case_.cores == cca::core_heads::per_kv_head ? case_.kv_heads : case_.heads;
    const std::int64_t cores = core_heads * partition.core_count(case_.length - 1),
                       raw = case_.kv_heads * partition.raw(case_.length - 1).size();
    return cores * cca::detail::row_bytes<Core>(case_.dim, case_.dim) +
           raw * cca::detail::row_bytes<Element>(case_.dim, case_.dim);
  }

  /// Seconds of `f`: of the thread, or by the clock on the wall where threads help.
  template <class F>
  double clock(bool threads, const F& f) {
    if (case_.threads == 1) return seconds([&] { f(cca::serial_executor{}); });
    return elapsed_seconds([&] { f(cca::thread_pool_executor(threads ? helpers_ : none_)); });
  }

  /// Computed in `Scalar` from tokens as the cache keeps them, and cores that are kept as `Stored`.
  template <class Scalar, class Stored>
  [[nodiscard]] tensor<Scalar> textbook() const {
    const cca::options options = case_.options();
    auto rounded = std::pair{data_.key, data_.value};
    for (tensor<Token>* rows : {&rounded.first, &rounded.second}) round_to<Element>(*rows);
    const auto key = std::as_const(rounded.first).view(), value = std::as_const(rounded.second).view();
    auto cores = cca::reference::pool<Scalar>(data_.query.view(), key, value, options);
    for (tensor<Scalar>* rows : {&cores.first, &cores.second}) round_to<Stored>(*rows);
    const cca::partition partition = cca::partition_of(options);
    const std::vector<std::int64_t> seen(static_cast<std::size_t>(case_.heads), partition.core_count(case_.length - 1));
    const cca::far_context far{std::as_const(cores.first).view(), std::as_const(cores.second).view(),
                               cca::bhs(seen.data(), 1, case_.heads, 1)};
    return cca::reference::attend<Scalar>(cca::inputs{tokens(data_.query, last()), key, value}, far, options).out;
  }

  decode_case case_;
  operands<Token> data_;
  tensor<T> answer_;
  cca::kv_cache<Element, Core> cache_;
  tensor<float> visible_;  // as many bytes
  Eigen::ThreadPool helpers_, none_;
};

/// Runs `f` a few times and times it once what it reads is in cache, as far as it fits.
template <class F>
double warm(const F& f) {
  f();
  return std::min({f(), f(), f()});
}
template <class F>
void warm(double& shortest, const F& f) {
  shortest = std::min(shortest, warm(f));
}

/// A step of decoding in floats. Whatever is compared takes turns.
void decoding(benchmark::State& state, const decode_case& c) {
  decoder<float> decoder(c);
  decoder.step(true);
  if (!decoder.agrees()) return state.SkipWithError("wrong result");

  const bool threads = c.threads > 1;
  iteration_times times(state);
  double serial = std::numeric_limits<double>::infinity(), read = serial, serial_read = serial, dense = serial,
         append = serial;
  for ([[maybe_unused]] auto _ : state) {
    dense = std::min(dense, decoder.dense_step());
    append = std::min(append, decoder.append());
    times.add(warm([&] { return decoder.step(true); }));
    warm(read, [&] { return decoder.read(true); });
    if (!threads) continue;
    warm(serial, [&] { return decoder.step(false); });
    warm(serial_read, [&] { return decoder.read(false); });
  }
  times.report();
  const double best = times.best();
  const auto bytes = static_cast<double>(decoder.visible_bytes());
  state.counters["byte/s"] = bytes / best;
  state.counters["bandwidth"] = read / best;
  state.counters["dense/cca"] = dense / best;
  state.counters["append/step"] = append / best;
  state.counters["token/s"] = 1 / best;
  state.counters["cache_bytes"] = static_cast<double>(decoder.cache().bytes());
  state.counters["dense_bytes"] = static_cast<double>(decoder.dense_bytes());
  if (!threads) return;
  state.counters["speedup"] = serial / best;
  state.counters["read_1_thread"] = bytes / serial_read;
  state.counters["read_threads"] = bytes / read;
}

/// A step through a cache of 16 or 8 bits, or of such cores, in turns with one through a cache of floats.
template <class Element, class Core>
void decoding_beside_floats(benchmark::State& state, const decode_case& c) {
  decoder<Element, Core> decoder(c);
  bench::decoder<float> floats(c);
  decoder.step(false);
  floats.step(false);
  if (!decoder.agrees() || !floats.agrees()) return state.SkipWithError("wrong result");

  iteration_times times(state);
  double of_floats = std::numeric_limits<double>::infinity(), read = of_floats;
  for ([[maybe_unused]] auto _ : state) {
    warm(of_floats, [&] { return floats.step(false); });
    times.add(warm([&] { return decoder.step(false); }));
    warm(read, [&] { return decoder.read(false); });
  }
  times.report();
  const double best = times.best();
  const auto bytes = static_cast<double>(decoder.visible_bytes());
  state.counters["byte/s"] = bytes / best;
  state.counters["bandwidth"] = read / best;
  state.counters["speedup"] = of_floats / best;
  state.counters["token/s"] = 1 / best;
  state.counters["cache_bytes"] = static_cast<double>(decoder.cache().bytes());
}

/// The bytes of a cache to which `length` tokens have come. All are views of one, for bytes do not depend on numbers.
void cache_memory(benchmark::State& state, cca::cache_shape shape, const cca::options& options, std::int64_t length) {
  shape.capacity = length;
  const tensor<float> token(1, shape.heads, 1, shape.dim);
  const auto repeated = [&](std::int64_t heads) {
    cca::tensor_view<const float> view = token.view();
    view.extent = {1, heads, length, shape.dim};
    view.stride[2] = 0;
    return view;
  };
  for ([[maybe_unused]] auto _ : state) {
    cca::kv_cache<float> cache(shape, options);
    state.SetIterationTime(
        seconds([&] { cache.append(repeated(shape.heads), repeated(shape.kv_heads), repeated(shape.kv_heads)); }));
    state.counters["cache_bytes"] = static_cast<double>(cache.bytes());
  }
}

void add_decoding(const decode_case& c) {
  add(c.name("float"), 0.02, [c](benchmark::State& state) { decoding(state, c); });
}

template <class Element, class Core = Element>
void add_decoding_beside_floats(const std::string& element, const decode_case& c) {
  add(c.name(element), 0.02, [c](benchmark::State& state) { decoding_beside_floats<Element, Core>(state, c); });
}

void add_cache_memory() {
  const auto add_lengths = [](const std::string& name, const cca::cache_shape& shape, const cca::options& options) {
    for (std::int64_t length = 512; length <= 128 * 1024; length *= 2)
      add("cache/" + name + "/L:" + std::to_string(length), 1,
          [=](benchmark::State& state) { cache_memory(state, shape, options, length); });
  };
  const cca::cache_shape mha{.heads = 8, .kv_heads = 8, .dim = 128}, gqa{.heads = 32, .kv_heads = 8, .dim = 128};
  cca::options cores{.group_size = 16, .window = 1024};
  add_lengths("dense/D:128/Hkv:8", mha, {});
  add_lengths("cca/D:128/H:8", mha, cores);
  add_lengths("cca/D:128/H:32/Hkv:8/cores_per_query_head", gqa, cores);
  cores.core_heads = cca::core_heads::per_kv_head;
  add_lengths("cca/D:128/H:32/Hkv:8/cores_per_kv_head", gqa, cores);
}

}  // namespace

void add_decode_cases() {
  using enum cca::core_heads;
  constexpr std::int64_t K = 1024;
  std::vector<decode_case> cases;
  for (const std::int64_t dim : {128, 64})
    for (const std::int64_t length : {128 * K, 32 * K}) cases.push_back({.length = length, .dim = dim});
  for (const cca::core_heads cores : {per_query_head, per_kv_head})
    cases.push_back({.heads = 32, .kv_heads = 8, .length = 32 * K, .cores = cores});
  for (const decode_case& c : cases) add_decoding(c);
  for (const decode_case& c : cases) {
    add_decoding_beside_floats<Eigen::bfloat16>("bfloat16", c);
    add_decoding_beside_floats<Eigen::half>("half", c);
    add_decoding_beside_floats<cca::q8>("q8", c);
  }
  add_decoding_beside_floats<float, Eigen::bfloat16>("float_cores_bfloat16", cases[0]);
  add_decoding_beside_floats<Eigen::bfloat16, float>("bfloat16_cores_float", cases[0]);
  add_decoding_beside_floats<float, cca::q8>("float_cores_q8", cases[0]);
  for (const std::int64_t length : {128 * K, 32 * K}) add_decoding({.length = length, .threads = 2});
  add_cache_memory();
}

void add_decode_shape(shape of) {
  const std::string type = of.take_text("dtype", "float"), cores = of.take_text("cores", "query_head");
  decode_case c{.heads = of.take("H", 8)};
  c.kv_heads = of.take("Hkv", c.heads);
  c.length = of.take("L", 32 * 1024);
  c.dim = of.take("D", 128);
  c.group_size = of.take("g", 16);
  c.window = of.take("s", 1024);
  c.threads = static_cast<int>(of.take("threads", 1));
  of.finish();
  if (cores != "query_head" && cores != "kv_head") of.refuse("cores", cores, "query_head or kv_head");
  c.cores = cores == "kv_head" ? cca::core_heads::per_kv_head : cca::core_heads::per_query_head;
  if (type == "float") return add_decoding(c);
  if (c.threads > 1) of.refuse("dtype", type, "float, with threads");
  if (type == "bf16") return add_decoding_beside_floats<Eigen::bfloat16>("bfloat16", c);
  if (type == "half") return add_decoding_beside_floats<Eigen::half>("half", c);
  of.refuse("dtype", type, "float, bf16 or half");
}

}  // namespace bench
