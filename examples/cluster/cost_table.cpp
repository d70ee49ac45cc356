// What a layer of attention costs across ranks, by the model of cca/mpi/cost.hpp: needs no MPI. Prints the tables of
// cmake/docs/cluster.md.
//
//   cluster_cost [pairs per second of one rank] [bytes per second] [seconds of a message]

#include <cca/mpi/cost.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>

namespace {

using cca::mpi::layout;

/// A layer of a model of 8 billion parameters, keys and values of 16 bits.
constexpr cca::mpi::call_shape shape{
    .heads = 32, .kv_heads = 8, .dim = 128, .value_dim = 128, .element_bytes = 2, .core_bytes = 4};

cca::options cca_options(cca::core_heads heads) {
  return {.group_size = 16, .window = 1024, .sink_tokens = 4, .core_heads = heads};
}

std::string megabytes(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", static_cast<double>(bytes) / 1e6);
  return text;
}

/// The most scores of a rank by their mean.
void print_balance() {
  std::printf(
      "| ranks | dense, contiguous | dense, head to tail | CCA, contiguous | CCA, head to tail "
      "|\n|---:|---:|---:|---:|---:|\n");
  const std::int64_t length[] = {131072};
  for (const std::int64_t ranks : {2, 4, 8, 16, 32, 64}) {
    std::printf("| %d |", static_cast<int>(ranks));
    for (const cca::options& options : {cca::options{}, cca_options(cca::core_heads::per_query_head)})
      for (const layout& tokens : {layout::contiguous(ranks, length), layout::head_to_tail(ranks, length)})
        std::printf(" %.3f |", cost_of(tokens, options, shape, {}).balance);
    std::printf("\n");
  }
}

void print_model(const cca::mpi::machine& cluster) {
  std::printf(
      "| ranks | tokens | cores of | halo, MB | cores, MB | ring, MB | time, ms | least, ms | efficiency |\n"
      "|---:|---:|---|---:|---:|---:|---:|---:|---:|\n");
  for (const std::int64_t ranks : {8, 64, 1024}) {
    const std::int64_t length[] = {ranks * 16384};
    for (const cca::core_heads heads : {cca::core_heads::per_query_head, cca::core_heads::per_kv_head}) {
      const auto cost = cost_of(layout::head_to_tail(ranks, length), cca_options(heads), shape, cluster);
      std::printf(
          "| %d | %lld | %s | %s | %s | %s | %.1f | %.1f | %.2f |\n", static_cast<int>(ranks),
          static_cast<long long>(length[0]), heads == cca::core_heads::per_kv_head ? "key/value heads" : "query heads",
          megabytes(cost.most_raw_bytes).c_str(), megabytes(cost.most_core_bytes).c_str(),
          megabytes(cost.ring_bytes).c_str(), 1e3 * cost.seconds, 1e3 * cost.compute_seconds, cost.efficiency());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, double otherwise) { return i < argc ? std::atof(argv[i]) : otherwise; };
  const cca::mpi::machine cluster{number(1, 1e10), number(2, 12.5e9), number(3, 2e-6)};
  print_balance();
  std::printf("\n%.3g pairs of one head per second and rank, %.3g bytes per second, %.3g s for a message\n\n",
              cluster.pairs_per_second, cluster.bandwidth, cluster.latency);
  print_model(cluster);
}
