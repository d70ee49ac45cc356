#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../call.hpp"
#include "../../element.hpp"
#include "../../quantize.hpp"
#include "../../tensor_view.hpp"
#include "../base/scratch.hpp"
#include "source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Whether a cache of `Element` takes tokens of these elements: its own, or numbers that it rounds to rows of 8 bits.
template <class Element, class Key, class Value>
inline constexpr bool takes_tokens = (std::is_same_v<Key, Element> && std::is_same_v<Value, Element>) ||
                                     (is_q8<Element> &&
                                      (std::is_same_v<Key, float> ||
                                       is_unit_element<Key>)&&(std::is_same_v<Value, float> || is_unit_element<Value>));

/// The new tokens of a step as a cache of `Element` keeps them. Numbers that become rows of 8 bits are rounded first of
/// all, in scratch memory: what is pooled, attended to and kept is the same, so that answers do not depend on how a
/// sequence was cut into steps.
template <class Element, class Key, class Value>
class kept_tokens {
  static constexpr bool rounded = !std::is_same_v<Key, Element>;

 public:
  kept_tokens(const tensor_view<const Key>& key, const tensor_view<const Value>& value)
      : keys_(key.extent), values_(value.extent) {}

  [[nodiscard]] std::size_t bytes() const {
    if (!rounded) return 0;
    return scratch_bytes<q8>(size(keys_)) + scratch_bytes<q8>(size(values_)) + 2 * scratch_bytes<float>(rows());
  }

  template <class Inputs>
  [[nodiscard]] row_views<Element, Element> take(const Inputs& in, const execution& run,
                                                 [[maybe_unused]] scratch& memory) const {
    if constexpr (!rounded) {
      return row_views_of(in);
    } else {
      const auto view = [&](const std::array<std::int64_t, 4>& extent) {
        return bhsd(memory.take<q8>(size(extent)), extent[0], extent[1], extent[2], extent[3]);
      };
      const auto scales = [&] { return bhs(memory.take<float>(rows()), keys_[0], keys_[1], keys_[2]); };
      const tensor_view<q8> key = view(keys_), value = view(values_);
      const lse_view<float> key_scales = scales(), value_scales = scales();
      round_rows(in.key, key, key_scales, run);
      round_rows(in.value, value, value_scales, run);
      return {key, value, key_scales, value_scales};
    }
  }

 private:
  [[nodiscard]] static std::int64_t size(const std::array<std::int64_t, 4>& extent) {
    return element_count<q8>(extent[0], extent[1], extent[2], extent[3]);
  }
  [[nodiscard]] std::int64_t rows() const { return element_count<float>(keys_[0], keys_[1], keys_[2]); }

  std::array<std::int64_t, 4> keys_, values_;
};

}}}  // namespace cca::CCA_TARGET::detail
