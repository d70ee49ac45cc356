// One rank, which has all tokens.

#include <cca/mpi.hpp>

#include <cstdint>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int failed = 1;
  {
    const cca::mpi::communicator ranks(MPI_COMM_WORLD);
    const std::int64_t lengths[] = {100, 20};
    const auto tokens = cca::mpi::layout::contiguous(ranks.size(), lengths);
    failed = tokens.tokens_of(0) != 120 / ranks.size();
  }
  MPI_Finalize();
  return failed;
}
