#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../simd/convert.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../softmax/scaled_softmax.hpp"
#include "byte_rows.hpp"
#include "operands.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A block of keys and values in 8 bits, keys as rows and values as columns, made once for all tiles of a stack. Rows are
/// padded to whole quads with zeros, which begin at multiples of 4. Rows that are not finite are zeros, too: whoever
/// multiplies adds them to the lanes that see them.
class staged_bytes {
  static constexpr std::int64_t row_bytes(std::int64_t dim) { return (dim + 15) / 16 * 16; }
  /// Of the columns of a quad of rows. A cache line more: they are read line by line, and would lie in few sets of the
  /// first-level cache.
  static constexpr std::int64_t quad_stride(std::int64_t dim) { return row_bytes(dim) + 16; }
  /// Rows of which memory is asked for that many rows before: 3 % of CCA attention at 32K tokens.
  static constexpr std::int64_t rows_ahead = 8;

 public:
  /// The first row of the quad that holds row `j`.
  [[nodiscard]] static constexpr std::int64_t quad_begin(std::int64_t j) { return j - j % 4; }

  /// Columns of values from row `j` of a block on, where a quad begins.
  struct columns_from {
    const staged_bytes* of;
    std::int64_t j;
  };

  /// Scratch floats for blocks of `rows` rows, whole quads.
  static constexpr std::int64_t size(const tile_form& form, std::int64_t rows, bool) {
    return rows / 4 * (row_bytes(form.dim) + quad_stride(form.value_dim)) + 4 * rows + row_bytes(form.value_dim) +
           padded<float>(larger(form.dim, form.value_dim));
  }

  staged_bytes(float* scratch, const tile_form& form, std::int64_t rows, bool)
      : form_(form),
        key_scale_(scratch),
        exponent_(key_scale_ + rows),
        inverse_(exponent_ + rows),
        start_(reinterpret_cast<std::int32_t*>(inverse_ + rows)),
        keys_(reinterpret_cast<std::int8_t*>(start_ + rows)),
        columns_(reinterpret_cast<packed_quad*>(keys_ + rows * row_bytes(form.dim))),
        quad_(reinterpret_cast<std::int8_t*>(columns_ + rows / 4 * quad_stride(form.value_dim))),
        numbers_(reinterpret_cast<float*>(quad_ + 4 * row_bytes(form.value_dim))) {}

  /// Takes in the rows `rows` of a head. Nothing is asked for of those that follow: the tiles of a stack, which take turns
  /// first, leave no room for it in second-level cache.
  template <class Key, class Value>
  void stage(const context_rows<Key, Value>& head, range rows) {
    rows_ = rows;
    key_memory_ = as_bytes(head.key, head.key_stride);
    value_memory_ = as_bytes(head.value, head.value_stride);
    key_size_ = form_.dim * static_cast<std::int64_t>(sizeof(Key));
    value_size_ = form_.value_dim * static_cast<std::int64_t>(sizeof(Value));
    infinite_keys_ = infinite_values_ = {};
    key_rows_ = {head.key, head.key_stride, form_.dim, head.key_scales};
    value_rows_ = {head.value, head.value_stride, form_.value_dim, head.value_scales};
    const std::int64_t begin = quad_begin(rows.begin), bytes = row_bytes(form_.value_dim);
    for (std::int64_t j = begin; j < rows.end; j += 4) {
      for (std::int64_t r = 0; r < 4; ++r) {
        if (rows.contains(j + r))
          stage_row(head, j + r, quad_ + r * bytes);
        else
          clear_row(j + r, quad_ + r * bytes);
      }
      interleave_quads(quad_, bytes, columns_ + (j - begin) / 4 * quad_stride(form_.value_dim));
    }
    // What was noted of each value is its scale, 0 of padding.
    for (std::int64_t i = 0; i < whole_quads(rows.end - begin); ++i) {
      const float scale = exponent_[i];
      exponent_[i] = scale == 0.0f ? 0.0f : detail::log2(scale);
      inverse_[i] = scale == 0.0f ? 0.0f : 1.0f / (255.0f * scale);
    }
  }

  [[nodiscard]] range rows() const { return rows_; }

  /// @{
  /// From row `j` on, where a quad begins.
  [[nodiscard]] byte_keys keys(std::int64_t j) const {
    const std::int64_t i = place_of(j);
    return {keys_ + i * row_bytes(form_.dim), row_bytes(form_.dim), key_scale_ + i, start_ + i};
  }
  [[nodiscard]] columns_from value_columns(std::int64_t j) const { return {this, j}; }
  [[nodiscard]] byte_columns columns(std::int64_t j) const {
    const std::int64_t stride = quad_stride(form_.value_dim);
    return {columns_ + place_of(j) / 4 * stride, stride};
  }
  [[nodiscard]] scaled_rows value_scales(std::int64_t j) const {
    return {exponent_ + place_of(j), inverse_ + place_of(j)};
  }
  /// @}

  /// @{
  /// Whether any of these rows is left out, and calls `f(j, d, x)` for the elements of those that are.
  [[nodiscard]] bool has_infinite_keys(range rows) const { return !intersection(rows, infinite_keys_).empty(); }
  template <class F>
  void for_each_infinite_key(range rows, const F& f) const {
    for_each_infinite(intersection(rows, infinite_keys_), key_rows_, f);
  }
  template <class F>
  void for_each_infinite_value(range rows, const F& f) const {
    for_each_infinite(intersection(rows, infinite_values_), value_rows_, f);
  }
  /// @}

 private:
  [[nodiscard]] std::int64_t place_of(std::int64_t j) const { return j - quad_begin(rows_.begin); }

  template <class Element>
  static row_span<std::int8_t> as_bytes(const Element* rows, std::int64_t stride) {
    return {reinterpret_cast<const std::int8_t*>(rows), stride * static_cast<std::int64_t>(sizeof(Element))};
  }

  template <class F>
  static void for_each_infinite(range some, const float_rows& rows, const F& f) {
    for (std::int64_t j = some.begin; j < some.end; ++j)
      rows.for_each_of_infinite(j, [&](std::int64_t d, float x) { f(j, d, x); });
  }

  template <class Key, class Value>
  CCA_INLINE void stage_row(const context_rows<Key, Value>& head, std::int64_t j, std::int8_t* value_bytes) {
    constexpr float least_key = 0x1p-100f, least_value = 0x1p-64f;
    const std::int64_t i = place_of(j);
    prefetch_row(key_memory_, j + rows_ahead, key_size_);
    prefetch_row(value_memory_, j + rows_ahead, value_size_);
    const auto* key = numbers_of(head.key + j * head.key_stride, head.key_scales, j, form_.dim);
    const byte_scale of_key = scale_of(key, form_.dim, least_key);
    key_scale_[i] = of_key.scale;
    start_[i] = -128 * put_row(key, form_.dim, of_key, keys_ + i * row_bytes(form_.dim));
    if (!of_key.finite) infinite_keys_ = hull(infinite_keys_, {j, j + 1});

    const auto* value = numbers_of(head.value + j * head.value_stride, head.value_scales, j, form_.value_dim);
    const byte_scale of_value = scale_of(value, form_.value_dim, least_value);
    exponent_[i] = of_value.scale;
    put_row(value, form_.value_dim, of_value, value_bytes);
    if (!of_value.finite) infinite_values_ = hull(infinite_values_, {j, j + 1});
  }

  /// Row `j`, or the numbers that one of 8 bits stands for: it is rounded anew, as any other.
  template <class Element>
  CCA_INLINE auto numbers_of(const Element* row, [[maybe_unused]] row_scales scales, [[maybe_unused]] std::int64_t j,
                             [[maybe_unused]] std::int64_t dim) const {
    if constexpr (is_q8<Element>)
      return stage_numbers<float>(row, 0, scales.from(j), dim, 1, numbers_).data;
    else
      return row;
  }

  void clear_row(std::int64_t j, std::int8_t* value_bytes) {
    const std::int64_t i = place_of(j);
    key_scale_[i] = exponent_[i] = 0.0f;
    start_[i] = 0;
    fill_n(keys_ + i * row_bytes(form_.dim), row_bytes(form_.dim), std::int8_t{0});
    fill_n(value_bytes, row_bytes(form_.value_dim), std::int8_t{0});
  }

  /// Returns the sum of the bytes. Those behind the row are zeros.
  template <class Element>
  static CCA_INLINE std::int32_t put_row(const Element* row, std::int64_t dim, const byte_scale& as, std::int8_t* to) {
    const std::int64_t written = as.finite ? padded<float>(dim) : 0;
    fill(to + written, to + row_bytes(dim), std::int8_t{0});
    return as.finite ? put_bytes(row, dim, as.factor(), to) : 0;
  }

  tile_form form_;
  float *key_scale_, *exponent_, *inverse_;
  std::int32_t* start_;
  std::int8_t* keys_;
  packed_quad* columns_;
  std::int8_t* quad_;
  float* numbers_;
  range rows_, infinite_keys_, infinite_values_;
  float_rows key_rows_, value_rows_;
  row_span<std::int8_t> key_memory_, value_memory_;
  std::int64_t key_size_ = 0, value_size_ = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
