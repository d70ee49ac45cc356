#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <istream>
#include <limits>
#include <new>
#include <ostream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "detail/base/checked_stream.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/refuse.hpp"
#include "detail/base/scratch.hpp"
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

inline text to_text(const element_code& code) {
  text all{"elements of ", code.bytes & 0xff, " bytes and ", code.digits & 0xff, " digits"};
  if (code.bytes >> 8 > 0) all += {", cores of ", code.bytes >> 8, " bytes and ", code.digits >> 8, " digits"};
  return all;
}

/// How a file of a cache begins, whatever its version.
struct cache_file_start {
  std::array<char, 8> magic{'c', 'c', 'a', '-', 'k', 'v', '\r', '\n'};
  std::uint32_t byte_order = 0x01020304;
  std::uint32_t version = 2;
};

/// Then this header; the options that are not the defaults; per sequence its length and the first raw token behind the
/// sink tokens, and the rows of its cores, their biases where they have any, `[head][core]`, and the rows of its sink tokens
/// and its other raw tokens, rows as `[head][keys | values][row][dim]`; behind rows of 8 bits, which are elements of 1 byte
/// and 7 digits, their scales, floats, `[head][of keys | of values][row]`; with `select_by_mass` the observers held,
/// `[query head][queries | sums][observer][dim | 2]`; behind each part a checksum of all so far. Numbers
/// are as in memory, in the byte order that `byte_order` tells.
struct cache_file_header {
  element_code elements;
  std::uint32_t option_count = 0;
  cache_shape shape{};
};

/// An option in a file.
struct cache_file_option {
  std::array<char, 24> name{};  ///< zeros behind it
  option_code code{};

  friend bool operator==(const cache_file_option&, const cache_file_option&) = default;
};

/// The header of version 1, whose options were these.
struct cache_file_header_1 {
  element_code elements;
  std::uint32_t pool = 0, cores = 0, has_scale = 0;
  double softmax_scale = 0;
  std::int64_t group_size = 0, window = 0;
  cache_shape shape{};

  [[nodiscard]] cca::options options() const {
    cca::options all{.group_size = group_size,
                     .window = window,
                     .pool = static_cast<pooling>(pool),
                     .core_heads = static_cast<core_heads>(cores)};
    if (has_scale != 0) all.softmax_scale = softmax_scale;
    return all;
  }
};
static_assert(sizeof(cache_shape) == 7 * sizeof(std::int64_t) && sizeof(cache_file_start) == 16 &&
                  sizeof(cache_file_header) == 8 + sizeof(cache_shape) && sizeof(cache_file_option) == 24 + 16 &&
                  sizeof(cache_file_header_1) == 16 + 3 * 8 + sizeof(cache_shape),
              "no padding: it would be written, and differ");

/// What of a cache goes into a file and how it comes back.
struct cache_file {
  /// The options that a file says: those that are not the defaults. It does not say the unit, for it may be read on
  /// another machine.
  static std::vector<cache_file_option> options_of(options options) {
    options.unit = matrix_unit::none;
    std::vector<cache_file_option> all;
    const auto entry_of = [](const char* name, const auto& option) {
      cache_file_option entry{.code = encode_option(option)};
      std::memcpy(entry.name.data(), name, smaller(std::strlen(name), entry.name.size()));
      return entry;
    };
    for_each_option(options, [&](const char* name, const auto& option) { all.push_back(entry_of(name, option)); });
    const cca::options defaults;
    for_each_option(defaults, [&](const char* name, const auto& option) { std::erase(all, entry_of(name, option)); });
    return all;
  }

  static options options_from(const cache_file_option* all, std::int64_t count) {
    options options;
    for (std::int64_t i = 0; i < count; ++i) {
      const cache_file_option& entry = all[i];
      char name[std::tuple_size_v<decltype(entry.name)> + 1] = {};
      std::memcpy(name, entry.name.data(), entry.name.size());
      bool known = false;
      for_each_option(options, [&](const char* own, auto& option) {
        if (std::strcmp(name, own) != 0) return;
        decode_option(entry.code, option);
        known = true;
      });
      if (!known) refuse_file({"got an option ", name, ", which this version of the library does not have"});
    }
    return options;
  }

  static void require_elements(const element_code& got, const element_code& wanted) {
    if (got != wanted) refuse_file({"got ", to_text(got).c_str(), ", wants ", to_text(wanted).c_str()});
  }

  /// A cache of the shape, but without sequences yet: they bring their memory with them.
  template <class Element, class Core>
  static kv_cache<Element, Core> empty_cache(cache_shape shape, options options, matrix_unit unit) {
    if (shape.batch < 0) refuse_file({"got ", shape.batch, " sequences, wants none below 0"});
    shape.batch = 0;
    options.unit = unit;
    try {
      return kv_cache<Element, Core>(shape, options);
    } catch (const std::invalid_argument& error) {
      refuse_file({error.what()});
    }
  }

  template <class Element, class Core>
  static void save_sequence(const kv_cache<Element, Core>& cache, std::int64_t b, checked_writer& writer) {
    const auto& sequence = cache.held_.at(b);
    const cache_shape& shape = cache.shape();
    const std::array<std::int64_t, 2> numbers{sequence.length, sequence.oldest};
    writer.put(numbers.data(), 2);
    writer.end_part();
    const std::int64_t cores = cache.core_count(b);
    const auto raw = sequence.raw.find({sequence.oldest, sequence.length});
    save_rows(sequence.cores, shape, {0, cores}, {}, writer);
    for (std::int64_t h = 0; has_core_biases(cache.options()) && h < cache.held_.core_heads; ++h)
      writer.put(sequence.biases.key(h, 0), cores);
    save_rows(sequence.sinks, shape, {0, cache.held_.sink_count(sequence.length)}, {}, writer);
    save_rows(sequence.raw, shape, {raw.row, raw.row + raw.first.size()}, {0, raw.second.size()}, writer);
    const auto observers = sequence.observers.find(cache.held_.observers(sequence));
    save_rows(sequence.observers, observer_shape(shape), {observers.row, observers.row + observers.first.size()},
              {0, observers.second.size()}, writer);
    writer.end_part();
  }

  /// Reads a sequence and adds it to the cache.
  template <class Element, class Core>
  static void load_sequence(kv_cache<Element, Core>& cache, checked_reader& reader) {
    const cache_shape& shape = cache.shape();
    std::array<std::int64_t, 2> numbers{};
    reader.get(numbers.data(), 2);
    reader.end_part();
    const auto [length, oldest] = numbers;
    const range held{oldest, length};
    const std::int64_t first = cache.options().sink_tokens;
    if (length < 0 || length > (std::int64_t{1} << 62) || (shape.capacity > 0 && length > shape.capacity) ||
        oldest < first || oldest > larger(first, cache.held_.partition().raw(length).begin) ||
        held.size() > cache.held_.raw_limit())
      refuse_file({"got raw tokens ", numbers, " of a sequence, which its window does not admit"});

    auto sequence = cache.held_.new_sequence();
    const std::int64_t cores = cache.held_.group_count(length), sinks = cache.held_.sink_count(length);
    const auto core_rows = read_rows<Core>(reader, cache.held_.core_heads, cores, shape);
    using bias = compute_type<Element>;
    const std::int64_t biases = has_core_biases(cache.options()) ? cores : 0;
    const aligned_memory core_biases = reader.get<bias>(cache.held_.core_heads * biases);
    const auto sink_rows = read_rows<Element>(reader, shape.kv_heads, sinks, shape);
    const auto raw_rows = read_rows<Element>(reader, shape.kv_heads, held.size(), shape);
    sequence.length = length;
    sequence.oldest = oldest;
    const range observers = cache.held_.observers(sequence);
    const auto observer_rows = read_rows<bias>(reader, shape.heads, observers.size(), observer_shape(shape));
    reader.end_part();
    try {
      cache.held_.reserve("shape.capacity", sequence, larger(length, shape.capacity));
    } catch (const std::exception& error) {
      refuse_file({error.what()});
    }
    // Heads are worth a loop only where the file brought rows of them.
    for (std::int64_t h = 0; h < cache.held_.core_heads && cores > 0; ++h)
      sequence.cores.copy_rows(h, 0, core_rows.of_head(h, shape), cores);
    for (std::int64_t h = 0; h < cache.held_.core_heads && biases > 0; ++h)
      copy_n(reinterpret_cast<const bias*>(core_biases.data()) + h * biases, biases, sequence.biases.key(h, 0));
    for (std::int64_t h = 0; h < shape.kv_heads && sinks > 0; ++h)
      sequence.sinks.copy_rows(h, 0, sink_rows.of_head(h, shape), sinks);
    if (!held.empty()) sequence.raw.write(held, [&](std::int64_t h) { return raw_rows.of_head(h, shape); });
    if (!observers.empty())
      sequence.observers.write(observers, [&](std::int64_t h) { return observer_rows.of_head(h, observer_shape(shape)); });
    cache.held_.add(std::move(sequence));
  }

 private:
  /// That of the rows of observers.
  static cache_shape observer_shape(cache_shape shape) {
    shape.value_dim = 2;
    return shape;
  }

  /// Rows of a store in the order of their tokens: those of a ring may lie in two pieces.
  template <class Element>
  static void save_rows(const row_store<Element>& rows, const cache_shape& shape, range first, range second,
                        checked_writer& writer) {
    const auto put = [&](std::int64_t h, auto row_of, std::int64_t dim) {
      for (const range& piece : {first, second}) writer.put((rows.*row_of)(h, piece.begin), piece.size() * dim);
    };
    using store = row_store<Element>;
    for (std::int64_t h = 0; h < rows.heads(); ++h) {
      put(h, &store::key, shape.dim);
      put(h, &store::value, shape.value_dim);
    }
    for (std::int64_t h = 0; is_q8<Element> && h < rows.heads(); ++h) {
      put(h, &store::key_scale, 1);
      put(h, &store::value_scale, 1);
    }
  }

  /// Rows as they are in a file, of `count` per head.
  template <class Element>
  struct read_memory {
    aligned_memory rows, scales;
    std::int64_t count;

    [[nodiscard]] context_rows<Element, Element> of_head(std::int64_t h, const cache_shape& shape) const {
      const auto* keys = reinterpret_cast<const Element*>(rows.data()) + h * count * (shape.dim + shape.value_dim);
      context_rows<Element, Element> all{keys, shape.dim, keys + count * shape.dim, shape.value_dim};
      if constexpr (is_q8<Element>) {
        all.key_scales = {reinterpret_cast<const float*>(scales.data()) + 2 * h * count, 1};
        all.value_scales = all.key_scales.from(count);
      }
      return all;
    }
  };

  template <class Element>
  static read_memory<Element> read_rows(checked_reader& reader, std::int64_t heads, std::int64_t rows,
                                        const cache_shape& shape) {
    if (elements(heads, rows, shape.dim + shape.value_dim) > max_elements)
      refuse_file({"got ", rows, " rows of ", heads, " heads, more than memory has"});
    read_memory<Element> all{reader.get<Element>(heads * rows * (shape.dim + shape.value_dim)), {}, rows};
    if (is_q8<Element>) all.scales = reader.get<float>(2 * heads * rows);
    return all;
  }
};

}  // namespace detail

/// Writes a cache to a binary stream.
/// @throws std::runtime_error  when the stream fails
template <class Element, class Core>
void save(const kv_cache<Element, Core>& cache, std::ostream& stream) {
  detail::checked_writer writer(stream);
  const auto options = detail::cache_file::options_of(cache.options());
  const detail::cache_file_start start;
  const detail::cache_file_header header{detail::element_code::of<Element, Core>(),
                                         static_cast<std::uint32_t>(options.size()), cache.shape()};
  writer.put(&start, 1);
  writer.put(&header, 1);
  writer.end_part();
  writer.put(options.data(), std::ssize(options));
  writer.end_part();
  for (std::int64_t b = 0; b < cache.shape().batch; ++b) detail::cache_file::save_sequence(cache, b, writer);
  if (!stream.flush()) detail::refuse_file({"cannot be written"});
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
  detail::checked_reader reader(stream);
  detail::cache_file_start start;
  const detail::cache_file_start wanted;
  reader.get(&start, 1);
  if (start.magic != wanted.magic) detail::refuse_file({"is not one"});
  if (start.byte_order != wanted.byte_order) detail::refuse_file({"was written in another byte order"});
  const auto read = [&](const cache_shape& shape, const options& options) {
    auto cache = detail::cache_file::empty_cache<Element, Core>(shape, options, unit);
    for (std::int64_t b = 0; b < shape.batch; ++b) detail::cache_file::load_sequence(cache, reader);
    return cache;
  };
  const auto elements = detail::element_code::of<Element, Core>();
  if (start.version == 1) {
    detail::cache_file_header_1 header;
    reader.get(&header, 1);
    reader.end_part();
    detail::cache_file::require_elements(header.elements, elements);
    return read(header.shape, header.options());
  }
  if (start.version != wanted.version)
    detail::refuse_file({"got version ", start.version, ", wants 1 or ", wanted.version});
  detail::cache_file_header header;
  reader.get(&header, 1);
  reader.end_part();
  detail::cache_file::require_elements(header.elements, elements);
  const auto options = reader.get<detail::cache_file_option>(header.option_count);
  reader.end_part();
  return read(header.shape,
              detail::cache_file::options_from(reinterpret_cast<const detail::cache_file_option*>(options.data()),
                                               header.option_count));
}

}}  // namespace cca::CCA_TARGET
