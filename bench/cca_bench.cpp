// Speed of every regime, as a fraction of what the machine can do. A case checks its result against the textbook in a
// wider type before it is timed. Each of its iterations is one call, timed by the thread's own clock, or by the wall
// clock where two threads work; the counters are of the best one:
//   flop/s     useful operations: 2 (dim + value dim) for each query-key pair that is seen
//   peak       their share of the multiply-add peak of one core, measured around the calls
//   byte/s     bytes of operands that have to move, where memory is the bound
//   bandwidth  their share of the speed at which a plain loop reads the same operands
//   best_ms, median_ms  of the iterations, whose mean is the time in the table
//   token/s    queries of all sequences
//   scratch    bytes that the call allocates beside its operands; per_thread: without the cores
//
// Beside Google Benchmark's options: --shape KIND:KEY=VALUE,... (again and again) runs cases of that shape alone. KIND
// is dense, local, cca, one of these behind gradient/, or decode. Keys: B and H sequences and heads, Hkv heads of keys, L
// tokens, Lq queries, D head size, g group size, s window, threads, dtype (float, double, bf16, half), unit (best, vnni);
// for decode cores (query_head, kv_head); without gradient/, of float and double, layout (bhsd, bshd). `dense` with g or s
// has what they make beside it. ratios.py compares two files of --benchmark_out.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>
#include <Eigen/Core>

#include "cases.hpp"
#include "machine.hpp"
#include "shape.hpp"
#include "timing.hpp"

namespace {

std::atomic<std::size_t> allocated{0};

void* allocate(std::size_t bytes) {
  allocated += bytes;
  // Operands start at a cache line, as those of tensor libraries do.
  if (void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64)) return memory;
  throw std::bad_alloc();
}

}  // namespace

// Counts what calls allocate. All other forms of new and delete come down to these.
void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new(std::size_t bytes, std::align_val_t) { return allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

std::size_t bench::allocated_bytes() { return allocated; }

namespace {

/// Bytes per second at which one core reads `bytes` again and again.
double read_speed(std::size_t bytes) {
  const std::vector<float> buffer(bytes / sizeof(float), 1.0f);
  return static_cast<double>(bytes) /
         bench::best_seconds(8, [&] { bench::read(buffer.data(), static_cast<std::int64_t>(buffer.size())); });
}

void add_context() {
  const auto giga = [](double x, const char* unit) {
    std::ostringstream text;
    text << std::setprecision(4) << x * 1e-9 << " G" << unit;
    return text.str();
  };
  std::size_t cache = 0;
  for (const auto& level : benchmark::CPUInfo::Get().caches)
    cache = std::max(cache, static_cast<std::size_t>(level.size));
  benchmark::AddCustomContext("compiler", bench::compiler);
  benchmark::AddCustomContext("instruction_set", bench::instruction_set());
  benchmark::AddCustomContext("fma_peak_float", giga(bench::fma_peak<float>(), "flop/s"));
  benchmark::AddCustomContext("fma_peak_double", giga(bench::fma_peak<double>(), "flop/s"));
  benchmark::AddCustomContext("read_memory", giga(read_speed(std::max(4 * cache, std::size_t{1} << 28)), "byte/s"));
  benchmark::AddCustomContext("read_last_level_cache", giga(read_speed(cache / 2), "byte/s"));
}

void add_all_cases() {
  bench::add_attention_cases();
  bench::add_decode_cases();
  bench::add_gradient_cases();
  bench::add_packed_cases();
  bench::add_score_cases();
  bench::add_selection_cases();
  bench::add_unit_cases();
}

/// The cases of `--shape KIND:KEY=VALUE,...`.
void add_shape(std::string_view text) {
  bench::shape of(text);
  std::string_view kind = of.kind();
  constexpr std::string_view backward = "gradient/";
  const bool gradient = kind.starts_with(backward);
  if (gradient) kind.remove_prefix(backward.size());
  if (kind == "decode" && !gradient) return bench::add_decode_shape(of);
  if (kind != "dense" && kind != "local" && kind != "cca")
    throw std::invalid_argument("--shape " + std::string(text) +
                                ": wants dense, local, cca, one of these behind gradient/, or decode before the colon");
  const std::string type = bench::shape(of).take_text("dtype", "float");
  if (type == "bf16" || type == "half" || of.has("unit")) return bench::add_unit_shape(of, kind, gradient);
  if (type != "float" && type != "double") of.refuse("dtype", type, "float, double, bf16 or half");
  gradient ? bench::add_gradient_shape(of, kind) : bench::add_attention_shape(of, kind);
}

/// Takes `option VALUE` and `option=VALUE` out of the arguments.
std::vector<std::string> take_values(int& argc, char** argv, std::string_view option) {
  std::vector<std::string> values;
  int kept = 0;
  for (int i = 0; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == option && i + 1 < argc)
      values.emplace_back(argv[++i]);
    else if (argument.starts_with(option) && argument.substr(option.size()).starts_with('='))
      values.emplace_back(argument.substr(option.size() + 1));
    else
      argv[kept++] = argv[i];
  }
  argc = kept;
  return values;
}

/// Whether cases are run, and not listed alone, for which nothing is measured.
bool runs(int argc, char** argv) {
  const auto lists = [](std::string_view argument) {
    return argument.starts_with("--benchmark_list_tests") && !argument.ends_with("=false");
  };
  return std::none_of(argv, argv + argc, lists);
}

}  // namespace

int main(int argc, char** argv) try {
  Eigen::setNbThreads(1);
  const std::vector<std::string> shapes = take_values(argc, argv, "--shape");
  const bool measures = runs(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const std::string& shape : shapes) add_shape(shape);
  if (shapes.empty()) add_all_cases();
  if (measures) add_context();
  benchmark::RunSpecifiedBenchmarks();
} catch (const std::invalid_argument& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
