// The C interface of cca.h over cca::dispatch. Compiled like the program itself, for the oldest processor that it is for.

#include "cca.h"

#include <cstring>
#include <istream>
#include <memory>
#include <ostream>
#include <streambuf>
#include <type_traits>
#include <variant>

#include "../dispatch.hpp"
#include "c_arguments.hpp"
#include "c_status.hpp"

struct cca_cache {
  cca::detail::any_cache<cca::dispatch::kv_cache, cca::q8> any;
};

namespace {

using cca::execution;
using cca::detail::arguments;
using cca::detail::guarded;
using cca::detail::tensor_place;
namespace detail = cca::detail;
namespace dispatch = cca::dispatch;

/// Calls `f(std::type_identity<T>, arguments)` with the elements of the tensor at `first`.
template <class F>
cca_status with_arguments(const cca_call* call, tensor_place first, const F& f) noexcept {
  return guarded([&] {
    arguments all(call);
    detail::with_element(detail::name_of(first), all.elements(first), [&](auto type) { f(type, all); });
  });
}

/// Calls `f(kv_cache<T>)`.
template <class Cache, class F>
cca_status with_cache(Cache* cache, const F& f) noexcept {
  return guarded([&] {
    std::visit(f, detail::required("cache", cache, "a cache").any);
  });
}

/// Calls `f(std::type_identity<Row>, kv_cache<T>, arguments)` for a step of tokens of `Row`.
template <class F>
cca_status with_cache_step(cca_cache* cache, const cca_call* call, const F& f) noexcept {
  return with_cache(cache, [&](auto& of) {
    using Cache = std::remove_cvref_t<decltype(of)>;
    arguments all(call);
    all.refuse_what_a_cache_has();
    all.with_rows<typename Cache::number_type, typename Cache::element_type>(&cca_call::key,
                                                                             [&](auto row) { f(row, of, all); });
  });
}

/// A stream over a caller's functions, which see every byte once: nothing behind a cache is read.
class callers_file : public std::streambuf {
 public:
  callers_file(cca_write* write, cca_read* read, void* self) : write_(write), read_(read), self_(self) {}

 protected:
  std::streamsize xsputn(const char* data, std::streamsize size) override {
    return size == 0 ? 0 : static_cast<std::streamsize>(write_(self_, data, static_cast<std::size_t>(size)));
  }
  int_type overflow(int_type c) override {
    const char byte = traits_type::to_char_type(c);
    return xsputn(&byte, 1) == 1 ? c : traits_type::eof();
  }
  std::streamsize xsgetn(char* data, std::streamsize size) override {
    return size == 0 ? 0 : static_cast<std::streamsize>(read_(self_, data, static_cast<std::size_t>(size)));
  }
  int_type uflow() override {
    char byte;
    return xsgetn(&byte, 1) == 1 ? traits_type::to_int_type(byte) : traits_type::eof();
  }

 private:
  cca_write* write_;
  cca_read* read_;
  void* self_;
};

}  // namespace

extern "C" {

const char* cca_error(void) { return cca::detail::last_error.text; }
const char* cca_version(void) { return CCA_VERSION_STRING; }
const char* cca_architecture(void) {
  const char* name = nullptr;
  guarded([&] { name = cca::plain::chosen().name; });
  return name;
}
cca_status cca_use(const char* architecture) {
  return guarded([&] { dispatch::use(architecture != nullptr ? architecture : "NULL"); });
}

cca_status cca_attention(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    all.with_rows<T>(&cca_call::key, [&]<class Row>(std::type_identity<Row>) {
      const auto in = all.take_inputs<T, Row>();
      const auto to = all.take_results<T>();
      all.run([&](const auto&... on) { dispatch::attention<T, Row>(in, to, on...); });
    });
  });
}

cca_status cca_attend(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    all.with_rows<T>(&cca_call::key, [&]<class Row>(std::type_identity<Row>) {
      all.with_rows<T>(&cca_call::far_key, [&]<class Far>(std::type_identity<Far>) {
        const auto in = all.take_inputs<T, Row>();
        const auto far_rows = all.take_far<Far>();
        const auto to = all.take_results<T>();
        all.run([&](const auto&... on) { dispatch::attend<T, Row, Far>(in, far_rows, to, on...); });
      });
    });
  });
}

cca_status cca_pool(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    const auto in = all.take_inputs<T>();
    const auto to = all.take_cores<T>(&cca_call::core_key, &cca_call::core_value);
    all.run([&](const auto&... on) { dispatch::pool<T>(in, to, on...); });
  });
}

cca_status cca_merge(const cca_call* call) {
  return with_arguments(call, &cca_call::out_a, []<class T>(std::type_identity<T>, arguments& all) {
    const auto first = all.take_read<T>(&cca_call::out_a, &cca_call::lse_a);
    const auto second = all.take_read<T>(&cca_call::out_b, &cca_call::lse_b);
    const auto to = all.take_results<T>();
    all.refuse_options("results are merged as they are");
    all.run([&](const auto&, const execution& run) { dispatch::merge<T>(first, second, to, run); });
  });
}

cca_status cca_attention_gradient(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    const auto in = all.take_inputs<T>();
    const auto of = all.take_read<T>();
    const auto from = all.take_incoming<T>();
    const auto to = all.take_gradients<cca::compute_type<T>>();
    all.run([&](const auto&... on) { dispatch::attention_gradient<T>(in, of, from, to, on...); });
  });
}

cca_status cca_attend_gradient(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    const auto in = all.take_inputs<T>();
    const auto far_rows = all.take_far<T>();
    const auto of = all.take_read<T>();
    const auto from = all.take_incoming<T>();
    const auto to = all.take_gradients<cca::compute_type<T>>();
    all.run([&](const auto&... on) { dispatch::attend_gradient<T>(in, far_rows, of, from, to, on...); });
  });
}

cca_status cca_pool_gradient(const cca_call* call) {
  return with_arguments(call, &cca_call::query, []<class T>(std::type_identity<T>, arguments& all) {
    using number = cca::compute_type<T>;
    const auto in = all.take_inputs<T>();
    const auto from = all.take_cores<const number>(&cca_call::grad_core_key, &cca_call::grad_core_value);
    const auto to = all.take_gradients<number>();
    all.run([&](const auto&... on) { dispatch::pool_gradient<T>(in, from, to, on...); });
  });
}

cca_status cca_workspace_size(const cca_call* call, size_t* bytes) {
  return with_arguments(call, &cca_call::query, [bytes]<class T>(std::type_identity<T>, arguments& all) {
    all.with_rows<T>(&cca_call::key, [&]<class Row>(std::type_identity<Row>) {
      all.with_rows<T>(&cca_call::far_key, [&]<class Far>(std::type_identity<Far>) {
        const bool is_far = all.has(&cca_call::far_key);
        const auto in = all.take_inputs<T, Row>();
        const auto far_rows = is_far ? all.take_far<Far>() : cca::far_context<Far>{};
        (void)all.take_results<T>();
        (void)all.take_cores<T>(&cca_call::core_key, &cca_call::core_value);
        *bytes = all.run([&](const auto&... on) {
          return is_far ? dispatch::workspace_size<T, Row, Far>(in, far_rows, on...)
                        : dispatch::workspace_size<T, Row>(in, on...);
        });
      });
    });
  });
}

cca_status cca_gradient_workspace_size(const cca_call* call, size_t* bytes) {
  return with_arguments(call, &cca_call::query, [bytes]<class T>(std::type_identity<T>, arguments& all) {
    using number = cca::compute_type<T>;
    const bool is_far = all.has(&cca_call::far_key);
    const auto in = all.take_inputs<T>();
    const auto far_rows = is_far ? all.take_far<T>() : cca::far_context<T>{};
    (void)all.take_read<T>();
    (void)all.take_incoming<T>();
    (void)all.take_cores<const number>(&cca_call::grad_core_key, &cca_call::grad_core_value);
    (void)all.take_gradients<number>();
    *bytes = all.run([&](const auto&... on) {
      return is_far ? dispatch::gradient_workspace_size<T>(in, far_rows, on...)
                    : dispatch::gradient_workspace_size<T>(in, on...);
    });
  });
}

cca_status cca_quantize(const DLTensor* rows, const DLTensor* to, const DLTensor* scales) {
  return guarded([&] {
    const auto given = [](const char* name, const DLTensor* tensor) -> auto& {
      return detail::required(name, tensor, "a tensor");
    };
    detail::with_element("rows", given("rows", rows).dtype, [&]<class T>(std::type_identity<T>) {
      dispatch::quantize(detail::view_of<const T, 4>("rows", *rows), detail::view_of<cca::q8, 4>("to", given("to", to)),
                         detail::view_of<float, 3>("scales", given("scales", scales)));
    });
  });
}

cca_status cca_cache_make(cca_cache** cache, const cca_cache_shape* shape, DLDataType elements,
                          const cca_options* options) {
  return guarded([&] {
    const auto s = detail::complete_struct("shape", shape, cca_cache_shape{});
    const cca::options settings = detail::options_of(options);
    *cache = detail::with_cache_element("elements", elements, [&]<class T>(std::type_identity<T>) {
      return new cca_cache{dispatch::kv_cache<T>(
          {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind}, settings)};
    });
  });
}

void cca_cache_free(cca_cache* cache) { delete cache; }

cca_status cca_cache_attend(cca_cache* cache, int64_t sequence, const cca_call* call) {
  return with_cache_step(cache, call, [&]<class Row>(std::type_identity<Row>, auto& of, arguments& all) {
    using T = typename std::remove_cvref_t<decltype(of)>::number_type;
    const auto in = all.take_inputs<T, Row>();
    const auto to = all.take_results<T>();
    all.run([&](const auto&, const execution& run) {
      sequence == CCA_ALL_SEQUENCES ? of.attend(in, to, run) : of.attend(sequence, in, to, run);
    });
  });
}

cca_status cca_cache_append(cca_cache* cache, int64_t sequence, const cca_call* call) {
  return with_cache_step(cache, call, [&]<class Row>(std::type_identity<Row>, auto& of, arguments& all) {
    using T = typename std::remove_cvref_t<decltype(of)>::number_type;
    const auto in = all.take_tokens<T, Row>();
    all.run([&](const auto&, const execution& run) {
      sequence == CCA_ALL_SEQUENCES ? of.append(in, run) : of.append(sequence, in, run);
    });
  });
}

cca_status cca_cache_truncate(cca_cache* cache, int64_t sequence, int64_t length) {
  return with_cache(cache, [&](auto& of) { of.truncate(sequence, length); });
}

cca_status cca_cache_reset(cca_cache* cache, int64_t sequence) {
  return with_cache(cache, [&](auto& of) { sequence == CCA_ALL_SEQUENCES ? of.reset() : of.reset(sequence); });
}

cca_status cca_cache_fork(cca_cache* cache, int64_t from, int64_t to) {
  return with_cache(cache, [&](auto& of) { of.fork(from, to); });
}

cca_status cca_cache_get_shape(const cca_cache* cache, cca_cache_shape* shape) {
  return with_cache(cache, [&](const auto& of) {
    (void)detail::complete_struct("shape", shape, cca_cache_shape{});
    const cca::cache_shape& s = of.shape();
    const cca_cache_shape all{shape->struct_size, s.batch,     s.heads,   s.kv_heads,
                              s.dim,              s.value_dim, s.capacity, s.rewind};
    std::memcpy(shape, &all, shape->struct_size);
  });
}

cca_status cca_cache_get_counts(const cca_cache* cache, int64_t sequence, cca_cache_counts* counts) {
  return with_cache(cache, [&](const auto& of) {
    *counts = {of.length(sequence), of.core_count(sequence), of.raw_count(sequence), of.least_length(sequence)};
  });
}

cca_status cca_cache_get_bytes(const cca_cache* cache, size_t* held, size_t* allocated) {
  return with_cache(cache, [&](const auto& of) {
    *held = of.bytes();
    *allocated = of.allocated_bytes();
  });
}

cca_status cca_cache_save(const cca_cache* cache, cca_write* write, void* self) {
  return with_cache(cache, [&](const auto& of) {
    callers_file file(write, nullptr, self);
    std::ostream stream(&file);
    dispatch::save(of, stream);
  });
}

cca_status cca_cache_load(cca_cache** cache, DLDataType elements, int32_t unit, cca_read* read, void* self) {
  return guarded([&] {
    callers_file file(nullptr, read, self);
    std::istream stream(&file);
    *cache = detail::with_cache_element("elements", elements, [&]<class T>(std::type_identity<T>) {
      return new cca_cache{dispatch::load<T>(stream, static_cast<cca::matrix_unit>(unit))};
    });
  });
}

}  // extern "C"
