#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <istream>
#include <ostream>
#include <stdexcept>
#include <utility>

#include "numbers.hpp"
#include "refuse.hpp"
#include "scratch.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// 64-bit FNV-1a over 8 bytes at a time, however they come in: tells damage, not malice.
class checksum {
 public:
  void add(const char* data, std::size_t bytes) {
    while (bytes > 0) {
      const std::size_t part = smaller(bytes, sizeof word_ - filled_);
      std::memcpy(reinterpret_cast<char*>(&word_) + filled_, data, part);
      data += part;
      bytes -= part;
      filled_ += part;
      if (filled_ < sizeof word_) return;
      state_ = value();
      word_ = 0;
      filled_ = 0;
    }
  }

  /// Of all bytes so far; those that do not fill a word count as one with zeros behind them.
  [[nodiscard]] std::uint64_t value() const {
    if (filled_ == 0) return state_;
    const std::uint64_t mixed = (state_ ^ word_) * 0x100000001b3u;
    return mixed ^ (mixed >> 29);  // so that every bit of a word reaches the low ones too
  }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325u, word_ = 0;
  std::size_t filled_ = 0;  // bytes of the word
};

[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_file(std::initializer_list<text_part> what) {
  text message{"cca: cache file: "};
  message += what;
  throw std::runtime_error(message.c_str());
}

/// Writes parts of a stream, each with a checksum of all so far behind it.
class checked_writer {
 public:
  explicit checked_writer(std::ostream& stream) : stream_(stream) {}

  template <class T>
  void put(const T* data, std::int64_t count) {
    const auto* bytes = reinterpret_cast<const char*>(data);
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    stream_.write(bytes, static_cast<std::streamsize>(size));
    sum_.add(bytes, size);
  }
  void end_part() {
    const std::uint64_t sum = sum_.value();
    stream_.write(reinterpret_cast<const char*>(&sum), sizeof sum);
    if (!stream_) refuse_file({"cannot be written"});
  }

 private:
  std::ostream& stream_;
  checksum sum_;
};

/// Reads what a `checked_writer` wrote.
class checked_reader {
 public:
  explicit checked_reader(std::istream& stream) : stream_(stream) {}

  template <class T>
  void get(T* data, std::int64_t count) {
    auto* bytes = reinterpret_cast<char*>(data);
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    read(bytes, size);
    sum_.add(bytes, size);
  }

  /// Memory with `count` elements. It is taken as the bytes come in, so that a file that claims more than it holds costs
  /// nothing.
  template <class T>
  [[nodiscard]] aligned_memory get(std::int64_t count) {
    constexpr std::int64_t at_once = std::int64_t{1} << 20;
    aligned_memory memory;
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t next = smaller(count, larger(2 * done, at_once));
      aligned_memory grown(static_cast<std::size_t>(next) * sizeof(T));
      if (done > 0) std::memcpy(grown.data(), memory.data(), static_cast<std::size_t>(done) * sizeof(T));
      memory = std::move(grown);
      get(reinterpret_cast<T*>(memory.data()) + done, next - done);
      done = next;
    }
    return memory;
  }

  void end_part() {
    std::uint64_t sum = 0;
    read(reinterpret_cast<char*>(&sum), sizeof sum);
    if (sum != sum_.value()) refuse_file({"damaged: its checksum does not match"});
  }

 private:
  void read(char* bytes, std::size_t size) {
    stream_.read(bytes, static_cast<std::streamsize>(size));
    if (static_cast<std::size_t>(stream_.gcount()) != size) refuse_file({"ends too early"});
  }

  std::istream& stream_;
  checksum sum_;
};

}}}  // namespace cca::CCA_TARGET::detail
