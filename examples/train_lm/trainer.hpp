#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <string>

#include "../common/safetensors.hpp"
#include "adamw.hpp"
#include "data.hpp"
#include "model.hpp"

namespace train_lm {

/// All that a result depends on, but the text.
struct settings {
  std::string attention = "cca";
  std::int64_t group_size = 16, window = 64;
  std::int64_t layers = 4, dim = 160, heads = 4, kv_heads = 2, hidden = 448, context = 1024;
  std::int64_t batch = 1, steps = 1200, warmup = 100;
  double learning_rate = 2e-3, weight_decay = 0.1, clip = 1;
  std::int64_t validation_sequences = 32;
  std::uint64_t seed = 1;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(settings, attention, group_size, window, layers, dim, heads, kv_heads, hidden,
                                   context, batch, steps, warmup, learning_rate, weight_decay, clip,
                                   validation_sequences, seed)

/// What no single option tells.
inline void require_valid(const settings& s) {
  const auto require = [](bool valid, const std::string& message) {
    if (!valid) throw std::invalid_argument(message);
  };
  require(s.heads % s.kv_heads == 0,
          fmt::format("--kv-heads: got {}, wants a divisor of --heads {}", s.kv_heads, s.heads));
  require(s.dim % s.heads == 0 && s.dim / s.heads % 2 == 0,
          fmt::format("--dim: got {}, wants an even number for each of the {} --heads", s.dim, s.heads));
  require(s.warmup <= s.steps, fmt::format("--warmup: got {}, wants at most the {} --steps", s.warmup, s.steps));
}

template <class T>
class trainer {
 public:
  trainer(const settings& settings, const corpus& text, const executor& run)
      : settings_(settings),
        text_(text),
        run_(run),
        model_({settings.layers, settings.dim, settings.heads, settings.kv_heads, settings.hidden, settings.context},
               choose_attention(settings.attention, settings.group_size, settings.window), settings.seed),
        optimizer_(model_.parameters(), settings.weight_decay) {
    require_valid(settings);
  }
  trainer(const trainer&) = delete;  // the optimiser points into the model
  trainer& operator=(const trainer&) = delete;

  [[nodiscard]] std::int64_t steps_done() const { return static_cast<std::int64_t>(log_.training.size()); }
  [[nodiscard]] double attention_seconds() const { return model_.attention_seconds(); }
  [[nodiscard]] const std::vector<parameter<T>*>& parameters() const { return optimizer_.parameters(); }

  struct history {
    std::vector<double> training;                             // the loss of each step
    std::vector<std::pair<std::int64_t, double>> validation;  // steps done, loss
    double seconds = 0;                                       // of the steps
    double attention_seconds = 0;                             // of them, inside cca
  };
  [[nodiscard]] const history& log() const { return log_; }

  /// @return  the loss of the step's batch
  double step() {
    const stopwatch watch;
    const double attention_before = model_.attention_seconds();
    const std::int64_t number = steps_done();
    const corpus::sequences batch = text_.training_batch(settings_.seed, number, settings_.batch);
    const double loss = model_.gradient(run_, batch.bytes, batch.targets);
    clip_gradients(optimizer_.parameters(), settings_.clip);
    const schedule schedule{settings_.steps, settings_.warmup, settings_.learning_rate};
    optimizer_.update(run_, number, schedule.at(number));
    log_.training.push_back(loss);
    log_.seconds += watch.seconds();
    log_.attention_seconds += model_.attention_seconds() - attention_before;
    return loss;
  }

  double validate() {
    double sum = 0;
    for (std::int64_t i = 0; i < settings_.validation_sequences; i += settings_.batch) {
      const std::int64_t count = std::min(settings_.batch, settings_.validation_sequences - i);
      const corpus::sequences batch = text_.validation_batch(i, count, settings_.validation_sequences);
      sum += static_cast<double>(count) * model_.loss(run_, batch.bytes, batch.targets);
    }
    const double loss = sum / static_cast<double>(settings_.validation_sequences);
    log_.validation.emplace_back(steps_done(), loss);
    return loss;
  }

  /// Everything that goes on depends on: `resume` on this file, and all bits are those of a training that went through.
  void save(const std::string& path) {
    common::safetensors_writer file;
    file.set("settings", description().dump());
    file.set("log", log_json().dump());
    for_tensors([&](const std::string& name, matrix<T>& x) {
      file.add<T>(name, {x.rows(), x.cols()}, {x.data(), static_cast<std::size_t>(x.size())});
    });
    file.write(path);
  }

  void resume(const std::string& path) {
    const common::safetensors file(path);
    const auto settings = nlohmann::json::parse(file.text("settings"), nullptr, /*allow_exceptions=*/false);
    const auto log = nlohmann::json::parse(file.text("log"), nullptr, /*allow_exceptions=*/false);
    if (!settings.is_object() || !log.is_object())
      throw std::runtime_error(path + " is not a checkpoint: it has no settings or no log");
    const nlohmann::json wanted = description();
    for (const auto& [name, value] : wanted.items())
      if (!settings.contains(name) || settings.at(name) != value)
        throw std::invalid_argument(fmt::format("--resume: {} was trained with {} = {}, got {}", path, name,
                                                settings.value(name, nlohmann::json()).dump(), value.dump()));
    for_tensors([&](const std::string& name, matrix<T>& x) {
      const auto elements = file.tensor<T>(name, {x.rows(), x.cols()});
      std::copy(elements.begin(), elements.end(), x.data());
    });
    log_ = {log.at("training"), log.at("validation"), log.at("seconds"), log.at("attention_seconds")};
  }

  /// What a curve is drawn from.
  [[nodiscard]] nlohmann::json log_json() const {
    return {{"training", log_.training},
            {"validation", log_.validation},
            {"seconds", log_.seconds},
            {"attention_seconds", log_.attention_seconds}};
  }

  /// The settings, and which text they were used on.
  [[nodiscard]] nlohmann::json description() const {
    nlohmann::json result = settings_;
    result["text"] =
        fmt::format("{} bytes, checksum {:016x}", text_.training_size() + text_.validation_size(), text_.checksum());
    return result;
  }

 private:
  template <class Function>
  void for_tensors(const Function& f) {
    for (std::size_t i = 0; i < optimizer_.parameters().size(); ++i) {
      parameter<T>& p = *optimizer_.parameters()[i];
      f(p.name, p.value);
      f(p.name + ".first_moment", optimizer_.first(i));
      f(p.name + ".second_moment", optimizer_.second(i));
    }
  }

  settings settings_;
  const corpus& text_;
  const executor& run_;
  model<T> model_;
  adamw<T> optimizer_;
  history log_;
};

}  // namespace train_lm
