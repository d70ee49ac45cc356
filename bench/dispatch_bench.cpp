// What the choice at run time costs: cca::dispatch beside the headers, for the same instruction set, in turns.
//   ratio  the best time through cca::dispatch by that of the call of the headers

#include <cca/dispatch.hpp>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include <benchmark/benchmark.h>

#include "machine.hpp"
#include "operands.hpp"
#include "timing.hpp"

#define CCA_NAME_OF(target) #target
#define CCA_NAME(target) CCA_NAME_OF(target)

namespace {

using bench::operands, bench::seconds, bench::timing;

void prefill(benchmark::State& state, std::int64_t heads, std::int64_t length) {
  const cca::options options{.group_size = 16, .window = 256};
  const double flops = 512.0 * static_cast<double>(heads * cca::partition_of(options).pair_count({0, length}));
  operands<float> data(1, heads, heads, length, length, 128);
  const auto query = std::as_const(data.query).view();
  const auto key = std::as_const(data.key).view(), value = std::as_const(data.value).view();
  const auto dispatched = [&] { cca::dispatch::attention(query, key, value, data.out.view(), options); };
  const auto direct = [&] { cca::attention(query, key, value, data.out.view(), options); };
  const auto right = [&](const auto& call) {
    std::fill(data.out.data.begin(), data.out.data.end(), 0.0f);
    call();
    return bench::check(data, true, options);
  };
  // The units of the headers are compiled for one instruction set, perhaps not for the machine's newest.
  cca::dispatch::use(CCA_NAME(CCA_VECTORS));
  if (!right(dispatched) || !right(direct)) return state.SkipWithError("wrong result");

  double best_direct = std::numeric_limits<double>::infinity();
  const timing best = bench::time<float>(
      state, dispatched, [](const auto& f) { return seconds(f); },
      [&] { best_direct = std::min(best_direct, seconds(direct)); });
  bench::count_flops(state, best, flops);
  state.counters["ratio"] = best.seconds / best_direct;
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("compiler", bench::compiler);
  benchmark::AddCustomContext("instruction_set", bench::instruction_set());
  for (const std::int64_t heads : {1, 32})
    bench::add("dispatch/cca/float/D:128/H:" + std::to_string(heads) + "/L:1024/g:16/s:256", 0.02,
               [heads](benchmark::State& state) { prefill(state, heads, 1024); });
  benchmark::RunSpecifiedBenchmarks();
}
