#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <istream>
#include <limits>
#include <new>
#include <ostream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "detail/base/validate.hpp"
#include "element.hpp"
#include "kv_cache.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Tells elements apart: by their bytes and, since bfloat16 and half have 2 of them both, the bits of their significands.
/// Where cores are of another type, its numbers are in the upper bytes: a file of one type is what it was, and is read by,
/// before there were two.
struct element_code {
  std::uint16_t bytes = 0, digits = 0;

  template <class Element, class Core>
  static constexpr element_code of() {
    const auto both = [](std::size_t of_element, std::size_t of_core) {
      return static_cast<std::uint16_t>(of_element + (std::is_same_v<Element, Core> ? 0 : of_core << 8));
    };
    return {both(sizeof(Element), sizeof(Core)),
            both(std::numeric_limits<Element>::digits, std::numeric_limits<Core>::digits)};
  }

  friend bool operator==(const element_code&, const element_code&) = default;
};

inline std::string to_string(const element_code& code) {
  const auto numbers = [&](int shift) {
    return std::to_string(code.bytes >> shift & 0xff) + " bytes and " + std::to_string(code.digits >> shift & 0xff) +
           " digits";
  };
  return "elements of " + numbers(0) + (code.bytes >> 8 > 0 ? ", cores of " + numbers(8) : "");
}

/// A file of a cache: this header, then per sequence its length and first raw token, then the rows of its cores and of its
/// raw tokens, `[head][keys | values][row][dim]`; behind each a checksum of all so far. Numbers are as in memory, in the
/// byte order that `byte_order` tells.
struct cache_file_header {
  std::array<char, 8> magic{'c', 'c', 'a', '-', 'k', 'v', '\r', '\n'};
  std::uint32_t byte_order = 0x01020304;
  std::uint32_t version = 1;
  element_code elements;
  std::uint32_t pool = 0, cores = 0;
  std::uint32_t has_scale = 0;
  double softmax_scale = 0;
  std::int64_t group_size = 0, window = 0;
  std::int64_t batch = 0, heads = 0, kv_heads = 0, dim = 0, value_dim = 0, capacity = 0, rewind = 0;
};
static_assert(sizeof(cache_file_header) == 8 + 6 * 4 + 8 + 9 * 8, "no padding: it would be written, and differ");

/// 64-bit FNV-1a over 8 bytes at a time, however they come in: tells damage, not malice.
class checksum {
 public:
  void add(const char* data, std::size_t bytes) {
    while (bytes > 0) {
      const std::size_t part = std::min(bytes, sizeof word_ - filled_);
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

[[noreturn]] inline void refuse_file(const std::string& what) { throw std::runtime_error("cca: cache file: " + what); }

class cache_writer {
 public:
  explicit cache_writer(std::ostream& stream) : stream_(stream) {}

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
    if (!stream_) refuse_file("cannot be written");
  }

 private:
  std::ostream& stream_;
  checksum sum_;
};

class cache_reader {
 public:
  explicit cache_reader(std::istream& stream) : stream_(stream) {}

  template <class T>
  void get(T* data, std::int64_t count) {
    auto* bytes = reinterpret_cast<char*>(data);
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    read(bytes, size);
    sum_.add(bytes, size);
  }

  /// Appends `count` elements to `to`. Memory is taken as the bytes come in, so that a file that claims more than it
  /// holds costs nothing.
  template <class T>
  void get(std::vector<T>& to, std::int64_t count) {
    constexpr std::int64_t at_once = std::int64_t{1} << 20;
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t part = std::min(count - done, at_once);
      to.resize(to.size() + static_cast<std::size_t>(part));
      get(to.data() + to.size() - part, part);
      done += part;
    }
  }

  void end_part() {
    std::uint64_t sum = 0;
    read(reinterpret_cast<char*>(&sum), sizeof sum);
    if (sum != sum_.value()) refuse_file("damaged: its checksum does not match");
  }

 private:
  void read(char* bytes, std::size_t size) {
    stream_.read(bytes, static_cast<std::streamsize>(size));
    if (static_cast<std::size_t>(stream_.gcount()) != size) refuse_file("ends too early");
  }

  std::istream& stream_;
  checksum sum_;
};

/// What of a cache goes into a file and how it comes back.
struct cache_file {
  template <class Element, class Core>
  static cache_file_header header_of(const kv_cache<Element, Core>& cache) {
    const options& options = cache.options();
    const cache_shape& shape = cache.shape();
    cache_file_header header;
    header.elements = element_code::of<Element, Core>();
    header.pool = static_cast<std::uint32_t>(options.pool);
    header.cores = static_cast<std::uint32_t>(options.core_heads);
    header.has_scale = options.softmax_scale.has_value();
    header.softmax_scale = options.softmax_scale.value_or(0);
    header.group_size = options.group_size;
    header.window = options.window;
    header.batch = shape.batch;
    header.heads = shape.heads;
    header.kv_heads = shape.kv_heads;
    header.dim = shape.dim;
    header.value_dim = shape.value_dim;
    header.capacity = shape.capacity;
    header.rewind = shape.rewind;
    return header;
  }

  /// A cache as the header says, but without sequences yet: they bring their memory with them.
  template <class Element, class Core>
  static kv_cache<Element, Core> empty_cache(const cache_file_header& header, matrix_unit unit) {
    if (header.batch < 0) refuse_file("got " + std::to_string(header.batch) + " sequences, wants none below 0");
    cache_shape shape{0, header.heads, header.kv_heads, header.dim, header.value_dim, header.capacity, header.rewind};
    options options{.group_size = header.group_size,
                    .window = header.window,
                    .pool = static_cast<pooling>(header.pool),
                    .core_heads = static_cast<cca::core_heads>(header.cores),
                    .unit = unit};
    if (header.has_scale) options.softmax_scale = header.softmax_scale;
    try {
      return kv_cache<Element, Core>(shape, options);
    } catch (const std::invalid_argument& error) {
      refuse_file(error.what());
    }
  }

  template <class Element, class Core>
  static void save_sequence(const kv_cache<Element, Core>& cache, std::int64_t b, cache_writer& writer) {
    const auto& sequence = cache.at(b);
    const cache_shape& shape = cache.shape();
    const std::array<std::int64_t, 2> numbers{sequence.length, sequence.oldest};
    writer.put(numbers.data(), 2);
    writer.end_part();
    const std::int64_t cores = cache.core_count(b);
    const auto raw = sequence.raw.find({sequence.oldest, sequence.length});
    for (std::int64_t h = 0; h < cache.core_heads_; ++h) {
      writer.put(sequence.cores.key(h, 0), cores * shape.dim);
      writer.put(sequence.cores.value(h, 0), cores * shape.value_dim);
    }
    for (std::int64_t h = 0; h < shape.kv_heads; ++h) {
      writer.put(sequence.raw.key(h, raw.row), raw.first.size() * shape.dim);
      writer.put(sequence.raw.key(h, 0), raw.second.size() * shape.dim);
      writer.put(sequence.raw.value(h, raw.row), raw.first.size() * shape.value_dim);
      writer.put(sequence.raw.value(h, 0), raw.second.size() * shape.value_dim);
    }
    writer.end_part();
  }

  /// Reads a sequence and adds it to the cache.
  template <class Element, class Core>
  static void load_sequence(kv_cache<Element, Core>& cache, cache_reader& reader) {
    const cache_shape& shape = cache.shape();
    std::array<std::int64_t, 2> numbers{};
    reader.get(numbers.data(), 2);
    reader.end_part();
    const auto [length, oldest] = numbers;
    const range held{oldest, length};
    if (length < 0 || length > (std::int64_t{1} << 62) || (shape.capacity > 0 && length > shape.capacity) ||
        oldest < 0 || oldest > cache.partition_.raw(length).begin || held.size() > cache.raw_limit())
      refuse_file("got raw tokens " + to_string(numbers) + " of a sequence, which its window does not admit");

    auto sequence = cache.new_sequence();
    const std::int64_t cores = cache.group_count(length);
    const std::vector<Core> core_rows = read_rows<Core>(reader, cache.core_heads_, cores, shape);
    const std::vector<Element> raw_rows = read_rows<Element>(reader, shape.kv_heads, held.size(), shape);
    reader.end_part();
    try {
      cache.reserve("shape.capacity", sequence, std::max(length, shape.capacity));
    } catch (const std::exception& error) {
      refuse_file(error.what());
    }
    // Heads are worth a loop only where the file brought rows of them.
    for (std::int64_t h = 0; h < cache.core_heads_ && cores > 0; ++h)
      sequence.cores.copy_rows(h, 0, rows_of_head(core_rows, h, cores, shape), cores);
    if (!held.empty())
      sequence.raw.write(held, [&](std::int64_t h) { return rows_of_head(raw_rows, h, held.size(), shape); });
    sequence.length = length;
    sequence.oldest = oldest;
    cache.add(std::move(sequence));
  }

 private:
  /// `[head][keys | values][row][dim]`
  template <class Element>
  static std::vector<Element> read_rows(cache_reader& reader, std::int64_t heads, std::int64_t rows,
                                        const cache_shape& shape) {
    if (elements(heads, rows, shape.dim + shape.value_dim) > max_elements)
      refuse_file("got " + std::to_string(rows) + " rows of " + std::to_string(heads) + " heads, more than memory has");
    std::vector<Element> all;
    reader.get(all, heads * rows * (shape.dim + shape.value_dim));
    return all;
  }

  template <class Element>
  static context_rows<Element, Element> rows_of_head(const std::vector<Element>& all, std::int64_t h, std::int64_t rows,
                                                     const cache_shape& shape) {
    const Element* keys = all.data() + h * rows * (shape.dim + shape.value_dim);
    return {keys, shape.dim, keys + rows * shape.dim, shape.value_dim};
  }
};

}  // namespace detail

/// Writes a cache to a binary stream.
/// @throws std::runtime_error  when the stream fails
template <class Element, class Core>
void save(const kv_cache<Element, Core>& cache, std::ostream& stream) {
  detail::cache_writer writer(stream);
  const detail::cache_file_header header = detail::cache_file::header_of(cache);
  writer.put(&header, 1);
  writer.end_part();
  for (std::int64_t b = 0; b < header.batch; ++b) detail::cache_file::save_sequence(cache, b, writer);
  if (!stream.flush()) detail::refuse_file("cannot be written");
}

/// Reads a cache from a binary stream, and nothing behind it.
/// @param stream  read from where it stands to the end of the cache
/// @param unit  as in `options`: a file does not say, for it may come from another machine
/// @throws std::invalid_argument  for a unit that is not there for these elements
/// @throws std::runtime_error  for a file that is foreign, of another version or byte order, of other elements or cores,
///   damaged or cut short: nothing in it is relied on before its checksum and its meaning are checked
template <class Element, class Core = Element>
[[nodiscard]] kv_cache<Element, Core> load(std::istream& stream, matrix_unit unit = matrix_unit::none) {
  detail::require_unit<detail::product_type<Element, Core>>({.unit = unit});
  detail::cache_reader reader(stream);
  detail::cache_file_header header;
  const detail::cache_file_header wanted;
  reader.get(&header, 1);
  if (header.magic != wanted.magic) detail::refuse_file("is not one");
  if (header.byte_order != wanted.byte_order) detail::refuse_file("was written in another byte order");
  if (header.version != wanted.version)
    detail::refuse_file("got version " + std::to_string(header.version) + ", wants " + std::to_string(wanted.version));
  reader.end_part();
  if (const auto elements = detail::element_code::of<Element, Core>(); header.elements != elements)
    detail::refuse_file("got " + to_string(header.elements) + ", wants " + to_string(elements));
  auto cache = detail::cache_file::empty_cache<Element, Core>(header, unit);
  for (std::int64_t b = 0; b < header.batch; ++b) detail::cache_file::load_sequence(cache, reader);
  return cache;
}

}}  // namespace cca::CCA_TARGET
