#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../common/safetensors.hpp"

namespace smollm2 {

using common::safetensors;

/// What each token stands for: bytes, not characters; one of several bytes may come in several tokens.
class vocabulary {
 public:
  vocabulary(const std::string& path, std::int64_t size)
      : file_(path),
        bytes_(file_.tensor<std::uint8_t>("bytes", {file_.shape_of("bytes").at(0)})),
        ends_(file_.tensor<std::int32_t>("ends", {size})),
        final_(file_.tensor<std::int32_t>("final", {file_.shape_of("final").at(0)})) {
    const bool ordered = std::is_sorted(ends_.begin(), ends_.end());
    if (!ordered || (size > 0 && (ends_.front() < 0 || ends_.back() != std::ssize(bytes_)))) {
      throw std::runtime_error(path + " has tokens that are no pieces of its bytes");
    }
  }

  [[nodiscard]] std::string_view piece(std::int32_t token) const {
    const auto i = static_cast<std::size_t>(token);
    const auto begin = static_cast<std::size_t>(i == 0 ? 0 : ends_[i - 1]);
    return {reinterpret_cast<const char*>(bytes_.data()) + begin, static_cast<std::size_t>(ends_[i]) - begin};
  }

  /// Whether the model ends a text, or its turn in a chat, with this token.
  [[nodiscard]] bool is_final(std::int32_t token) const {
    return std::find(final_.begin(), final_.end(), token) != final_.end();
  }

 private:
  safetensors file_;
  std::span<const std::uint8_t> bytes_;
  std::span<const std::int32_t> ends_;  // of each token's bytes
  std::span<const std::int32_t> final_;
};

/// The largest length, at most `length`, at which `text` does not end inside a character of UTF-8. Bytes that begin no
/// character count as whole ones.
inline std::size_t whole_characters(std::string_view text, std::size_t length) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, length); ++back) {
    const auto byte = static_cast<unsigned char>(text[length - back]);
    if ((byte & 0xC0U) == 0x80U) continue;  // in the middle of a character
    const std::size_t size = byte >= 0xF0U ? 4 : byte >= 0xE0U ? 3 : byte >= 0xC0U ? 2 : 1;
    return size > back ? length - back : length;
  }
  return length;
}

/// Text that is shown while it grows. What may yet turn out to be a string to stop at, or half a character, waits.
class text_stream {
 public:
  explicit text_stream(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  /// Takes more bytes, and returns what can be shown by now.
  std::string add(std::string_view bytes) {
    waiting_ += bytes;
    const std::size_t stop = first_stop();
    stopped_ = stop != std::string::npos;
    return take(stopped_ ? stop : whole_characters(waiting_, waiting_.size() - possible_stop()));
  }

  /// Whether one of the strings has come. Neither it nor what is behind it is ever shown.
  [[nodiscard]] bool stopped() const { return stopped_; }

  /// The text is over: what still waits was no string to stop at. Half a character is left out.
  std::string finish() { return stopped_ ? std::string() : take(whole_characters(waiting_, waiting_.size())); }

 private:
  [[nodiscard]] std::size_t first_stop() const {
    std::size_t first = std::string::npos;
    for (const std::string& stop : stops_) first = std::min(first, waiting_.find(stop));
    return first;
  }

  /// Bytes at the end that may be the beginning of a string to stop at.
  [[nodiscard]] std::size_t possible_stop() const {
    std::size_t longest = 0;
    for (const std::string& stop : stops_) {
      for (std::size_t size = std::min(stop.size() - 1, waiting_.size()); size > longest; --size) {
        if (waiting_.ends_with(std::string_view(stop).substr(0, size))) longest = size;
      }
    }
    return longest;
  }

  std::string take(std::size_t size) {
    std::string text = waiting_.substr(0, size);
    waiting_.erase(0, size);
    return text;
  }

  std::vector<std::string> stops_;
  std::string waiting_;
  bool stopped_ = false;
};

}  // namespace smollm2
