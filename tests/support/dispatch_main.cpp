// The main function of the tests that go through cca::dispatch. CCA_TEST_ARCHITECTURE names the one of its architectures
// that they are run for; without, it is the newest.

#include <cstdlib>
#include <iostream>
#include <string>

#include "entry_points.hpp"

namespace cca::test { namespace {

const char* asked() { return std::getenv("CCA_TEST_ARCHITECTURE"); }

/// The kernels in use stay those that were asked for, to the end of the tests.
class asked_architecture : public testing::Environment {
 public:
  void TearDown() override { expect_in_use(); }

  static void expect_in_use() {
    EXPECT_EQ(dispatch::architecture(), asked() != nullptr ? asked() : dispatch::architectures().front());
  }
};

TEST(Architecture, IsTheOneAskedFor) { asked_architecture::expect_in_use(); }

}}  // namespace cca::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    if (const char* name = cca::test::asked(); name != nullptr) cca::dispatch::use(name);
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  std::cout << "Architecture: " << cca::dispatch::architecture() << '\n';
  testing::AddGlobalTestEnvironment(new cca::test::asked_architecture);
  return RUN_ALL_TESTS();
}
