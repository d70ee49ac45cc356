// Attention across ranks: what all of them together get is what one process gets. Run by mpirun, see CMakeLists.txt.

#include "ranks.hpp"

#include "executors.hpp"

namespace cca::test { namespace {

using T = float;

/// As many as the time allows: CCA_MPI_PROBLEMS says otherwise.
int problems(int few) {
  const char* const said = std::getenv("CCA_MPI_PROBLEMS");
  return said != nullptr ? std::atoi(said) : few;
}

mpi::context_parallel over(const spread_problem& p, bool overlap = true) { return {world(), p.layout, overlap}; }

/// The results of a call, of all ranks.
std::pair<whole_tensor<T>, whole_tensor<T>> attend(const spread_problem& p, const own_operands<T>& operands,
                                                   ragged_layout memory, bool overlap, const any_executor& run = {}) {
  const own_results<T> r(p, memory);
  mpi::attention(over(p, overlap), operands.in, r.view(), p.options, run);
  EXPECT_TRUE(r.out.canaries_intact());
  EXPECT_TRUE(r.lse.canaries_intact());
  return {r.out.whole(p), r.lse.whole(p)};
}

TEST(Ranks, GetWhatTheTextbookSays) {
  random_engine random(1);
  error_rule<T> out, lse;
  for (int repeat = 0; repeat < problems(40); ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T> all(p, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T> own(p, all, memory);
    const auto [outs, lses] = attend(p, own, memory, draw(random, 0, 2) > 0);
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    if (world().rank() != 0) continue;
    error_rule<T> out_of_one;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      const auto plain = reference::attention<T>(all.sequence(p, q), p.options);
      const auto exact = reference::attention<exact_type<T>>(all.sequence(p, q), p.options);
      for (error_rule<T>* rule : {&out, &out_of_one}) add_whole(*rule, outs[q], plain.out, exact.out, label.str());
      add_whole(lse, lses[q], plain.lse, exact.lse, label.str());
    }
  }
  if (world().rank() != 0) return;
  EXPECT_TRUE(out.holds());
  EXPECT_TRUE(lse.holds());
}

}}  // namespace cca::test
