// Text generation on top of `cca`: SmolLM2-135M-Instruct reads a prompt and writes on, with a `cca::kv_cache` per layer
// that keeps all keys and values (dense attention), or a window of them and cores (Core Context Aware attention).
// The text goes to the standard output, everything about it to the standard error.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cca/cca.hpp>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "../common/progress.hpp"
#include "../common/safetensors.hpp"
#include "attentions.hpp"
#include "model.hpp"
#include "sampler.hpp"
#include "vocabulary.hpp"

namespace {

using namespace smollm2;
using common::progress;

struct arguments {
  std::string folder;
  std::optional<std::int64_t> prompt_tokens;
  std::int64_t new_tokens = 256;
  std::string attention = "32/1024/shared/mass";
  std::int64_t sink_tokens = 4;
  bool compare = false;
  sampling_options sampling;
  std::vector<std::string> stops;
  std::int64_t chunk = 512;
  int threads = 2;
};

inline constexpr std::int64_t default_prompt_tokens = 4096;

/// An attention to generate with.
struct variant {
  std::string name;
  cca::options options;
};

std::vector<variant> variants(const arguments& arguments) {
  const auto options = parse_attention("--attention", arguments.attention, arguments.sink_tokens);
  const variant chosen{name_of(options), options};
  if (arguments.compare) return {{"dense", {}}, chosen};
  return {chosen};
}

/// A text in the making: the model with a cache for each of its layers.
class decoder {
 public:
  decoder(const model& model, const cca::options& options, std::int64_t capacity, cca::openmp_executor executor)
      : model_(model), executor_(executor) {
    const config& sizes = model.sizes();
    const cca::cache_shape shape{
        .heads = sizes.heads, .kv_heads = sizes.kv_heads, .dim = sizes.head_dim, .capacity = capacity};
    for (std::int64_t i = 0; i < sizes.layers; ++i) caches_.emplace_back(shape, options);
  }

  /// Appends tokens to the text; returns the hidden state of the last one.
  matrix append(
      std::span<const std::int32_t> tokens, const std::function<void()>& on_layer = [] {}) {
    const pass pass = model_.run(
        tokens, length(),
        [this](std::int64_t layer, input_view query, input_view key, input_view value, output_view out) {
          caches_[static_cast<std::size_t>(layer)].attend(query, key, value, out, executor_);
        },
        on_layer);
    attention_seconds_ += pass.attention_seconds;
    return pass.hidden.bottomRows(1);
  }

  [[nodiscard]] std::int64_t length() const { return caches_.front().length(); }
  /// Time inside `cca`, over all layers and all that was appended.
  [[nodiscard]] double attention_seconds() const { return attention_seconds_; }
  /// Bytes of the keys and values held, over all layers.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& cache : caches_) total += cache.bytes();
    return total;
  }

 private:
  const model& model_;
  cca::openmp_executor executor_;
  std::vector<cca::kv_cache<float>> caches_;
  double attention_seconds_ = 0;
};

/// What generating a text left.
struct generation {
  std::vector<std::int32_t> tokens;
  std::string end;  // why it ended
  double prefill_seconds = 0;
  double decode_seconds = 0;
  double attention_seconds = 0;  // while decoding
  std::int64_t steps = 0;        // of decoding: the first token comes out of the prefill, the last is not appended
  std::int64_t length = 0;       // tokens in the cache
  std::size_t bytes = 0;
};

void show(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout) != 0) throw std::system_error(errno, std::generic_category(), "cannot write the text");
}

/// Appends the prompt in chunks: the hidden states of one are there at a time, not those of the whole prompt.
matrix read_prompt(decoder& decoder, std::span<const std::int32_t> prompt, std::int64_t chunk, std::int64_t layers) {
  const std::int64_t length = std::ssize(prompt);
  progress bar((length + chunk - 1) / chunk * layers);
  matrix hidden;
  for (std::int64_t first = 0; first < length; first += chunk) {
    const std::int64_t count = std::min(chunk, length - first);
    hidden = decoder.append(prompt.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)),
                            [&] { bar.step("reading the prompt"); });
  }
  bar.hide();
  return hidden;
}

generation generate(const model& model, const vocabulary& vocabulary, std::span<const std::int32_t> prompt,
                    const cca::options& options, const arguments& arguments) {
  decoder decoder(model, options, std::ssize(prompt) + arguments.new_tokens,
                  cca::openmp_executor{.threads = arguments.threads});
  sampler sample(arguments.sampling);
  text_stream text(arguments.stops);
  generation result;

  const stopwatch prefill;
  matrix hidden = read_prompt(decoder, prompt, arguments.chunk, model.sizes().layers);
  result.prefill_seconds = prefill.seconds();

  const double attention_before = decoder.attention_seconds();
  const stopwatch decode;
  while (true) {
    const matrix logits = model.logits(hidden);
    const std::int32_t token = sample({logits.data(), static_cast<std::size_t>(logits.size())});
    if (vocabulary.is_final(token)) {
      result.end = fmt::format("the model ended it with {}", vocabulary.piece(token));
      break;
    }
    result.tokens.push_back(token);
    show(text.add(vocabulary.piece(token)));
    if (text.stopped()) {
      result.end = "a string to stop at came";
      break;
    }
    if (std::ssize(result.tokens) == arguments.new_tokens) {
      result.end = "as many as wanted";
      break;
    }
    hidden = decoder.append({&token, 1});
    ++result.steps;
  }
  show(text.finish() + "\n");
  result.decode_seconds = decode.seconds();
  result.attention_seconds = decoder.attention_seconds() - attention_before;
  result.length = decoder.length();
  result.bytes = decoder.bytes();
  return result;
}

/// Bytes that dense attention keeps of so many tokens.
double dense_bytes(const config& model, std::int64_t tokens) {
  return static_cast<double>(model.layers * model.kv_heads * tokens * 2 * model.head_dim) * sizeof(float);
}

void print_line(const std::array<std::string, 7>& cells) {
  fmt::print(stderr, "| {:<28} | {:>17} | {:>16} | {:>19} | {:>9} | {:>13} | {:>10} |\n", cells[0], cells[1], cells[2],
             cells[3], cells[4], cells[5], cells[6]);
}

void print_table(std::span<const variant> variants, std::span<const generation> generations, const config& model,
                 std::int64_t prompt_tokens) {
  print_line({"attention", "prefill, tokens/s", "decode, tokens/s", "attention/token, ms", "cache, MB", "per token, kB",
              "of dense, %"});
  print_line({"---", "---:", "---:", "---:", "---:", "---:", "---:"});
  for (std::size_t i = 0; i < variants.size(); ++i) {
    const generation& text = generations[i];
    const auto steps = static_cast<double>(text.steps);
    const auto bytes = static_cast<double>(text.bytes);
    const auto number = [&](double value) { return text.steps == 0 ? "-" : fmt::format("{:.2f}", value); };
    print_line({variants[i].name, fmt::format("{:.1f}", static_cast<double>(prompt_tokens) / text.prefill_seconds),
                number(steps / text.decode_seconds), number(1e3 * text.attention_seconds / steps),
                fmt::format("{:.2f}", bytes / 1e6),
                fmt::format("{:.2f}", bytes / 1e3 / static_cast<double>(text.length)),
                fmt::format("{:.1f}", 100 * bytes / dense_bytes(model, text.length))});
  }
}

void print_comparison(const generation& a, const generation& b) {
  const auto parting = std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end()).first;
  if (a.tokens == b.tokens) {
    fmt::print(stderr, "\nThe texts are the same, all {} tokens.\n", a.tokens.size());
  } else {
    fmt::print(stderr, "\nThe texts are the same for {} tokens, then they part.\n", parting - a.tokens.begin());
  }
}

/// The end of the prompt, as whole characters, so that one sees where the text goes on from.
std::string last_words(const vocabulary& vocabulary, std::span<const std::int32_t> prompt) {
  std::string words;
  for (const std::int32_t token : prompt.last(std::min<std::size_t>(prompt.size(), 32))) {
    words += vocabulary.piece(token);
  }
  const auto inside = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) == 0x80U; };
  return {std::find_if_not(words.begin(), words.end(), inside), words.end()};
}

void run(const arguments& arguments) {
  const cca::openmp_executor executor{.threads = arguments.threads};
  const model model(arguments.folder + "/model.safetensors", executor);
  const config& sizes = model.sizes();
  const vocabulary vocabulary(arguments.folder + "/vocabulary.safetensors", sizes.vocabulary);
  const safetensors text(arguments.folder + "/text.safetensors");
  auto prompt = read_tokens(text, arguments.prompt_tokens, "--prompt-tokens", sizes);
  if (!arguments.prompt_tokens) prompt = prompt.first(std::min<std::size_t>(prompt.size(), default_prompt_tokens));
  const std::int64_t longest = std::ssize(prompt) + arguments.new_tokens;
  if (longest > sizes.context) {
    fmt::print(stderr, "Note: up to {} tokens, but the model was trained on {}.\n", longest, sizes.context);
  }

  // The file's pages and OpenMP's threads come in with the first use: not on the time of the first text.
  (void)model.logits(decoder(model, {}, 1, executor).append(prompt.first(1)));

  const std::vector<variant> chosen = variants(arguments);
  std::vector<generation> generations;
  fmt::print(stderr, "{} tokens of prompt, {} threads. The prompt ends: ...{}\n", prompt.size(), arguments.threads,
             last_words(vocabulary, prompt));
  for (const variant& variant : chosen) {
    fmt::print(stderr, "\n[{}]\n", variant.name);
    generations.push_back(generate(model, vocabulary, prompt, variant.options, arguments));
    fmt::print(stderr, "[{} tokens: {}]\n", generations.back().tokens.size(), generations.back().end);
  }
  fmt::print(stderr, "\n");
  print_table(chosen, generations, sizes, std::ssize(prompt));
  if (arguments.compare) print_comparison(generations.front(), generations.back());
}

/// CLI11 asks this of a value; its answer is what is wrong with it.
std::string not_empty(const std::string& text) { return text.empty() ? "wants a string that is not empty" : ""; }

}  // namespace

int main(int argc, char** argv) {
  constexpr int most = 1 << 30;
  arguments arguments;
  sampling_options& sampling = arguments.sampling;
  CLI::App app("Text generation by SmolLM2-135M-Instruct, with a cache for dense or for Core Context Aware attention");
  app.add_option("folder", arguments.folder, "What prepare.py has written")->required()->check(CLI::ExistingDirectory);
  app.add_option("--prompt-tokens", arguments.prompt_tokens,
                 fmt::format("The prompt: tokens of the text, from its start [{}, or all]", default_prompt_tokens))
      ->check(CLI::Range(1, most));
  app.add_option("--new-tokens", arguments.new_tokens, "Tokens to generate at most")
      ->check(CLI::Range(1, most))
      ->capture_default_str();
  app.add_option("--attention", arguments.attention, std::string("What a token sees: ") + attention_forms)
      ->capture_default_str();
  app.add_option("--sink-tokens", arguments.sink_tokens, "First tokens that stay raw beside every window")
      ->check(CLI::Range(0, most))
      ->capture_default_str();
  app.add_flag("--compare", arguments.compare, "Dense attention first, then this");
  app.add_option("--temperature", sampling.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--top-k", sampling.top_k, "Only so many of the likeliest tokens; 0: all")
      ->check(CLI::Range(0, most))
      ->capture_default_str();
  app.add_option("--top-p", sampling.top_p, "Only the likeliest tokens that have this probability together")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--seed", sampling.seed, "Of the random choice")->capture_default_str();
  app.add_option("--stop", arguments.stops, "End the text before this string; may be given several times")
      ->check(not_empty)
      ->allow_extra_args(false);
  app.add_option("--chunk", arguments.chunk, "Tokens of the prompt that are read at once")
      ->check(CLI::Range(1, most))
      ->capture_default_str();
  app.add_option("--threads", arguments.threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    run(arguments);
  } catch (const std::exception& error) {
    fmt::print(stderr, "smollm2_generate: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
