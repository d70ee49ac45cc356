// One layer of attention across ranks: how long it takes, and what each rank receives.
//
//   mpirun -n 2 cluster_layer [tokens] [group size] [window] [query heads] [key/value heads] [repeats] [overlap] [dim]

#include <mpi.h>

#include <cca/mpi.hpp>
#include <cca/mpi/cost.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <random>
#include <vector>

namespace {

void run(int argc, char** argv) {
  const auto number = [&](int i, std::int64_t otherwise) { return i < argc ? std::atoll(argv[i]) : otherwise; };
  const std::int64_t length[] = {number(1, 131072)};
  const cca::options options{.group_size = number(2, 16), .window = number(3, 1024), .sink_tokens = 4};
  const std::int64_t heads = number(4, 2), kv_heads = number(5, 1), repeats = number(6, 3);
  const bool overlap = number(7, 1) != 0;
  const std::int64_t dim = number(8, 64);

  const cca::mpi::communicator ranks(MPI_COMM_WORLD);
  const cca::mpi::layout tokens = cca::mpi::layout::head_to_tail(ranks.size(), length);
  const std::int64_t own = tokens.tokens_of(ranks.rank());
  std::vector<std::int64_t> offsets{0};
  const cca::range segments = tokens.segments_of(ranks.rank());
  for (std::int64_t i = segments.begin; i < segments.end; ++i)
    offsets.push_back(offsets.back() + tokens.segments()[static_cast<std::size_t>(i)].tokens.size());

  std::mt19937 random(static_cast<unsigned>(ranks.rank()));
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::int64_t head_count) {
    std::vector<float> all(static_cast<std::size_t>(own * head_count * dim));
    for (float& x : all) x = normal(random);
    return all;
  };
  std::vector<float> query = numbers(heads), key = numbers(kv_heads), value = numbers(kv_heads), out = numbers(heads);
  const auto view = [&](std::vector<float>& all, std::int64_t head_count) {
    return cca::packed(all.data(), offsets, head_count, dim);
  };

  double best = 1e300, best_processor = 1e300;
  for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
    ranks.received() = {};
    MPI_Barrier(MPI_COMM_WORLD);
    const double start = MPI_Wtime();
    const std::clock_t processor_start = std::clock();
    cca::mpi::attention({ranks, tokens, overlap}, {view(query, heads), view(key, kv_heads), view(value, kv_heads)},
                        {view(out, heads)}, options);
    // Of the slowest rank, by the clock and by its processor: on a machine that does other work as well they differ.
    double seconds[] = {MPI_Wtime() - start, static_cast<double>(std::clock() - processor_start) / CLOCKS_PER_SEC};
    MPI_Allreduce(MPI_IN_PLACE, seconds, 2, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    best = std::min(best, seconds[0]);
    best_processor = std::min(best_processor, seconds[1]);
  }

  const cca::mpi::plan planned(tokens, cca::partition_of(options), options.group_size > 0);
  const auto pairs = planned.pairs_of(ranks.rank());
  const auto received = ranks.received();
  std::int64_t mine[] = {own, pairs.raw + pairs.cores, received.raw, received.cores};
  std::vector<std::int64_t> all(static_cast<std::size_t>(4 * ranks.size()));
  MPI_Gather(mine, 4, MPI_INT64_T, all.data(), 4, MPI_INT64_T, 0, MPI_COMM_WORLD);
  if (ranks.rank() != 0) return;
  std::printf("%lld tokens, g=%lld, s=%lld, %lld/%lld heads of %lld, %d ranks: %.3f s, %.3f s of a processor\n\n",
              static_cast<long long>(length[0]), static_cast<long long>(options.group_size),
              static_cast<long long>(options.window), static_cast<long long>(heads), static_cast<long long>(kv_heads),
              static_cast<long long>(dim), ranks.size(), best, best_processor);
  std::printf("| rank | tokens | scores per head | halo, bytes | cores, bytes |\n|---:|---:|---:|---:|---:|\n");
  double total = 0;
  for (int r = 0; r < ranks.size(); ++r) {
    const std::int64_t* of = all.data() + 4 * r;
    std::printf("| %d | %lld | %lld | %lld | %lld |\n", r, static_cast<long long>(of[0]), static_cast<long long>(of[1]),
                static_cast<long long>(of[2]), static_cast<long long>(of[3]));
    total += static_cast<double>(of[1] * heads);
  }
  std::printf("\n%.3g pairs per second of a processor\n", total / best_processor / ranks.size());
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  int failed = 0;
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cluster_layer: %s\n", error.what());
    failed = 1;
    MPI_Abort(MPI_COMM_WORLD, failed);
  }
  MPI_Finalize();
  return failed;
}
