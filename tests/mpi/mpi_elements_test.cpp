// Elements other than floats across ranks. Run by mpirun, see mpi.cmake.

#include "spread_checks.hpp"

namespace cca::test { namespace {

TEST(Doubles, GetWhatTheTextbookSays) { check_attention<double, double>(21, problems(25)); }

TEST(Doubles, HaveTheGradientsThatTheTextbookSays) { check_gradients<double, double>(22, problems(60)); }

TEST(Doubles, DecodeOverASpreadCache) { check_decoding<double, double, double>(23, problems(8)); }

/// 16 bits are read as floats, so by the rule of floats.
TEST(SixteenBits, GetWhatTheTextbookSays) { check_attention<float, Eigen::bfloat16>(24, problems(25)); }

TEST(SixteenBits, HaveTheGradientsThatTheTextbookSays) { check_gradients<float, Eigen::bfloat16>(25, problems(60)); }

TEST(SixteenBits, DecodeOverASpreadCache) { check_decoding<float, Eigen::bfloat16, float>(26, problems(8)); }

}}  // namespace cca::test
