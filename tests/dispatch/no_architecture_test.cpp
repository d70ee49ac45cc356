// A program without kernels for its processor: every call says so, and nothing is written.

#include <gtest/gtest.h>

#include <cca/dispatch.hpp>
#ifdef CCA_TEST_C
#include <cca/dispatch/cca.h>
#endif
#include <stdexcept>
#include <string>
#include <vector>

namespace cca::test { namespace {

template <class Exception, class F>
std::string text_of(const F& f) {
  try {
    f();
  } catch (const Exception& e) {
    return e.what();
  }
  return "nothing was thrown";
}

TEST(WithoutArchitectures, EveryCallSaysSo) {
  EXPECT_TRUE(dispatch::architectures().empty());
  const std::string why = "cca: processor: it runs none of the instruction sets that cca::dispatch was compiled for: ";
  EXPECT_EQ(text_of<std::runtime_error>([] { dispatch::architecture(); }), why);
  EXPECT_EQ(text_of<std::invalid_argument>([] { dispatch::use("sse2"); }),
            "cca: architecture: got sse2, wants one of none: the processor runs none of those that were compiled: ");

  std::vector<float> tokens(6, 1.0f), out(6, 7.0f);
  const auto view = bhsd(tokens.data(), 1, 1, 3, 2);
  EXPECT_EQ(text_of<std::runtime_error>([&] { dispatch::attention(view, view, view, bhsd(out.data(), 1, 1, 3, 2)); }),
            why);
  EXPECT_EQ(out, std::vector<float>(6, 7.0f));
}

#ifdef CCA_TEST_C
TEST(WithoutArchitectures, TheInterfaceForCSaysSo) {
  EXPECT_EQ(cca_architecture(), nullptr);
  EXPECT_EQ(std::string(cca_error()),
            "cca: processor: it runs none of the instruction sets that cca::dispatch was compiled for: ");
}
#endif

}}  // namespace cca::test
