#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <type_traits>
#include <vector>

#include "../detail/base/numbers.hpp"
#include "../detail/base/refuse.hpp"
#include "../element.hpp"
#include "../tensor_view.hpp"
#include "cca.h"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A type of elements, and its name as NumPy's users know it.
template <class T>
constexpr DLDataType data_type() {
  const auto code = std::is_integral_v<T> ? kDLInt : is_bfloat16<T> ? kDLBfloat : kDLFloat;
  constexpr std::uint8_t bits = is_q8<T> ? 8 : is_unit_element<T> ? 16 : std::is_same_v<T, float> ? 32 : 64;
  return {static_cast<std::uint8_t>(code), bits, 1};
}
inline text type_text(const DLDataType& type) {
  constexpr const char* names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  text name{};
  if (type.code < std::size(names))
    name += {names[type.code], type.bits};
  else
    name += {"type ", type.code, " of ", type.bits};
  if (type.lanes != 1) name += {" in ", type.lanes, " lanes"};
  return name;
}
template <class T>
bool is_of(const DLDataType& type) {
  constexpr DLDataType wanted = data_type<T>();
  return type.code == wanted.code && type.bits == wanted.bits && type.lanes == 1;
}

/// Calls `f(std::type_identity<T>)` with the type of elements that a tensor of this name has.
template <class F>
auto with_element(const char* name, const DLDataType& type, const F& f) {
  if (is_of<float>(type)) return f(std::type_identity<float>{});
  if (is_of<double>(type)) return f(std::type_identity<double>{});
  if (is_of<Eigen::bfloat16>(type)) return f(std::type_identity<Eigen::bfloat16>{});
  if (is_of<Eigen::half>(type)) return f(std::type_identity<Eigen::half>{});
  refuse(name, {type_text(type).c_str()}, {"float32, float64, bfloat16 or float16"});
}

/// The same with what a cache is made of.
template <class F>
auto with_cache_element(const char* name, const DLDataType& type, const F& f) {
  if (is_of<q8>(type)) return f(std::type_identity<q8>{});
  return with_element(name, type, f);
}

/// Sequences of their own lengths, as `tensor_view` has them.
struct token_ranges {
  const std::int64_t *begins = nullptr, *ends = nullptr;
  std::int64_t batch = 0, longest = 0;
  bool packed = false;                        ///< whether they lie one after the other
  const char* name = nullptr;                 ///< of the argument that says so
  mutable bool taken = false;                 ///< whether a tensor has them
  std::vector<std::int64_t> computed_ends{};  ///< of begins and lengths, or of lists
};

/// The first of its extents, for a refusal.
inline text_part extents_of(const DLTensor& t) { return {t.shape, static_cast<std::size_t>(smaller(t.ndim, 8))}; }

/// A tensor whose shape and memory can be looked at. `T` are its elements.
template <class T>
T* checked_data(const char* name, const DLTensor& t) {
  const int device = static_cast<int>(t.device.device_type);
  if (device != kDLCPU && device != kDLCUDAHost && device != kDLROCMHost)
    refuse(name, {"memory of DLPack's device type ", device}, {"memory of the processor"});
  if (!is_of<T>(t.dtype)) refuse(name, {type_text(t.dtype).c_str()}, {type_text(data_type<T>()).c_str()});
  if (t.ndim < 0 || (t.ndim > 0 && t.shape == nullptr)) refuse(name, {"no shape"}, {"extents"});
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] < 0) refuse(name, {"extents ", extents_of(t)}, {"none below 0"});
  if (t.data == nullptr) return nullptr;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
  if (address % (t.dtype.bits / 8u) != 0)
    refuse(name, {"an address that ends with ", address % 16}, {"a multiple of its elements' size"});
  return reinterpret_cast<T*>(address);
}

/// A tensor's strides, those of a compact one where it has none.
template <std::size_t Rank>
std::array<std::int64_t, Rank> strides_of(const char* name, const DLTensor& t) {
  std::array<std::int64_t, Rank> strides{};
  std::int64_t compact = 1;
  for (std::size_t i = Rank; i-- > 0;) {
    strides[i] = t.strides != nullptr ? t.strides[i] : compact;
    if (__builtin_mul_overflow(compact, larger<std::int64_t>(t.shape[i], 1), &compact))
      refuse(name, {"extents ", extents_of(t)}, {"fewer than 2^62 bytes of elements"});
  }
  return strides;
}

template <class T, std::size_t Rank>
tensor_view<T, Rank> view_of(const char* name, const DLTensor& t) {
  T* data = const_cast<T*>(checked_data<std::remove_const_t<T>>(name, t));
  if (Rank == 3 && t.ndim == 1)  // one number per head
    return {data, {1, t.shape[0], 1}, {0, strides_of<1>(name, t)[0], 1}};
  if (t.ndim != static_cast<int>(Rank))
    refuse(name, {t.ndim, " dimensions"}, {Rank, Rank == 3 ? ", or 1 for a number per head" : ""});
  tensor_view<T, Rank> view{data, {}, strides_of<Rank>(name, t)};
  bool empty = false;
  for (std::size_t i = 0; i < Rank; ++i) {
    view.extent[i] = t.shape[i];
    empty |= t.shape[i] == 0;
  }
  // What steps over a single element, or over none, is of no account, and not kept by those who make tensors.
  if (Rank == 4 && (view.extent[3] == 1 || empty)) view.stride[3] = 1;
  return view;
}

/// Gives a view the sequences of `of`.
template <class T, std::size_t Rank>
tensor_view<T, Rank> with_sequences(const char* name, tensor_view<T, Rank> view, const token_ranges& of) {
  if (of.ends == nullptr) return view;
  if (!of.packed && view.batch() != of.batch) return view;  // numbers for all sequences have no lengths, the rest is refused
  if (of.packed && view.batch() != 1)
    refuse(name, {"a batch of ", view.batch()}, {"1, with sequences at offsets"});
  for (std::int64_t b = 0; b < of.batch; ++b)
    if (of.ends[b] > view.length())
      refuse(name, {"sequence ", b, " up to token ", of.ends[b]}, {"at most the length of ", view.length()});
  if (of.packed) {
    view.extent[0] = of.batch;
    view.extent[2] = of.longest;
    view.stride[0] = 0;
  }
  view.begins = of.begins;
  view.ends = of.ends;
  return view;
}

/// The numbers of a tensor of one dimension, as many as `count` if that is not negative.
inline std::span<const std::int64_t> numbers_of(const char* name, const DLTensor& t, std::int64_t count = -1) {
  const std::int64_t* data = checked_data<std::int64_t>(name, t);
  if (t.ndim != 1) refuse(name, {t.ndim, " dimensions"}, {"1"});
  if (t.strides != nullptr && t.shape[0] > 1 && t.strides[0] != 1)
    refuse(name, {"a stride of ", t.strides[0]}, {"1"});
  if (count >= 0 && t.shape[0] != count) refuse(name, {extents_of(t)}, {count, " of them"});
  if (data == nullptr && t.shape[0] > 0) refuse(name, {"a null pointer"}, {"elements ", extents_of(t)});
  static constexpr std::int64_t none = 0;
  return {data != nullptr ? data : &none, static_cast<std::size_t>(t.shape[0])};
}

/// A tensor of a call and its name there.
struct named_tensor {
  const char* name;
  const DLTensor* tensor;

  [[nodiscard]] bool given() const { return tensor != nullptr; }
  [[nodiscard]] std::span<const std::int64_t> numbers(std::int64_t count = -1) const {
    return numbers_of(name, *tensor, count);
  }
};

/// The sequences of lengths, and begins where they are given, or of offsets.
inline token_ranges ranges_of(const named_tensor& lengths, const named_tensor& begins, const named_tensor& offsets) {
  token_ranges to;
  if (begins.given() && !lengths.given()) refuse(begins.name, {"begins"}, {"lengths beside them"});
  to.name = offsets.given() ? offsets.name : lengths.name;
  if (offsets.given()) {
    if (lengths.given()) refuse(offsets.name, {"offsets"}, {"none beside lengths"});
    const auto all = offsets.numbers();
    if (all.empty()) refuse(offsets.name, {"none"}, {"batch + 1 of them"});
    to = {all.data(), all.data() + 1, std::ssize(all) - 1, longest_sequence(all), true, to.name};
  } else if (lengths.given()) {
    const auto all = lengths.numbers();
    to = {nullptr, all.data(), std::ssize(all), 0, false, to.name};
    if (!begins.given()) return to;
    to.begins = begins.numbers(std::ssize(all)).data();
    for (std::size_t b = 0; b < all.size(); ++b) {
      std::int64_t end = 0;
      if (__builtin_add_overflow(to.begins[b], all[b], &end))
        refuse(begins.name, {to.begins[b]}, {"a token of the row"});
      to.computed_ends.push_back(end);
    }
    if (!all.empty()) to.ends = to.computed_ends.data();
  }
  return to;
}

/// The lists of sequences that have one for every `size` of their queries: from the first place of their batch entry on, or
/// one after the other where the sequences are.
inline token_ranges lists_of(const token_ranges& queries, std::int64_t size) {
  token_ranges to;
  if (queries.ends == nullptr || size < 1) return to;
  to.batch = queries.batch;
  to.packed = queries.packed;
  if (to.packed) to.computed_ends.push_back(0);
  for (std::int64_t b = 0; b < to.batch; ++b) {
    // Those of sequences that are refused later are none.
    const std::int64_t begin = queries.begins != nullptr ? larger<std::int64_t>(queries.begins[b], 0) : 0;
    const std::int64_t length = larger(queries.ends[b], begin) - begin;
    const std::int64_t lists = length / size + (length % size > 0);
    to.longest = larger(to.longest, lists);
    to.computed_ends.push_back(to.packed ? to.computed_ends.back() + lists : lists);
  }
  to.ends = to.computed_ends.data() + (to.packed ? 1 : 0);
  if (to.packed) to.begins = to.computed_ends.data();
  return to;
}

}}}  // namespace cca::CCA_TARGET::detail
