// Times steps of training with dense and other attention at several contexts, and prints a table. One thread, and its
// own time: what else the machine does is not counted.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "trainer.hpp"

namespace {

using namespace train_lm;

struct arguments {
  std::vector<std::int64_t> contexts = {1024, 4096, 8192};
  std::vector<std::string> attentions = {"dense", "cca", "mean", "window"};
  settings training;
  std::int64_t tokens = 8192, rounds = 3;
};

struct contestant {
  std::string name;
  std::unique_ptr<trainer<float>> training;
  double seconds = std::numeric_limits<double>::infinity();
  double wall_seconds = 0, attention_wall_seconds = 0;

  void step() {
    const auto [wall, attention] = std::pair(training->log().seconds, training->log().attention_seconds);
    const std::clock_t start = std::clock();
    training->step();
    seconds = std::min(seconds, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    wall_seconds += training->log().seconds - wall;
    attention_wall_seconds += training->log().attention_seconds - attention;
  }
  [[nodiscard]] double attention_share() const { return attention_wall_seconds / wall_seconds; }
  [[nodiscard]] double attention_seconds() const { return attention_share() * seconds; }
};

void print_line(const std::array<std::string, 8>& cells) {
  fmt::print("| {:>7} | {:>5} | {:<9} | {:>7} | {:>12} | {:>8} | {:>13} | {:>18} |\n", cells[0], cells[1], cells[2],
             cells[3], cells[4], cells[5], cells[6], cells[7]);
  std::fflush(stdout);
}

void time_context(const arguments& arguments, std::int64_t context, const executor& run) {
  settings settings = arguments.training;
  settings.context = context;
  settings.batch = std::max<std::int64_t>(arguments.tokens / context, 1);
  // Times do not depend on what is written in a text.
  const corpus text(std::string(static_cast<std::size_t>(4 * context), 'a'), context, 0.5);
  std::vector<contestant> contestants;
  for (const std::string& attention : arguments.attentions) {
    settings.attention = attention;
    contestants.push_back({attention, std::make_unique<trainer<float>>(settings, text, run)});
    contestants.back().training->step();  // memory comes in with the first step, which does not count
  }
  // They take turns, so that what else the machine does hits all; the best turn counts.
  for (std::int64_t round = 0; round < arguments.rounds; ++round)
    for (contestant& contestant : contestants) contestant.step();
  for (const contestant& c : contestants) {
    const contestant& first = contestants.front();
    print_line({std::to_string(context), std::to_string(settings.batch), c.name, fmt::format("{:.3f}", c.seconds),
                fmt::format("{:.1f}", 100 * c.attention_share()),
                fmt::format("{:.0f}", static_cast<double>(settings.batch * context) / c.seconds),
                fmt::format("{:.2f}", first.seconds / c.seconds),
                fmt::format("{:.2f}", first.attention_seconds() / c.attention_seconds())});
  }
}

}  // namespace

int main(int argc, char** argv) {
  arguments arguments;
  settings& s = arguments.training;
  CLI::App app("Times steps of training at several contexts");
  const CLI::Range count(std::int64_t{1}, std::int64_t{1} << 30);
  app.add_option("--contexts", arguments.contexts, "Bytes of a sequence")
      ->delimiter(',')
      ->check(count)
      ->capture_default_str();
  app.add_option("--attentions", arguments.attentions, "Compared with the first: dense, cca, mean, max, window")
      ->delimiter(',')
      ->check(CLI::IsMember({"dense", "cca", "mean", "max", "window"}))
      ->capture_default_str();
  app.add_option("--group-size", s.group_size, "Tokens of a core")->check(count)->capture_default_str();
  app.add_option("--window", s.window, "Tokens that stay raw")->check(count)->capture_default_str();
  app.add_option("--tokens", arguments.tokens, "Tokens of a step")->check(count)->capture_default_str();
  app.add_option("--rounds", arguments.rounds, "Steps of each, the best of which counts")
      ->check(count)
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    Eigen::ThreadPool none(0);
    const executor executor(none);
    print_line({"context", "batch", "attention", "step, s", "attention, %", "tokens/s", "step speed-up",
                "attention speed-up"});
    print_line({"---:", "---:", "---", "---:", "---:", "---:", "---:", "---:"});
    for (const std::int64_t context : arguments.contexts) time_context(arguments, context, executor);
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_lm_step_time: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
