// The program of libFuzzer, see fuzz.sh.

#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cca::test::fuzz(data, size);
  return 0;
}
