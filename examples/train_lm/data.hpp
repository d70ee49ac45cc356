#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace train_lm {

/// Read when no text is named: the manual of Perl, English prose by many hands with examples in it (Debian: perl-doc).
inline constexpr const char* default_text = "/usr/share/perl";

/// The files of a folder that have one of these suffixes, in the order of their paths, but for those of Perl's manual
/// that are tables or not in English.
inline std::vector<std::string> list_texts(const std::string& folder, std::span<const std::string_view> suffixes) {
  static constexpr std::array<std::string_view, 6> skipped{"perltoc.pod", "perluniprops.pod", "perlcn.pod",
                                                           "perljp.pod",  "perlko.pod",       "perltw.pod"};
  const auto contains = [](const auto& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.is_regular_file() && contains(suffixes, entry.path().extension().string()) &&
        !contains(skipped, entry.path().filename().string()))
      paths.push_back(entry.path().string());
  std::sort(paths.begin(), paths.end());
  return paths;
}

/// The texts of files and folders, or of Perl's manual when none is named. A text that is there twice is read once: it
/// must not be trained on and validated with.
inline std::vector<std::string> read_texts(const std::vector<std::string>& places) {
  static constexpr std::array<std::string_view, 4> suffixes{".pod", ".txt", ".md", ".rst"};
  std::vector<std::string> paths;
  for (const std::string& place : places) {
    const auto found = std::filesystem::is_directory(place) ? list_texts(place, suffixes) : std::vector{place};
    paths.insert(paths.end(), found.begin(), found.end());
  }
  if (places.empty()) {
    if (!std::filesystem::is_directory(default_text))
      throw std::invalid_argument(fmt::format("--text: got none, and there is no {}", default_text));
    paths = list_texts(default_text, std::span(suffixes).first(1));  // its other files are tables
  }
  std::vector<std::string> texts;
  std::set<std::string> seen;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), {}};
    if (!file) throw std::runtime_error("cannot read " + path);
    if (seen.insert(text).second) texts.push_back(std::move(text));
  }
  return texts;
}

/// A text, the end of which is held out. Batches depend on the seed and the step alone: whoever resumes knows them.
class corpus {
 public:
  /// @param context  bytes of a sequence; there is one more to predict
  /// @param held_out  share of the text for validation
  corpus(std::string_view text, std::int64_t context, double held_out)
      : context_(context), text_(text.begin(), text.end()) {
    const auto size = static_cast<std::int64_t>(text_.size());
    training_ = size - static_cast<std::int64_t>(held_out * static_cast<double>(size));
    if (training_ <= context || size - training_ <= context)
      throw std::invalid_argument(
          fmt::format("the text: got {} bytes for training and {} for validation, wants more than the context of {} "
                      "for each: more text or a shorter --context",
                      training_, size - training_, context));
  }

  [[nodiscard]] std::int64_t training_size() const { return training_; }
  [[nodiscard]] std::int64_t validation_size() const { return static_cast<std::int64_t>(text_.size()) - training_; }

  /// Tells texts apart. Source: FNV-1a, 64 bits.
  [[nodiscard]] std::uint64_t checksum() const {
    std::uint64_t sum = 0xcbf29ce484222325U;
    for (const std::uint8_t byte : text_) sum = (sum ^ byte) * 0x100000001b3U;
    return sum;
  }

  /// Sequences one after the other, and for each byte the one after it.
  struct sequences {
    std::vector<std::uint8_t> bytes, targets;
  };

  [[nodiscard]] sequences training_batch(std::uint64_t seed, std::int64_t step, std::int64_t count) const {
    std::seed_seq seeds{seed & 0xffffffffU, seed >> 32U, static_cast<std::uint64_t>(step)};
    std::mt19937_64 random(seeds);
    sequences batch;
    const auto starts = static_cast<std::uint64_t>(training_ - context_);
    for (std::int64_t i = 0; i < count; ++i) add(static_cast<std::int64_t>(random() % starts), batch);
    return batch;
  }

  /// Sequences `[first, first + count)` of the `total` that lie evenly over what is held out.
  [[nodiscard]] sequences validation_batch(std::int64_t first, std::int64_t count, std::int64_t total) const {
    sequences batch;
    for (std::int64_t i = first; i < first + count; ++i)
      add(training_ + (validation_size() - context_ - 1) * i / std::max<std::int64_t>(total - 1, 1), batch);
    return batch;
  }

 private:
  void add(std::int64_t start, sequences& batch) const {
    const auto begin = text_.begin() + start;
    batch.bytes.insert(batch.bytes.end(), begin, begin + context_);
    batch.targets.insert(batch.targets.end(), begin + 1, begin + context_ + 1);
  }

  std::int64_t context_, training_ = 0;
  std::vector<std::uint8_t> text_;
};

}  // namespace train_lm
