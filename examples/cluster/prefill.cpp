// A text through SmolLM2-135M over several ranks: each has some of its tokens and all of the model. Prints what each rank
// had, received and took, and the perplexity, which is that of one process.
//
//   mpirun -n 4 cluster_prefill build/smollm2-data

#include <fmt/core.h>
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <cca/cca.hpp>
#include <cca/mpi.hpp>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <span>
#include <string>
#include <vector>

#include "../smollm2/attentions.hpp"
#include "../smollm2/model.hpp"

namespace {

using namespace smollm2;

struct arguments {
  std::string folder;
  std::int64_t tokens = 8192;
  int threads = 1;
  std::string attention = "16/1024/shared";
  std::int64_t sink_tokens = 4;
  bool check = false;
};

/// What a rank had, and what it took.
struct rank_line {
  double tokens, raw_bytes, core_bytes, seconds, attention_seconds, surprise;
};

void print(const arguments& arguments, const cca::options& options, const std::vector<rank_line>& lines,
           std::int64_t length) {
  fmt::print("{} tokens, {}, {} ranks of {} threads\n\n", length, name_of(options), lines.size(), arguments.threads);
  fmt::print("| rank | tokens | halo, MB | cores, MB | attention, s | total, s |\n|---:|---:|---:|---:|---:|---:|\n");
  double surprise = 0;
  for (std::size_t r = 0; r < lines.size(); ++r) {
    const rank_line& line = lines[r];
    fmt::print("| {} | {:.0f} | {:.2f} | {:.2f} | {:.2f} | {:.2f} |\n", r, line.tokens, line.raw_bytes / 1e6,
               line.core_bytes / 1e6, line.attention_seconds, line.seconds);
    surprise += line.surprise;
  }
  fmt::print("\nperplexity {:.4f}\n", std::exp(surprise / static_cast<double>(length - 1)));
}

void run(const arguments& arguments) {
  const cca::openmp_executor executor{.threads = arguments.threads};
  const model model(arguments.folder + "/model.safetensors", executor);
  const safetensors text(arguments.folder + "/text.safetensors");
  const auto tokens = read_tokens(text, arguments.tokens, "--tokens", model.sizes());
  const cca::options options = parse_attention("--attention", arguments.attention, arguments.sink_tokens);

  const cca::mpi::communicator ranks(MPI_COMM_WORLD);
  const std::int64_t length[] = {static_cast<std::int64_t>(tokens.size())};
  const cca::mpi::layout layout = cca::mpi::layout::contiguous(ranks.size(), length);
  const cca::range own = layout.segments()[static_cast<std::size_t>(ranks.rank())].tokens;
  const auto part = tokens.subspan(static_cast<std::size_t>(own.begin), static_cast<std::size_t>(own.size()));

  MPI_Barrier(MPI_COMM_WORLD);
  const pass prefill = model.run(
      part, own.begin, [&](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
        cca::mpi::attention({ranks, layout}, cca::inputs{query, key, value}, cca::results{out}, options, executor);
      });
  const auto next =
      tokens.subspan(static_cast<std::size_t>(own.begin) + 1 > tokens.size() ? tokens.size()
                                                                             : static_cast<std::size_t>(own.begin) + 1);
  const rank_line mine{static_cast<double>(own.size()),
                       static_cast<double>(ranks.received().raw),
                       static_cast<double>(ranks.received().cores),
                       prefill.seconds,
                       prefill.attention_seconds,
                       model.surprise(prefill.hidden, next)};
  std::vector<rank_line> lines(static_cast<std::size_t>(ranks.size()));
  MPI_Gather(&mine, sizeof mine, MPI_BYTE, lines.data(), sizeof mine, MPI_BYTE, 0, MPI_COMM_WORLD);
  if (ranks.rank() != 0) return;
  print(arguments, options, lines, length[0]);
  if (!arguments.check) return;
  const pass alone =
      model.run(tokens, 0, [&](std::int64_t, input_view query, input_view key, input_view value, output_view out) {
        cca::attention(query, key, value, out, options, executor);
      });
  fmt::print("perplexity {:.4f} in one process, {:.2f} s\n", model.perplexity(alone.hidden, tokens), alone.seconds);
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  arguments arguments;
  CLI::App app("Prefill of a text by SmolLM2-135M-Instruct over the ranks of mpirun");
  app.add_option("folder", arguments.folder, "What examples/smollm2/prepare.py has written")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--tokens", arguments.tokens, "Tokens of the text, from its start")
      ->check(CLI::Range(2, 1 << 30))
      ->capture_default_str();
  app.add_option("--threads", arguments.threads, "Threads of each rank")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--attention", arguments.attention, attention_forms)->capture_default_str();
  app.add_option("--sink-tokens", arguments.sink_tokens, "First tokens that stay raw")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_flag("--check", arguments.check, "Rank 0 also takes the whole text through the model");
  try {
    app.parse(argc, argv);
    run(arguments);
  } catch (const CLI::Error& error) {
    const int code = app.exit(error);
    MPI_Finalize();
    return code;
  } catch (const std::exception& error) {
    fmt::print(stderr, "cluster_prefill: {}\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  MPI_Finalize();
}
