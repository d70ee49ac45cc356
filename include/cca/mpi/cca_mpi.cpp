// The C interface of cca_mpi.h over cca::mpi. Compiled for the instruction set of its kernels.

#include "cca_mpi.h"

#include <Eigen/Core>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../dispatch/c_arguments.hpp"
#include "../dispatch/c_status.hpp"
#include "../mpi.hpp"

struct cca_mpi_ranks {
  cca::mpi::communicator all;
};

struct cca_mpi_layout {
  cca::mpi::layout tokens;
};

struct cca_mpi_cache {
  const cca_mpi_ranks* ranks;
  cca::detail::any_cache<cca::mpi::kv_cache> any;
};

namespace {

using cca::execution;
using cca::detail::arguments;
using cca::detail::guarded;
using cca::detail::tensor_place;
using cca::detail::refuse;
namespace detail = cca::detail;
namespace mpi = cca::mpi;

/// What is left to do where a rank's arguments are understood.
using remainder_of_call = std::function<void()>;

/// Calls `prepare()`, which looks at this rank's arguments and returns what is left to do, and then that. Where one rank
/// refuses what it was given none goes on: it would wait for the others for ever.
template <class Prepare>
void on_all_ranks(const cca_mpi_ranks& ranks, const char* name, const Prepare& prepare) {
  remainder_of_call rest;
  mpi::detail::agreement same(name);
  mpi::detail::check_on_all_ranks(ranks.all, same, [&] { rest = prepare(); });
  rest();
}
template <class Prepare>
cca_status on_all_ranks(const cca_mpi_ranks* ranks, const char* name, const Prepare& prepare) noexcept {
  return guarded([&] { on_all_ranks(detail::required("ranks", ranks, "ranks"), name, prepare); });
}

/// `take(arguments)` takes those that there is a use for and returns a function of options and execution.
template <class Take>
remainder_of_call taken(const std::shared_ptr<arguments>& all, const Take& take) {
  const auto run = take(*all);
  all->run([](const cca::options&, const execution&) {});  // refuses what nobody took
  return [all, run] { all->run(run); };
}

/// The same with `take(std::type_identity<T>, arguments)`.
template <class Take>
remainder_of_call understood(const cca_call* call, tensor_place first, const Take& take) {
  const auto all = std::make_shared<arguments>(call);
  return detail::with_element(detail::name_of(first), all->elements(first), [&](auto type) {
    return taken(all, [&](arguments& some) { return take(type, some); });
  });
}

const mpi::layout& tokens_of(const cca_mpi_layout* layout) {
  return detail::required("layout", layout, "a layout").tokens;
}

/// A call over a layout.
template <class Take>
cca_status with_call(const char* name, const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                     const cca_call* call, const Take& take) noexcept {
  return on_all_ranks(ranks, name, [&] {
    const mpi::context_parallel over{ranks->all, tokens_of(layout), overlap != 0};
    return understood(call, &cca_call::query,
                      [&](auto type, arguments& all) { return take(type, over, all); });
  });
}

/// A step of a cache: `take(kv_cache<T>, arguments)` as above.
template <class Take>
cca_status with_step(const char* name, cca_mpi_cache* cache, const cca_call* call, const Take& take) noexcept {
  return guarded([&] {
    on_all_ranks(*detail::required("cache", cache, "a cache").ranks, name, [&] {
      const auto all = std::make_shared<arguments>(call);
      all->refuse_what_a_cache_has();
      return std::visit([&](auto& of) { return taken(all, [&](arguments& some) { return take(of, some); }); },
                        cache->any);
    });
  });
}

mpi::layout layout_of(int32_t split, int64_t ranks, std::span<const std::int64_t> lengths,
                      std::span<const cca_mpi_segment> segments) {
  if (split != CCA_MPI_SEGMENTS && !segments.empty())
    refuse("segments", {segments.size(), " of them"}, {"none where the library makes them"});
  switch (split) {
    case CCA_MPI_CONTIGUOUS: return mpi::layout::contiguous(ranks, lengths);
    case CCA_MPI_HEAD_TO_TAIL: return mpi::layout::head_to_tail(ranks, lengths);
    case CCA_MPI_CONCATENATED: return mpi::layout::concatenated(ranks, lengths);
    case CCA_MPI_SEGMENTS: break;
    default: refuse("split", {split}, {"one of cca_mpi_split"});
  }
  std::vector<mpi::segment> all;
  for (const cca_mpi_segment& s : segments) all.push_back({s.rank, s.sequence, {s.begin, s.end}});
  return {ranks, lengths, all};
}

template <class T>
std::span<const T> numbers(const char* name, const T* data, std::int64_t count) {
  if (count < 0) refuse(name, {count, " of them"}, {"at least 0"});
  if (data == nullptr && count > 0) refuse(name, {"NULL"}, {count, " of them"});
  return {data, static_cast<std::size_t>(count)};
}

}  // namespace

extern "C" {

const char* cca_mpi_error(void) { return detail::last_error.text; }

const char* cca_mpi_library(void) {
  struct library_version {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    library_version() {
      int length = 0;
      MPI_Get_library_version(text, &length);
    }
  };
  static const library_version version;
  return version.text;
}

cca_status cca_mpi_ranks_make(cca_mpi_ranks** ranks, const void* communicator) {
  return guarded([&] {
    *ranks = new cca_mpi_ranks{mpi::communicator(detail::required(
        "communicator", static_cast<const MPI_Comm*>(communicator), "the address of an MPI_Comm"))};
  });
}
void cca_mpi_ranks_free(cca_mpi_ranks* ranks) { delete ranks; }

cca_status cca_mpi_layout_make(cca_mpi_layout** layout, int32_t split, int64_t ranks, const int64_t* lengths,
                               int64_t sequences, const cca_mpi_segment* segments, int64_t count) {
  return guarded([&] {
    *layout = new cca_mpi_layout{layout_of(split, ranks, numbers("lengths", lengths, sequences),
                                           numbers("segments", segments, count))};
  });
}
void cca_mpi_layout_free(cca_mpi_layout* layout) { delete layout; }
cca_status cca_mpi_layout_segments(const cca_mpi_layout* layout, int64_t* count) {
  return guarded([&] { *count = std::ssize(tokens_of(layout).segments()); });
}
cca_status cca_mpi_layout_segment(const cca_mpi_layout* layout, int64_t i, cca_mpi_segment* segment) {
  return guarded([&] {
    const auto all = tokens_of(layout).segments();
    if (i < 0 || i >= std::ssize(all)) refuse("segment", {i}, {"one of ", all.size()});
    const mpi::segment& s = all[static_cast<std::size_t>(i)];
    *segment = {s.rank, s.sequence, s.tokens.begin, s.tokens.end};
  });
}

cca_status cca_mpi_attention(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                             const cca_call* call) {
  return with_call("cca_mpi_attention", ranks, layout, overlap, call,
                   []<class T>(std::type_identity<T>, const mpi::context_parallel& over, arguments& all) {
                     const auto in = all.take_inputs<T>();
                     const auto to = all.take_results<T>();
                     return [=](const cca::options& o, const execution& run) { mpi::attention(over, in, to, o, run); };
                   });
}

cca_status cca_mpi_attend(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                          const cca_call* call) {
  return with_call("cca_mpi_attend", ranks, layout, overlap, call,
                   []<class T>(std::type_identity<T>, const mpi::context_parallel& over, arguments& all) {
                     const auto in = all.take_inputs<T>();
                     const auto far_rows = all.take_far<T>();
                     const auto to = all.take_results<T>();
                     return [=](const cca::options& o, const execution& run) {
                       mpi::attend(over, in, far_rows, to, o, run);
                     };
                   });
}

cca_status cca_mpi_attention_gradient(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                                      const cca_call* call) {
  return with_call("cca_mpi_attention_gradient", ranks, layout, overlap, call,
                   []<class T>(std::type_identity<T>, const mpi::context_parallel& over, arguments& all) {
                     const auto in = all.take_inputs<T>();
                     const auto of = all.take_read<T>();
                     const auto from = all.take_incoming<T>();
                     const auto to = all.take_gradients<cca::compute_type<T>>();
                     return [=](const cca::options& o, const execution& run) {
                       mpi::attention_gradient(over, in, of, from, to, o, run);
                     };
                   });
}

cca_status cca_mpi_pool(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, const cca_call* call) {
  return with_call("cca_mpi_pool", ranks, layout, 1, call,
                   []<class T>(std::type_identity<T>, const mpi::context_parallel& over, arguments& all) {
                     const auto in = all.take_inputs<T>();
                     const auto to = all.take_cores<T>(&cca_call::core_key, &cca_call::core_value);
                     return [=](const cca::options& o, const execution& run) { mpi::pool(over, in, to, o, run); };
                   });
}

cca_status cca_mpi_merge(const cca_mpi_ranks* ranks, const cca_call* call) {
  return on_all_ranks(ranks, "cca_mpi_merge", [&] {
    return understood(call, &cca_call::out_a, [&]<class T>(std::type_identity<T>, arguments& all) {
      const auto part = all.take_read<T>(&cca_call::out_a, &cca_call::lse_a);
      const auto whole = all.take_results<T>();
      all.refuse_options("results are merged as they are");
      all.refuse_workspace("there is no use for it");
      return [=, &over = ranks->all](const cca::options&, const execution&) { mpi::merge(over, part, whole); };
    });
  });
}

cca_status cca_mpi_refuse(const cca_mpi_ranks* ranks, const char* why) {
  return on_all_ranks(ranks, "cca_mpi_refuse", [&]() -> remainder_of_call {
    throw std::invalid_argument(why != nullptr ? why : "no reason");
  });
}

cca_status cca_mpi_cache_make(cca_mpi_cache** cache, const cca_mpi_ranks* ranks, const cca_cache_shape* shape,
                              DLDataType elements, const cca_options* options, int64_t window_rank) {
  return on_all_ranks(ranks, "cca_mpi_cache_make", [&] {
    const auto s = detail::complete_struct("shape", shape, cca_cache_shape{});
    const cca::options settings = detail::options_of(options);
    if (window_rank < 0 || window_rank >= ranks->all.size())
      refuse("window_rank", {window_rank}, {"one of ", ranks->all.size(), " ranks"});
    return detail::with_element(
        "elements", elements, [&]<class T>(std::type_identity<T>) -> remainder_of_call {
          return [=] {
            const cca::cache_shape all{s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
            *cache = new cca_mpi_cache{
                ranks, decltype(cca_mpi_cache::any)(std::in_place_type<mpi::kv_cache<T>>, ranks->all, all, settings,
                                                    static_cast<int>(window_rank))};
          };
        });
  });
}

void cca_mpi_cache_free(cca_mpi_cache* cache) { delete cache; }

cca_status cca_mpi_cache_append(cca_mpi_cache* cache, const cca_mpi_layout* layout, const cca_call* call) {
  return with_step("cca_mpi_cache_append", cache, call, [&](auto& of, arguments& all) {
    using T = typename std::remove_cvref_t<decltype(of)>::element_type;
    const mpi::context_parallel over{cache->ranks->all, tokens_of(layout)};
    const auto in = all.take_tokens<T>();
    return [=, &of](const cca::options&, const execution& run) { of.append(over, in, run); };
  });
}

cca_status cca_mpi_cache_attend(cca_mpi_cache* cache, const cca_call* call) {
  return with_step("cca_mpi_cache_attend", cache, call, [](auto& of, arguments& all) {
    using T = typename std::remove_cvref_t<decltype(of)>::element_type;
    const auto in = all.take_inputs<T>();
    const auto to = all.take_results<T>();
    return [=, &of](const cca::options&, const execution& run) { of.attend(in, to, run); };
  });
}

cca_status cca_mpi_cache_get_counts(const cca_mpi_cache* cache, cca_cache_counts* counts) {
  return guarded([&] {
    std::visit([&](const auto& of) { *counts = {of.length(), of.core_count(), of.raw_count(), of.length()}; },
               detail::required("cache", cache, "a cache").any);
  });
}

}  // extern "C"
