#pragma once

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "../detail/base/numbers.hpp"
#include "../detail/base/refuse.hpp"
#include "../detail/base/target.hpp"
#include "../detail/base/validate_views.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../tensor_view.hpp"
#include "../version.hpp"
#include "communicator.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// How a number is written in a refusal.
using number_text = text (*)(std::int64_t);

inline text whole_number(std::int64_t n) { return {n}; }
inline text yes_or_no(std::int64_t n) { return {n != 0 ? "given" : "none"}; }
inline text hidden_number(std::int64_t) { return {"other ones"}; }

/// Whose the numbers of an optional view are, as far as one rank can tell: with a single token the same view may be either.
enum class number_form : std::int64_t { none, for_heads, for_queries, either };

/// What has to be the same on every rank, and whether each rank could begin: compared before anything else is sent, in one
/// message that is as long whatever is compared. So ranks that disagree, even about which function they call, all throw the
/// same.
class agreement {
 public:
  static constexpr std::size_t most = 64;

  /// `call` is the name of the function.
  explicit agreement(const char* call) {
    std::int64_t name = 0;
    for (const char* c = call; *c != 0; ++c) name = (name * 131 + *c) & 0xffffffffffff;
    add("call", name, [](std::int64_t) { return text{"another function"}; });
    add("version of the library", CCA_VERSION);
  }

  void add(const char* name, std::int64_t value, number_text print = whole_number, const char* of = "") {
    if (count_ == most) throw std::logic_error("cca: more arguments than ranks compare");
    entries_[count_++] = {name, value, print, of};
  }

  /// All options.
  void add(const options& all) {
    for_each_option(all, [&]<class Option>(const char* name, const Option& option) {
      const option_code code = encode_option(option);
      const auto print = [](std::int64_t bits) {
        Option decoded{};
        decode_option({1, bits}, decoded);
        return text{option_text(decoded)};
      };
      add(name, code.present, yes_or_no, "options.");
      add(name, code.bits, print, "options.");
    });
  }

  /// Elements of an operand: 1 float, 2 double, 3 bfloat16, 4 half.
  template <class... Element>
  void add_elements(const char* name) {
    std::int64_t code = 0;
    ((code = code * 5 + number_of<std::remove_const_t<Element>>()), ...);
    add(name, code, [](std::int64_t) { return text{"other elements"}; });
  }

  /// Of an optional view whose numbers it has, and where all ranks share them that they are the same. A rank without
  /// segments gives one of no sequences.
  template <class T>
  void add_shared(const char* name, const tensor_view<T, 3>& view, number_form form) {
    add(name, form != number_form::none, yes_or_no);
    add(name, static_cast<std::int64_t>(form),
        [](std::int64_t n) { return text{n == shared_form ? "one for each head" : "one for each query"}; });
    entries_[count_ - 1].open = form == number_form::either;
    std::uint64_t hash = 0;
    if (form == number_form::for_heads || form == number_form::either)
      for (std::int64_t b = 0; b < view.batch(); ++b)
        for (std::int64_t h = 0; h < view.heads(); ++h) {
          const auto number = static_cast<double>(*view.row(b, h, 0));
          hash = mixed(hash, __builtin_bit_cast(std::uint64_t, number));
        }
    add(name, static_cast<std::int64_t>(hash >> 1), hidden_number);
    entries_[count_ - 1].of_shared = true;
  }
  /// How long each sequence of a view is.
  void add_lengths(const char* name, const named_view& view) {
    std::uint64_t hash = 0;
    for (std::int64_t b = 0; b < view.batch(); ++b)
      hash = mixed(hash, static_cast<std::uint64_t>(view.has_lengths() ? view.length(b) : view.length()));
    add(name, static_cast<std::int64_t>(hash >> 1), hidden_number);
  }

  /// Whether the ranks have agreed that they share them: also where none could tell.
  [[nodiscard]] bool shared(const char* name) const {
    for (std::size_t i = 0; i < count_; ++i)
      if (std::strcmp(entries_[i].name, name) == 0) return entries_[i + 1].value == shared_form;
    return false;
  }

  /// This rank cannot begin.
  void fail(const std::exception& why) {
    failed_ = true;
    refused_ = dynamic_cast<const std::invalid_argument*>(&why) != nullptr;
    const char* said = why.what();
    for (const char* prefix = "cca: "; *prefix != 0 && *said == *prefix; ++prefix) ++said;
    reason_ = {said};
  }

  /// Compares. Collective.
  /// @throws std::invalid_argument  on every rank, where ranks differ or one of them has refused its arguments
  /// @throws std::runtime_error  on every rank, where one has failed otherwise
  void compare(const communicator& ranks) {
    constexpr std::int64_t none = (std::numeric_limits<std::int64_t>::max)();
    std::int64_t mine[2 * most + 1] = {}, least[2 * most + 1];
    // The least of ~x is ~ of the largest x.
    for (std::size_t i = 0; i < most; ++i) {
      mine[2 * i] = entries_[i].open ? none : entries_[i].value;
      mine[2 * i + 1] = entries_[i].open ? none : ~entries_[i].value;
    }
    mine[2 * most] = failed_ ? ranks.rank() : none;
    check(MPI_Allreduce(mine, least, static_cast<int>(2 * most + 1), MPI_INT64_T, MPI_MIN, ranks.get()),
          "comparing the ranks' arguments");
    ranks.received().compared += ranks.size() > 1 ? static_cast<std::int64_t>(sizeof mine) : 0;
    ranks.begin_call();
    if (least[2 * most] != none) throw_failure(ranks, static_cast<int>(least[2 * most]));
    for (std::size_t i = 0; i < most; ++i) {
      const std::int64_t from = least[2 * i], to = ~least[2 * i + 1];
      if (entries_[i].open) entries_[i].value = from > to ? shared_form : from;  // the others know, if any does
      if (entries_[i].of_shared && entries_[i - 1].value != shared_form) continue;
      if (from < to) refuse_difference(i, from, to);
    }
  }

 private:
  struct entry {
    const char* name = "number of arguments";
    std::int64_t value = 0;
    number_text print = whole_number;
    const char* of = "";
    bool open = false;       ///< for the others to say
    bool of_shared = false;  ///< counts where the entry before is that of numbers that ranks share
  };
  static constexpr auto shared_form = static_cast<std::int64_t>(number_form::for_heads);

  static constexpr std::uint64_t mixed(std::uint64_t hash, std::uint64_t bits) {
    return (hash ^ bits) * 1099511628211u;
  }

  template <class Element>
  static constexpr std::int64_t number_of() {
    return std::is_same_v<Element, float> ? 1 : std::is_same_v<Element, double> ? 2 : is_bfloat16<Element> ? 3 : 4;
  }

  /// What the failed rank says, on all ranks.
  [[noreturn]] void throw_failure(const communicator& ranks, int rank) {
    struct {
      char text[1000];
      char refused;
    } message = {};
    if (rank == ranks.rank()) {
      for (std::size_t i = 0; i + 1 < sizeof message.text && reason_.c_str()[i] != 0; ++i)
        message.text[i] = reason_.c_str()[i];
      message.refused = refused_ ? 1 : 0;
    }
    check(MPI_Bcast(&message, sizeof message, MPI_BYTE, rank, ranks.get()), "sharing a refusal");
    const text said{"cca: rank ", rank, ": ", static_cast<const char*>(message.text)};
    if (message.refused != 0) throw std::invalid_argument(said.c_str());
    throw std::runtime_error(said.c_str());
  }

  [[noreturn]] void refuse_difference(std::size_t i, std::int64_t least, std::int64_t greatest) {
    // Where the calls differ each rank has names of its own.
    if (i == 0) refuse("call", {"different functions on different ranks"}, {"the same call on every rank"});
    const text from = entries_[i].print(least), to = entries_[i].print(greatest);
    refuse(text{entries_[i].of, entries_[i].name}.c_str(),
           {from.c_str(), " on one rank and ", to.c_str(), " on another"}, {"the same on every rank"});
  }

  entry entries_[most];
  std::size_t count_ = 0;
  bool failed_ = false, refused_ = false;
  text reason_{""};
};

}}}}  // namespace cca::CCA_TARGET::mpi::detail
