// Trains a byte-level language model with one kind of attention, and says what it cost and what it learnt.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/progress.hpp"
#include "trainer.hpp"

namespace {

using namespace train_lm;

volatile std::sig_atomic_t interrupted = 0;

struct arguments {
  std::string folder;
  settings training;
  std::vector<std::string> texts;
  double held_out = 0.05;
  std::int64_t validate_every = 100, stop_after = 0;
  int threads = 2;
  bool resume = false;
};

std::string minutes(double seconds) {
  const auto whole = static_cast<std::int64_t>(seconds);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

corpus read_corpus(const arguments& arguments) {
  const std::vector<std::string> texts = read_texts(arguments.texts);
  std::string whole;
  for (const std::string& text : texts) whole += text;
  corpus corpus(whole, arguments.training.context, arguments.held_out);
  fmt::print("{} texts, {} bytes for training and {} for validation\n", texts.size(), corpus.training_size(),
             corpus.validation_size());
  return corpus;
}

void write_log(const trainer<float>& trainer, const std::string& path) {
  std::ofstream file(path);
  file << nlohmann::json{{"settings", trainer.description()}, {"log", trainer.log_json()}}.dump(1) << '\n';
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

/// The mean of the last losses of training: a single batch says little.
double recent_loss(const std::vector<double>& losses) {
  const auto count = std::min<std::ptrdiff_t>(20, std::ssize(losses));
  double sum = 0;
  for (auto loss = losses.end() - count; loss != losses.end(); ++loss) sum += *loss;
  return sum / static_cast<double>(std::max<std::ptrdiff_t>(count, 1));
}

void report(trainer<float>& trainer, const settings& settings) {
  const double loss = trainer.validate();
  const auto& log = trainer.log();
  const auto done = static_cast<double>(trainer.steps_done());
  fmt::print("step {:5}  training loss {:.4f}  validation loss {:.4f}  {:7.0f} tokens/s  attention {:2.0f} % of {}\n",
             trainer.steps_done(), recent_loss(log.training), loss,
             done * static_cast<double>(settings.batch * settings.context) / std::max(log.seconds, 1e-9),
             100 * log.attention_seconds / std::max(log.seconds, 1e-9), minutes(log.seconds));
  std::fflush(stdout);
}

void run(const arguments& arguments) {
  const settings& settings = arguments.training;
  require_valid(settings);
  const corpus text = read_corpus(arguments);
  const std::string checkpoint = arguments.folder + "/checkpoint.safetensors";
  if (!arguments.resume && std::filesystem::exists(checkpoint))
    throw std::invalid_argument(
        fmt::format("{} is there already: go on with --resume, or name another folder", checkpoint));
  std::filesystem::create_directories(arguments.folder);

  Eigen::ThreadPool pool(arguments.threads - 1);  // the calling thread works, too
  const executor executor(pool);
  trainer<float> trainer(settings, text, executor);
  if (arguments.resume) trainer.resume(checkpoint);
  std::int64_t weights = 0;
  for (const parameter<float>* p : trainer.parameters()) weights += p->value.size();
  fmt::print("{} attention, {:.2f} million weights, a batch of {} times {} bytes, {} threads, step {} of {}\n",
             settings.attention, 1e-6 * static_cast<double>(weights), settings.batch, settings.context,
             arguments.threads, trainer.steps_done(), settings.steps);

  const auto keep = [&] {
    trainer.save(checkpoint);
    write_log(trainer, arguments.folder + "/log.json");
  };
  const std::int64_t last = arguments.stop_after == 0
                                ? settings.steps
                                : std::min(settings.steps, trainer.steps_done() + arguments.stop_after);
  common::progress bar(settings.steps, trainer.steps_done());
  const stopwatch watch;
  const std::int64_t first = trainer.steps_done();
  while (trainer.steps_done() < last && interrupted == 0) {
    const double loss = trainer.step();
    const double step_seconds = watch.seconds() / static_cast<double>(trainer.steps_done() - first);
    bar.step(fmt::format("loss {:.3f}, {:.0f} tokens/s, {} left", loss,
                         static_cast<double>(settings.batch * settings.context) / step_seconds,
                         minutes(step_seconds * static_cast<double>(last - trainer.steps_done()))));
    if (trainer.steps_done() % arguments.validate_every == 0 || trainer.steps_done() == settings.steps) {
      bar.hide();
      report(trainer, settings);
      keep();
    }
  }
  bar.hide();
  keep();
  if (trainer.steps_done() < settings.steps)
    fmt::print("stopped after {} of {} steps: go on with --resume\n", trainer.steps_done(), settings.steps);
}

void add_options(CLI::App& app, arguments& arguments) {
  settings& s = arguments.training;
  const CLI::Range count(std::int64_t{1}, std::int64_t{1} << 30);
  const auto add = [&](const char* name, auto& value, const char* text, const CLI::Validator& valid) {
    return app.add_option(name, value, text)->check(valid)->capture_default_str();
  };
  app.add_option("folder", arguments.folder, "For the checkpoint and the log")->required();
  add("--attention", s.attention, "cca: Core Context Aware; mean, max: with these poolings; window: without the cores",
      CLI::IsMember({"dense", "cca", "mean", "max", "window"}));
  auto* group_size = add("--group-size", s.group_size, "Tokens of a core", count);
  auto* window = add("--window", s.window, "Tokens that stay raw", count);
  app.add_option("--text", arguments.texts,
                 fmt::format("Files, and folders of .pod, .txt, .md and .rst (default: {})", default_text))
      ->check(CLI::ExistingPath);
  add("--held-out", arguments.held_out, "Share of the text, from its end, for validation", CLI::Range(0.0, 1.0));
  add("--layers", s.layers, "Layers", CLI::Range(std::int64_t{0}, std::int64_t{1000}));
  add("--dim", s.dim, "Features of a token", count);
  add("--heads", s.heads, "Query heads", count);
  add("--kv-heads", s.kv_heads, "Key/value heads", count);
  add("--hidden", s.hidden, "Features inside the MLP", count);
  add("--context", s.context, "Bytes of a sequence", count);
  add("--batch", s.batch, "Sequences of a step", count);
  add("--steps", s.steps, "Steps", count);
  add("--warmup", s.warmup, "Steps until the learning rate is whole",
      CLI::Range(std::int64_t{0}, std::int64_t{1} << 30));
  add("--learning-rate", s.learning_rate, "Highest learning rate", CLI::PositiveNumber);
  add("--weight-decay", s.weight_decay, "Of AdamW", CLI::NonNegativeNumber);
  add("--clip", s.clip, "Largest norm of the gradient", CLI::PositiveNumber);
  add("--validation-sequences", s.validation_sequences, "Sequences that the validation loss is the mean of", count);
  add("--seed", s.seed, "Of the weights and of the order of the text", CLI::NonNegativeNumber);
  add("--validate-every", arguments.validate_every, "Steps between validations, each with a checkpoint", count);
  add("--stop-after", arguments.stop_after, "Stop after so many steps, to go on later; 0: at the end",
      CLI::Range(std::int64_t{0}, std::int64_t{1} << 30));
  add("--threads", arguments.threads, "Threads; the result does not depend on them", CLI::Range(1, 1024));
  app.add_flag("--resume", arguments.resume, "Go on from the folder's checkpoint");
  app.final_callback([group_size, window, &s] {
    if (s.attention == "dense" && (group_size->count() > 0 || window->count() > 0))
      throw CLI::ValidationError("--attention dense", "sees every token: it has no --group-size and no --window");
  });
}

}  // namespace

int main(int argc, char** argv) {
  arguments arguments;
  CLI::App app("Trains a byte-level language model through the attention of cca");
  add_options(app, arguments);
  CLI11_PARSE(app, argc, argv);
  std::signal(SIGINT, [](int) { interrupted = 1; });  // the step ends, and the checkpoint is written
  try {
    run(arguments);
  } catch (const std::exception& error) {
    fmt::print(stderr, "train_lm: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
