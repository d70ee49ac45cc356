#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <type_traits>

#include "../cache_shape.hpp"
#include "../call.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../tensor_view.hpp"
#include "plain.hpp"
#include "to_plain.hpp"

namespace cca { inline namespace CCA_TARGET { namespace dispatch {

/// `cca::kv_cache` for the processor that the program runs on; see there. It stays with the instruction set that it was
/// made with. Tokens, queries and outputs have the cache's element type, or are floats where that is `q8`; tokens of a cache of
/// `q8` may also come as rows of `q8` with scales, in inputs.
template <class Element = float>
class kv_cache {
 public:
  /// As in `cca::kv_cache`, and so are all members here.
  ///@{
  using element_type = Element;
  using number_type = typename plain::token<Element>::type;
  using operand = tensor_view<const number_type>;

  kv_cache(const cache_shape& shape, const options& options)
      : kv_cache(detail::cache_kernels<Element>(), [&](const auto& kernels) {
          return kernels.make(detail::to_plain(shape), detail::to_plain(options));
        }) {}

  [[nodiscard]] const cache_shape& shape() const { return shape_; }
  [[nodiscard]] const cca::options& options() const { return options_; }

  [[nodiscard]] std::int64_t length(std::int64_t b = 0) const { return counts(b).length; }
  [[nodiscard]] std::int64_t core_count(std::int64_t b = 0) const { return counts(b).cores; }
  [[nodiscard]] std::int64_t raw_count(std::int64_t b = 0) const { return counts(b).raw; }
  [[nodiscard]] std::int64_t least_length(std::int64_t b = 0) const { return counts(b).least_length; }
  [[nodiscard]] std::size_t bytes() const { return kernels_->bytes(cache_.get())[0]; }
  [[nodiscard]] std::size_t allocated_bytes() const { return kernels_->bytes(cache_.get())[1]; }

  template <class Row = number_type>
  void attend(const inputs<number_type, Row>& in, const results<number_type>& to, const execution& run = {}) {
    step<Row>(steps_of<Row>().attend, {}, in, to, run);
  }
  template <class Row = number_type>
  void attend(std::int64_t b, const inputs<number_type, Row>& in, const results<number_type>& to,
              const execution& run = {}) {
    step<Row>(steps_of<Row>().attend, b, in, to, run);
  }
  void attend(const operand& query, const operand& key, const operand& value, const tensor_view<number_type>& out,
              const execution& run = {}) {
    attend({query, key, value}, {out}, run);
  }
  void attend(std::int64_t b, const operand& query, const operand& key, const operand& value,
              const tensor_view<number_type>& out, const execution& run = {}) {
    attend(b, {query, key, value}, {out}, run);
  }

  template <class Row = number_type>
  void append(const inputs<number_type, Row>& in, const execution& run = {}) {
    step<Row>(steps_of<Row>().append, {}, in, run);
  }
  template <class Row = number_type>
  void append(std::int64_t b, const inputs<number_type, Row>& in, const execution& run = {}) {
    step<Row>(steps_of<Row>().append, b, in, run);
  }
  void append(const operand& query, const operand& key, const operand& value, const execution& run = {}) {
    append({query, key, value}, run);
  }
  void append(std::int64_t b, const operand& query, const operand& key, const operand& value,
              const execution& run = {}) {
    append(b, {query, key, value}, run);
  }

  void truncate(std::int64_t b, std::int64_t length) { kernels_->truncate(cache_.get(), b, length); }
  void reset(std::int64_t b) { kernels_->reset(cache_.get(), b); }
  void reset() { kernels_->reset(cache_.get(), {}); }
  void fork(std::int64_t from, std::int64_t to) { kernels_->fork(cache_.get(), from, to); }
  ///@}

 private:
  template <class T>
  friend void save(const kv_cache<T>& cache, std::ostream& stream);
  template <class T>
  friend kv_cache<T> load(std::istream& stream, matrix_unit unit);

  using functions = plain::cache_functions<Element>;

  /// Takes the cache that `make(kernels)` returns.
  template <class Make>
  kv_cache(const functions& kernels, const Make& make) : kernels_(&kernels), cache_(make(kernels), kernels.destroy) {
    const plain::cache_shape s = kernels.shape(cache_.get());
    shape_ = {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
    options_ = detail::from_plain(kernels.settings(cache_.get()));
  }

  [[nodiscard]] plain::sequence_counts counts(std::int64_t b) const { return kernels_->counts(cache_.get(), b); }

  /// How the cache takes tokens of `Row`.
  template <class Row>
  [[nodiscard]] const auto& steps_of() const {
    constexpr bool numbers = std::is_same_v<Row, number_type>;
    static_assert(numbers || std::is_same_v<Row, Element>,
                  "cca: keys and values have the cache's element type, or are floats where that is q8");
    if constexpr (numbers)
      return kernels_->of_numbers;
    else
      return kernels_->of_rows;
  }

  template <class Row, class Function, class... Arguments>
  void step(Function* function, const std::optional<std::int64_t>& b, const Arguments&... arguments) {
    plain::call<number_type, Row> all{};
    (detail::put(all, arguments), ...);
    function(cache_.get(), b, all);
  }

  const functions* kernels_;
  std::unique_ptr<void, void (*)(void*)> cache_;
  cache_shape shape_;
  cca::options options_;
};

/// `cca::save`: the file is the same for every instruction set.
template <class Element>
void save(const kv_cache<Element>& cache, std::ostream& stream) {
  cache.kernels_->save(cache.cache_.get(), stream);
}

/// `cca::load`.
template <class Element>
[[nodiscard]] kv_cache<Element> load(std::istream& stream, matrix_unit unit = matrix_unit::none) {
  return {detail::cache_kernels<Element>(),
          [&](const auto& kernels) { return kernels.load(stream, static_cast<int>(unit)); }};
}

}}}  // namespace cca::CCA_TARGET::dispatch
