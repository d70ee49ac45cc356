// A language model on top of `cca`: takes a text through SmolLM2-135M-Instruct with dense, Core Context Aware and
// sliding-window attention, and prints what each costs and how well the model then predicts the text.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cca/cca.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../common/progress.hpp"
#include "../common/safetensors.hpp"
#include "attentions.hpp"
#include "model.hpp"

namespace {

using namespace smollm2;
using common::progress;

struct arguments {
  std::string folder;
  std::int64_t tokens = 8192;
  int threads = 2;
  std::vector<std::string> rows = {"dense",
                                   "window/256/sinks=0",
                                   "window/256",
                                   "16/256",
                                   "16/256/shared",
                                   "16/256/shared/sharpen=4",
                                   "16/256/shared/select",
                                   "window/1024/sinks=0",
                                   "window/1024",
                                   "16/512/shared/select",
                                   "16/1024/sinks=0",
                                   "16/1024/shared/sinks=0",
                                   "16/1024",
                                   "16/1024/shared",
                                   "16/1024/shared/select",
                                   "window/2048",
                                   "16/1536/shared/select"};
  std::int64_t sink_tokens = 4;
  std::string logits;
};

/// One line of the table.
struct row {
  std::string name;
  attention_function attention;
  std::int64_t kv_entries;  // that the last token reads: keys, over all heads of a layer
};

/// Behind a form of attention: its keys, values and cores are rounded to rows of 8 bits.
constexpr std::string_view rounded_suffix = "/q8";

row parse_row(std::string text, const config& model, std::int64_t tokens, std::int64_t sink_tokens,
              cca::openmp_executor executor) {
  const bool rounded = text.ends_with(rounded_suffix);
  if (rounded) text.resize(text.size() - rounded_suffix.size());
  const cca::options options = parse_attention("--rows", text, sink_tokens);
  const cca::partition partition = cca::partition_of(options);
  const std::int64_t last = tokens - 1;
  const bool shared = options.core_heads == cca::core_heads::per_kv_head;
  const cca::range raw = cca::intersection(partition.raw(last), {0, tokens});
  return {name_of(options) + (rounded ? ", 8 bits" : ""),
          [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
            if (!rounded) return cca::attention(query, key, value, out, options, executor);
            cca::kv_cache<cca::q8> cache({.heads = query.heads(), .kv_heads = key.heads(), .dim = query.dim()}, options);
            cache.attend(query, key, value, out, executor);
          },
          (shared ? model.kv_heads : model.heads) * partition.core_count(last) +
              model.kv_heads * (partition.sinks(last).size() + raw.size())};
}

/// A line of the table, shown at once.
void print_line(const std::array<std::string, 7>& cells) {
  fmt::print("| {:<45} | {:>10} | {:>12} | {:>8} | {:>8} | {:>18} | {:>13} |\n", cells[0], cells[1], cells[2], cells[3],
             cells[4], cells[5], cells[6]);
  std::fflush(stdout);
}

void print_table(const arguments& arguments, const model& model, std::span<const std::int32_t> tokens) {
  const cca::openmp_executor executor{.threads = arguments.threads};
  const auto length = static_cast<std::int64_t>(tokens.size());
  std::vector<row> rows;
  for (const std::string& text : arguments.rows)
    rows.push_back(parse_row(text, model.sizes(), length, arguments.sink_tokens, executor));

  // The file's pages and OpenMP's threads come in with the first use: not on the time of the first row.
  (void)model.run(tokens.first(std::min<std::size_t>(tokens.size(), token_block)), 0, rows.front().attention);

  progress bar(static_cast<std::int64_t>(rows.size()) * (model.sizes().layers + 1));
  std::optional<double> dense_seconds;
  const config& sizes = model.sizes();
  fmt::print("{} layers, {} query and {} key/value heads of {}, trained on {} tokens; here {} tokens, {} threads\n\n",
             sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.context, length, arguments.threads);
  print_line(
      {"attention", "perplexity", "attention, s", "total, s", "tokens/s", "attention speed-up", "KV entries, %"});
  print_line({"---", "---:", "---:", "---:", "---:", "---:", "---:"});
  for (const row& row : rows) {
    const pass prefill = model.run(tokens, 0, row.attention, [&] { bar.step(row.name); });
    const double perplexity = model.perplexity(prefill.hidden, tokens);
    bar.step(row.name);
    if (row.name == "dense") dense_seconds = prefill.attention_seconds;
    bar.hide();
    print_line({row.name, fmt::format("{:.3f}", perplexity), fmt::format("{:.2f}", prefill.attention_seconds),
                fmt::format("{:.2f}", prefill.seconds),
                fmt::format("{:.0f}", static_cast<double>(length) / prefill.seconds),
                dense_seconds ? fmt::format("{:.2f}", *dense_seconds / prefill.attention_seconds) : "",
                fmt::format("{:.1f}", 100.0 * static_cast<double>(row.kv_entries) /
                                          static_cast<double>(sizes.kv_heads * length))});
  }
}

/// The logits of dense attention, `[tokens, vocabulary]` floats and nothing else.
void write_logits(const arguments& arguments, const model& model, std::span<const std::int32_t> tokens) {
  const cca::openmp_executor executor{.threads = arguments.threads};
  const row dense = parse_row("dense", model.sizes(), static_cast<std::int64_t>(tokens.size()), 0, executor);
  const matrix hidden = model.run(tokens, 0, dense.attention).hidden;
  std::ofstream file(arguments.logits, std::ios::binary);
  for (std::int64_t first = 0; first < hidden.rows(); first += token_block) {
    const matrix logits = model.logits(hidden.middleRows(first, std::min(token_block, hidden.rows() - first)));
    file.write(reinterpret_cast<const char*>(logits.data()), logits.size() * static_cast<std::int64_t>(sizeof(float)));
  }
  file.close();
  if (!file) throw std::runtime_error("cannot write " + arguments.logits);
}

void run(const arguments& arguments) {
  const model model(arguments.folder + "/model.safetensors", cca::openmp_executor{.threads = arguments.threads});
  const safetensors text(arguments.folder + "/text.safetensors");
  const auto tokens = read_tokens(text, arguments.tokens, "--tokens", model.sizes());
  if (arguments.tokens > model.sizes().context) {
    fmt::print(stderr, "Note: {} tokens, but the model was trained on {}.\n", arguments.tokens, model.sizes().context);
  }
  if (arguments.logits.empty()) {
    print_table(arguments, model, tokens);
  } else {
    write_logits(arguments, model, tokens);
  }
}

}  // namespace

int main(int argc, char** argv) {
  arguments arguments;
  CLI::App app(
      "Prefill of a text by SmolLM2-135M-Instruct, with dense, Core Context Aware and sliding-window attention");
  app.add_option("folder", arguments.folder, "What prepare.py has written")->required()->check(CLI::ExistingDirectory);
  app.add_option("--tokens", arguments.tokens, "Tokens of the text, from its start")
      ->check(CLI::Range(2, 1 << 30))
      ->capture_default_str();
  app.add_option("--threads", arguments.threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--rows", arguments.rows,
                 std::string("Lines of the table: ") + attention_forms +
                     "; /q8 behind either rounds keys, values and cores to 8 bits, as a cache of them does")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--sink-tokens", arguments.sink_tokens, "First tokens that stay raw beside every window")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_option("--dump-logits", arguments.logits,
                 "Write the dense logits to this file, [tokens, vocabulary] floats, instead of the table");
  CLI11_PARSE(app, argc, argv);
  try {
    run(arguments);
  } catch (const std::exception& error) {
    fmt::print(stderr, "smollm2: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
