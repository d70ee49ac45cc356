// What a model that never saw a core loses by each way of keeping less: the perplexity of texts of two kinds, by position, at
// equal bytes of cache.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cca/cca.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/progress.hpp"
#include "../common/safetensors.hpp"
#include "attentions.hpp"
#include "model.hpp"
#include "policy_rows.hpp"

namespace {

using namespace smollm2;
using common::progress;

struct arguments {
  std::string folder, json;
  std::vector<std::string> texts = {"text", "code"};
  std::int64_t tokens = 8192, part = 2048, sink_tokens = 4;
  int threads = 2;
  std::vector<std::string> rows = {"dense",
                                   // 825 rows of a key and a value for each head of them, a tenth of 8192 tokens
                                   "window/825/sinks=0", "window/821", "64/391", "16/312/shared",
                                   "16/312/shared/select", "64/337/mass", "16/256/shared/mass", "32/496/shared/mass",
                                   "streaming/821", "h2o/825",
                                   // 1543 rows, 19 %
                                   "window/1539", "16/1078/shared", "16/1078/shared/select", "16/1024/shared/mass",
                                   "32/1237/shared/mass", "h2o/1543",
                                   // everything kept, about a tenth of it read
                                   "quest/16/32", "moba/16/32", "recycled/32/640"};
};

/// A line of the table.
struct row {
  std::string name;
  attention_function attention;
  double kept, read;  // parts of what dense attention keeps, and reads for the last token
};

/// What a cache of a layer holds after `length` tokens, as it counts it.
double cache_bytes(const config& model, const cca::options& options, std::int64_t length) {
  cca::kv_cache<float> cache({.heads = model.heads, .kv_heads = model.kv_heads, .dim = model.head_dim}, options);
  const matrix zeros = matrix::Zero(length, model.heads * model.head_dim);
  const auto view = [&](std::int64_t heads) { return cca::bshd(zeros.data(), 1, length, heads, model.head_dim); };
  cache.append(view(model.heads), view(model.kv_heads), view(model.kv_heads));
  return static_cast<double>(cache.bytes());
}

row library_row(const std::string& text, const config& model, const arguments& arguments, cca::openmp_executor run) {
  const cca::options options = parse_attention("--rows", text, arguments.sink_tokens);
  const cca::partition partition = cca::partition_of(options);
  const std::int64_t last = arguments.tokens - 1;
  const bool shared = options.core_heads == cca::core_heads::per_kv_head;
  const std::int64_t cores = (shared ? model.kv_heads : model.heads) * partition.core_count(last);
  const std::int64_t raw = cca::intersection(partition.raw(last), {0, arguments.tokens}).size();
  return {name_of(options),
          [=](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
            cca::attention(query, key, value, out, options, run);
          },
          cache_bytes(model, options, arguments.tokens) / cache_bytes(model, {}, arguments.tokens),
          static_cast<double>(cores + model.kv_heads * (partition.sinks(last).size() + raw)) /
              static_cast<double>(model.kv_heads * arguments.tokens)};
}

row parse_row(const std::string& text, const config& model, const arguments& arguments, cca::openmp_executor run) {
  static const std::regex form("(h2o|streaming|quest|moba|recycled)/([1-9][0-9]{0,6})(/([1-9][0-9]{0,6}))?");
  std::smatch match;
  if (!std::regex_match(text, match, form)) return library_row(text, model, arguments, run);
  const std::string system = match[1];
  const bool two = match[4].matched;
  if (two != (system != "h2o" && system != "streaming"))
    throw std::invalid_argument(
        fmt::format("--rows: got '{}', wants h2o/ROWS, streaming/WINDOW, quest/BLOCK/COUNT, "
                    "moba/BLOCK/COUNT or recycled/STRIDE/COUNT",
                    text));
  const std::int64_t first = std::stoll(match[2]), second = two ? std::stoll(match[4]) : 0;
  const std::int64_t length = arguments.tokens, sinks = arguments.sink_tokens;
  const auto part = [&](std::int64_t rows) { return static_cast<double>(rows) / static_cast<double>(length); };
  if (system == "h2o")
    return {fmt::format("H2O, {} tokens", first), heavy_hitters_of(first, run), part(first), part(first)};
  if (system == "streaming")
    return {fmt::format("StreamingLLM s={} m={}", first, sinks), streaming_of(first, sinks, model.rope_base),
            part(first + sinks), part(first + sinks)};
  // A block has two keys of bounds, as much as a key and a value, or one of means.
  if (system == "quest")
    return {fmt::format("Quest, {} blocks of {}", second, first),
            blocks_of<policies::quest_bounds<float>>(first, second, run), 1 + part(length / first),
            part(length / first + first * second)};
  if (system == "moba")
    return {fmt::format("MoBA, {} blocks of {}", second, first),
            blocks_of<policies::moba_means<float>>(first, second, run), 1 + part(length / first) / 2,
            part(length / first / 2 + first * second)};
  return {fmt::format("Recycled Attention, S={} K={}", first, second), recycled_of(first, second), 1,
          part((length + (first - 1) * (second + first / 2)) / first)};
}

/// Perplexities of the parts of a text, and of the whole.
std::vector<double> perplexities(const model& model, const row& row, std::span<const std::int32_t> tokens,
                                 std::int64_t part, const std::function<void()>& on_layer) {
  const matrix hidden = model.run(tokens, 0, row.attention, on_layer).hidden;
  const auto length = static_cast<std::int64_t>(tokens.size());
  std::vector<double> all;
  double whole = 0;
  for (std::int64_t first = 0; first < length - 1; first += part) {
    const std::int64_t count = std::min(part, length - 1 - first);
    const double sum =
        model.surprise(hidden.middleRows(first, count), tokens.subspan(static_cast<std::size_t>(first) + 1));
    all.push_back(std::exp(sum / static_cast<double>(count)));
    whole += sum;
  }
  all.push_back(std::exp(whole / static_cast<double>(length - 1)));
  return all;
}

void run(const arguments& arguments) {
  const cca::openmp_executor executor{.threads = arguments.threads};
  const model model(arguments.folder + "/model.safetensors", executor);
  std::vector<row> rows;
  for (const std::string& text : arguments.rows) rows.push_back(parse_row(text, model.sizes(), arguments, executor));
  auto results = nlohmann::json::array();
  progress bar(static_cast<std::int64_t>(rows.size() * arguments.texts.size()) * model.sizes().layers);
  for (const std::string& name : arguments.texts) {
    const safetensors text(arguments.folder + "/" + name + ".safetensors");
    const auto tokens = read_tokens(text, arguments.tokens, "--tokens", model.sizes());
    fmt::print("\n{}, {} tokens\n\n| attention | kept, % | read, % | perplexity |", name, arguments.tokens);
    for (std::int64_t first = 0; first < arguments.tokens; first += arguments.part)
      fmt::print(" {}-{} |", first, std::min(first + arguments.part, arguments.tokens));
    fmt::print("\n|---|---:|---:|---:|");
    for (std::int64_t first = 0; first < arguments.tokens; first += arguments.part) fmt::print("---:|");
    fmt::print("\n");
    for (const row& row : rows) {
      const auto all = perplexities(model, row, tokens, arguments.part, [&] { bar.step(row.name); });
      bar.hide();
      fmt::print("| {} | {:.1f} | {:.1f} | {:.3f} |", row.name, 100 * row.kept, 100 * row.read, all.back());
      for (std::size_t i = 0; i + 1 < all.size(); ++i) fmt::print(" {:.2f} |", all[i]);
      fmt::print("\n");
      std::fflush(stdout);
      results.push_back({{"text", name},
                         {"attention", row.name},
                         {"kept", row.kept},
                         {"read", row.read},
                         {"perplexity", all.back()},
                         {"part", arguments.part},
                         {"perplexity_by_part", std::vector<double>(all.begin(), all.end() - 1)}});
      if (!arguments.json.empty()) std::ofstream(arguments.json) << results.dump(1) << '\n';
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  arguments arguments;
  CLI::App app(
      "Perplexities of texts by SmolLM2-135M-Instruct, with attentions that keep less than all keys and values");
  app.add_option("folder", arguments.folder, "What prepare.py has written")->required()->check(CLI::ExistingDirectory);
  app.add_option("--texts", arguments.texts, "Texts: NAME.safetensors in the folder")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--tokens", arguments.tokens, "Tokens of each text, from its start")
      ->check(CLI::Range(2, 1 << 30))
      ->capture_default_str();
  app.add_option("--part", arguments.part, "Tokens of the parts that have perplexities of their own")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--rows", arguments.rows,
                 std::string("Lines of the table: ") + attention_forms +
                     "; or h2o/ROWS, streaming/WINDOW, quest/BLOCK/COUNT, moba/BLOCK/COUNT, recycled/STRIDE/COUNT")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--sink-tokens", arguments.sink_tokens, "First tokens that stay raw beside every window")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_option("--threads", arguments.threads, "Threads")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--json", arguments.json, "Write the numbers to this file as well, for plots");
  CLI11_PARSE(app, argc, argv);
  try {
    run(arguments);
  } catch (const std::exception& error) {
    fmt::print(stderr, "smollm2_compare: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
