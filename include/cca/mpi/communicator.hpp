#pragma once

#include <mpi.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "../detail/base/numbers.hpp"
#include "../detail/base/refuse.hpp"
#include "../detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// What MPI failed at, and what it says of it.
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What a rank has received from others since it was last asked, in bytes.
struct traffic {
  std::int64_t raw = 0;        ///< tokens of the halo and sink tokens: keys and values
  std::int64_t cores = 0;      ///< cores, or far rows
  std::int64_t gradients = 0;  ///< of both
  std::int64_t partials = 0;   ///< results that are merged
  std::int64_t compared = 0;   ///< options, shapes and counts
};

namespace detail {

using namespace cca::detail;

/// Every call of MPI goes through here.
inline void check(int code, const char* doing) {
  if (code == MPI_SUCCESS) return;
  char said[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, said, &length);
  throw error(text{"cca: ", doing, ": MPI says ", said}.c_str());
}

}  // namespace detail

/// The ranks that share sequences: a duplicate of the caller's communicator, so that messages of this library and of others
/// never meet, and one whose errors are exceptions. Making one is collective, as is its end. Calls of MPI are made by the
/// thread that calls the library, whatever the executor: `MPI_THREAD_FUNNELED` is enough.
///
/// A rank on which an exception ends a call that has begun to send leaves the others waiting, as in all of MPI: let it end
/// the program, or call `MPI_Abort`. Refusals of arguments are the same on every rank and come before.
class communicator {
 public:
  /// @param ranks  with this rank among them: an intracommunicator
  /// @throws std::invalid_argument  where it is none, or MPI does not run
  /// @throws cca::mpi::error  where MPI fails
  explicit communicator(MPI_Comm ranks) {
    int started = 0, ended = 0;
    MPI_Initialized(&started);
    if (started != 0) MPI_Finalized(&ended);
    if (started == 0 || ended != 0)
      cca::detail::refuse("communicator", {started == 0 ? "one before MPI_Init" : "one after MPI_Finalize"},
                          {"one between the two"});
    if (ranks == MPI_COMM_NULL) cca::detail::refuse("communicator", {"MPI_COMM_NULL"}, {"one that this rank is in"});
    int between_groups = 0;
    detail::check(MPI_Comm_test_inter(ranks, &between_groups), "looking at the communicator");
    if (between_groups != 0)
      cca::detail::refuse("communicator", {"one between two groups of ranks"},
                          {"one of all ranks that share sequences"});
    detail::check(MPI_Comm_dup(ranks, &comm_), "duplicating the communicator");
    detail::check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "preparing the communicator");
    detail::check(MPI_Comm_rank(comm_, &rank_), "preparing the communicator");
    detail::check(MPI_Comm_size(comm_, &size_), "preparing the communicator");
  }
  communicator(const communicator&) = delete;
  communicator& operator=(const communicator&) = delete;
  ~communicator() {
    int ended = 0;
    MPI_Finalized(&ended);
    if (ended == 0) MPI_Comm_free(&comm_);
  }

  /// @{
  /// Of the caller's communicator.
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  /// @}

  /// Whether the other one has the same ranks in the same order. Not collective.
  [[nodiscard]] bool alike(const communicator& other) const {
    int how = MPI_UNEQUAL;
    detail::check(MPI_Comm_compare(comm_, other.comm_, &how), "comparing communicators");
    return how == MPI_IDENT || how == MPI_CONGRUENT;
  }

  /// The duplicate.
  [[nodiscard]] MPI_Comm get() const { return comm_; }

  /// @{
  /// Of the messages of this call, counted on all ranks alike. What a call that has ended by an exception was still sent is none
  /// of the next one's.
  void begin_call() const { tag_ = (tag_ + 1) % least_greatest_tag; }
  [[nodiscard]] int tag() const { return tag_; }
  /// @}

  /// What this rank has received. May be set to `{}`.
  [[nodiscard]] traffic& received() const { return received_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  static constexpr int least_greatest_tag = 32767;  ///< that an MPI may have
  int rank_ = 0, size_ = 1;
  mutable int tag_ = 0;
  mutable traffic received_{};
};

}}}  // namespace cca::CCA_TARGET::mpi
