#pragma once

#include <mpi.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../detail/base/numbers.hpp"
#include "../detail/base/refuse.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/target.hpp"
#include "../partition.hpp"
#include "communicator.hpp"
#include "plan.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// Memory of `size` elements.
template <class T>
class buffer {
 public:
  buffer() = default;
  explicit buffer(std::int64_t size) : size_(size), memory_(scratch_bytes<T>(size), "message") {}

  [[nodiscard]] T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  [[nodiscard]] std::int64_t size() const { return size_; }
  [[nodiscard]] T& operator[](std::int64_t i) const { return data()[i]; }

 private:
  std::int64_t size_ = 0;
  aligned_memory memory_{0};
};

/// A row of a message as MPI counts it, so that only rows have to fit the `int` of its counts.
class row_type {
 public:
  explicit row_type(std::int64_t bytes) {
    require_count("bytes of a row", bytes);
    check(MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &type_), "describing rows");
    check(MPI_Type_commit(&type_), "describing rows");
  }
  row_type(const row_type&) = delete;
  row_type& operator=(const row_type&) = delete;
  ~row_type() { MPI_Type_free(&type_); }

  [[nodiscard]] MPI_Datatype get() const { return type_; }

  static int require_count(const char* what, std::int64_t count) {
    if (count > INT_MAX)
      refuse("layout", {count, " ", what, " in one message"}, {"at most 2^31 - 1, as MPI counts them"});
    return static_cast<int>(count);
  }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

/// How many rows of a message each rank has, one rank's behind the other's, as MPI counts them.
class row_counts {
 public:
  /// `count(r)` rows of rank r.
  template <class Count>
  row_counts(int ranks, const Count& count) : counts_(ranks), begins_(ranks) {
    for (int r = 0; r < ranks; ++r) {
      begins_[r] = row_type::require_count("rows", total_);
      counts_[r] = row_type::require_count("rows", count(r));
      total_ += counts_[r];
    }
  }

  [[nodiscard]] std::int64_t total() const { return total_; }
  [[nodiscard]] range of(int rank) const { return {begins_[rank], begins_[rank] + counts_[rank]}; }
  /// @{
  /// For MPI.
  [[nodiscard]] const int* counts() const { return counts_.data(); }
  [[nodiscard]] const int* begins() const { return begins_.data(); }
  /// @}

 private:
  buffer<int> counts_, begins_;
  std::int64_t total_ = 0;
};

/// Receives and sends under way. MPI writes to their buffers and reads them until each is done, so an exception on the way out
/// of a call waits here: what nobody has begun to send is cancelled, what is being sent has a rank that waits for it. Comes
/// behind the buffers.
class open_requests {
 public:
  open_requests(std::size_t receives, std::size_t sends)
      : receives_(receives), all_(receives + sends, MPI_REQUEST_NULL) {}
  open_requests(const open_requests&) = delete;
  open_requests& operator=(const open_requests&) = delete;
  ~open_requests() {
    for (std::size_t i = 0; i < all_.size(); ++i) {
      if (all_[i] == MPI_REQUEST_NULL) continue;
      if (i < receives_) MPI_Cancel(&all_[i]);
      MPI_Wait(&all_[i], MPI_STATUS_IGNORE);
    }
  }

  [[nodiscard]] MPI_Request* receive(std::size_t i) { return &all_[i]; }
  [[nodiscard]] MPI_Request* send(std::size_t i) { return &all_[receives_ + i]; }

  void wait(const char* doing) {
    for (MPI_Request& r : all_) check(MPI_Wait(&r, MPI_STATUS_IGNORE), doing);
  }

 private:
  std::size_t receives_;
  std::vector<MPI_Request> all_;
};

/// Moves rows between those who hold them and those who read them, from rank to rank, one message for each pair of ranks
/// that has some. Where a rank is both, they are moved all the same.
class piece_exchange {
 public:
  enum class direction { to_readers, to_holders };

  /// `pieces` in the order of `plan::pieces_of`.
  piece_exchange(const communicator& ranks, const plan& of, std::vector<piece> pieces)
      : ranks_(&ranks), pieces_(static_cast<std::vector<piece>&&>(pieces)), places_(pieces_.size()) {
    std::vector<range> held(static_cast<std::size_t>(ranks.size())), read = held;  // rows, as their ends
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      const std::int64_t holder = of.rank_of(pieces_[i].holder), reader = of.rank_of(pieces_[i].reader);
      place& to = places_[i];
      to = {holder == ranks.rank(), reader == ranks.rank(), 0};
      if (to.local()) continue;
      auto& rows = to.held ? held[static_cast<std::size_t>(reader)] : read[static_cast<std::size_t>(holder)];
      to.row = rows.end;
      rows.end += pieces_[i].tokens.size();
    }
    begin_peers(held, held_, held_rows_);
    begin_peers(read, read_, read_rows_);
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      if (places_[i].local()) continue;
      const std::int64_t other = of.rank_of(places_[i].held ? pieces_[i].reader : pieces_[i].holder);
      places_[i].row += (places_[i].held ? held : read)[static_cast<std::size_t>(other)].begin;
    }
  }

  /// `pack(piece, to)` writes the rows of a piece, each of `row_bytes` bytes, `unpack(piece, from)` takes them: those that
  /// a rank gets in the order of their readers, whoever sent them and whenever they came. Collective.
  template <class Pack, class Unpack>
  std::int64_t move(direction way, std::int64_t row_bytes, const char* doing, const Pack& pack,
                    const Unpack& unpack) const {
    const bool to_readers = way == direction::to_readers;
    const std::int64_t out_rows = to_readers ? held_rows_ : read_rows_, in_rows = to_readers ? read_rows_ : held_rows_;
    const auto &out_peers = to_readers ? held_ : read_, &in_peers = to_readers ? read_ : held_;
    const buffer<std::byte> out(out_rows * row_bytes), in(in_rows * row_bytes), local(local_rows * row_bytes);
    const row_type row(row_bytes);
    open_requests under_way(in_peers.size(), out_peers.size());
    for (std::size_t i = 0; i < in_peers.size(); ++i)
      check(MPI_Irecv(in.data() + in_peers[i].first_row * row_bytes, in_peers[i].rows, row.get(), in_peers[i].rank,
                      ranks_->tag(), ranks_->get(), under_way.receive(i)),
            doing);
    for (std::size_t i = 0; i < pieces_.size(); ++i)
      if (!places_[i].local() && places_[i].held == to_readers)
        pack(pieces_[i], out.data() + places_[i].row * row_bytes);
    for (std::size_t i = 0; i < out_peers.size(); ++i)
      check(MPI_Isend(out.data() + out_peers[i].first_row * row_bytes, out_peers[i].rows, row.get(), out_peers[i].rank,
                      ranks_->tag(), ranks_->get(), under_way.send(i)),
            doing);
    under_way.wait(doing);
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      if (places_[i].local()) {
        piece some = pieces_[i];
        while (!some.tokens.empty()) {
          const std::int64_t end = some.tokens.end;
          some.tokens.end = smaller(end, some.tokens.begin + local_rows);
          pack(some, local.data());
          unpack(some, local.data());
          some.tokens = {some.tokens.end, end};
        }
      } else if (places_[i].held != to_readers) {
        unpack(pieces_[i], in.data() + places_[i].row * row_bytes);
      }
    }
    return in_rows * row_bytes;
  }

 private:
  /// What a rank moves to itself at a time: little enough to be in its caches when it is read again.
  static constexpr std::int64_t local_rows = 32;

  struct place {
    bool held = false, read = false;  ///< here
    std::int64_t row = 0;             ///< in the messages to readers, or from holders
    [[nodiscard]] bool local() const { return held && read; }
  };
  struct peer {
    int rank, rows;
    std::int64_t first_row;
  };

  static void begin_peers(std::vector<range>& rows, std::vector<peer>& peers, std::int64_t& total) {
    for (std::size_t r = 0; r < rows.size(); ++r) {
      rows[r] = shifted(rows[r], total);
      total = rows[r].end;
      if (!rows[r].empty())
        peers.push_back({static_cast<int>(r), row_type::require_count("rows", rows[r].size()), rows[r].begin});
    }
  }

  const communicator* ranks_;
  std::vector<piece> pieces_;
  std::vector<place> places_;
  std::vector<peer> held_, read_;
  std::int64_t held_rows_ = 0, read_rows_ = 0;
};

/// Rows that each rank gives to all: cores, or a caller's far rows. They travel while something else is computed.
class gathering {
 public:
  /// `count(i)` rows of segment i of the layout.
  template <class Count>
  gathering(const communicator& ranks, const layout& tokens, std::int64_t row_bytes, const Count& count)
      : ranks_(&ranks),
        row_bytes_(row_bytes),
        row_(row_bytes),
        of_segment_(std::ssize(tokens.segments())),
        of_rank_(ranks.size(), [&](int r) {
          std::int64_t rows = 0;
          const range own = tokens.segments_of(r);
          for (std::int64_t i = own.begin; i < own.end; ++i) rows += of_segment_[i] = count(i);
          return rows;
        }) {
    rows_ = buffer<std::byte>(of_rank_.total() * row_bytes);
  }
  gathering(const gathering&) = delete;
  gathering& operator=(const gathering&) = delete;
  /// The memory stays until MPI needs it no more, also where an exception ends the call: the other ranks have begun as well,
  /// or will.
  ~gathering() {
    if (request_ != MPI_REQUEST_NULL) MPI_Wait(&request_, MPI_STATUS_IGNORE);
  }

  /// Where this rank's rows go before `start`.
  [[nodiscard]] std::byte* own() const { return rows_.data() + of_rank_.of(ranks_->rank()).begin * row_bytes_; }

  /// Collective, as is `finish`; `progress` is for in between.
  void start() {
    check(MPI_Iallgatherv(MPI_IN_PLACE, 0, row_.get(), rows_.data(), of_rank_.counts(), of_rank_.begins(), row_.get(),
                          ranks_->get(), &request_),
          "gathering cores");
  }
  void progress() {
    int done = 0;
    check(MPI_Test(&request_, &done, MPI_STATUS_IGNORE), "gathering cores");
  }
  /// Calls `take(i, rows)` for each segment of the layout. Then the memory is free again.
  template <class Take>
  void finish(const Take& take) {
    check(MPI_Wait(&request_, MPI_STATUS_IGNORE), "gathering cores");
    ranks_->received().cores += (of_rank_.total() - of_rank_.of(ranks_->rank()).size()) * row_bytes_;
    const std::byte* from = rows_.data();
    for (std::int64_t i = 0; i < of_segment_.size(); from += of_segment_[i++] * row_bytes_) take(i, from);
    rows_ = buffer<std::byte>();
  }

 private:
  const communicator* ranks_;
  std::int64_t row_bytes_;
  row_type row_;
  buffer<std::int64_t> of_segment_;
  row_counts of_rank_;
  buffer<std::byte> rows_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

/// Adds up numbers that every rank has some of, in the order of the ranks: on all of them, to the same bits. Collective.
template <class T>
void add_over_ranks(const communicator& ranks, T* numbers, std::int64_t count) {
  const buffer<T> all(count * ranks.size());
  const int bytes = row_type::require_count("bytes", count * static_cast<std::int64_t>(sizeof(T)));
  check(MPI_Allgather(numbers, bytes, MPI_BYTE, all.data(), bytes, MPI_BYTE, ranks.get()), "adding up gradients");
  ranks.received().gradients += std::int64_t{bytes} * (ranks.size() - 1);
  for (std::int64_t i = 0; i < count; ++i) {
    numbers[i] = all[i];
    for (std::int64_t r = 1; r < ranks.size(); ++r) numbers[i] += all[r * count + i];
  }
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
