// The program of libFuzzer, see fuzz.sh.

#include "fuzz.hpp"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  GTEST_FLAG_SET(break_on_failure, true);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cca::test::fuzz(data, size);
  return 0;
}
