#pragma once

// What a call is about, drawn from a string of bytes.

#include <array>
#include <cstddef>
#include <cstdint>

#include "entry_points.hpp"

namespace cca::test {

/// Bytes as a source of choices; zeros when they are used up.
class byte_source {
 public:
  byte_source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return next_ < size_ ? data_[next_++] : std::uint8_t{0}; }

  /// A number in `[least, greatest]`, of at most 256 choices.
  std::int64_t draw(std::int64_t least, std::int64_t greatest) { return least + byte() % (greatest - least + 1); }

  /// True in one of `times` cases.
  bool once_in(std::int64_t times) { return draw(1, times) == times; }

  template <class Choices>
  auto choice(const Choices& choices) {
    return choices[static_cast<std::size_t>(draw(0, std::ssize(choices) - 1))];
  }

  /// In [-2, 2): logits stay small enough for one tolerance.
  double number() { return static_cast<std::int8_t>(byte()) / 64.0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, next_ = 0;
};

inline std::int64_t draw(byte_source& bytes, std::int64_t least, std::int64_t greatest) {
  return bytes.draw(least, greatest);
}

/// A problem that one of the entry points takes.
template <class Entries>
problem draw_problem(byte_source& bytes, const Entries& entries) {
  problem p{.entry = bytes.choice(entries), .sizes = {}, .options = {}};
  sizes& s = p.sizes;
  s.batch = bytes.once_in(8) ? 0 : bytes.draw(1, 2);
  s.kv_heads = bytes.draw(1, 3);
  s.heads = s.kv_heads * bytes.draw(1, 3);
  s.keys = bytes.draw(0, 90);
  s.queries = bytes.draw(0, 90);
  s.dim = bytes.draw(1, 40);
  s.value_dim = bytes.draw(1, 40);
  options& o = p.options;
  if (bytes.once_in(3)) o.softmax_scale = bytes.choice(std::array{0.0, -0.5, 0.3, 1.0});
  const auto group = [&] {
    o.group_size = bytes.draw(1, 20);
    o.window = bytes.draw(1, 100);
  };
  switch (p.entry) {
    case entry::attention:
      group();
      [[fallthrough]];
    case entry::pool:
      s.queries = s.keys;
      o.group_size = bytes.draw(1, 20);
      if (bytes.once_in(3)) o.sink_tokens = bytes.draw(0, 100);
      o.pool = bytes.choice(all_poolings);
      o.core_heads = bytes.choice(all_core_heads);
      if (p.entry == entry::pool) o.window = pool_window(o.pool, bytes.draw(1, 100));
      if (p.entry == entry::pool && !detail::uses_query(o.pool)) o.softmax_scale.reset();
      if (o.pool == pooling::last_query && bytes.once_in(3)) o.pooling_scale = bytes.choice(std::array{0.0, 0.5, 4.0});
      break;
    case entry::attend:
      p.far_heads = bytes.draw(1, s.heads);
      while (s.heads % p.far_heads != 0) --p.far_heads;
      p.far_length = bytes.draw(0, 60);
      [[fallthrough]];
    case entry::local:
      if (!bytes.once_in(4)) group();
      [[fallthrough]];
    default:
      if (bytes.once_in(3)) o.first_position = bytes.draw(-60, 120);
      if (bytes.once_in(3)) o.sink_tokens = bytes.draw(0, 100);
      if (o.group_size == 0 && bytes.once_in(3)) o.prefix = bytes.draw(0, 100);
      if (o.group_size == 0 && bytes.once_in(3)) o.lookahead = bytes.choice(std::array{std::int64_t{2}, unlimited});
  }
  return p;
}

}  // namespace cca::test
