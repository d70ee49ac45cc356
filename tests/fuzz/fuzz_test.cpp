// Random bytes, and the corpus: see fuzz.hpp. A finding ends the program.

#include "fuzz.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>

namespace {

TEST(FuzzTest, RandomBytes) {
  std::vector<std::uint8_t> bytes(1 << 12);
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    cca::test::random_engine random(seed);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    cca::test::fuzz(bytes.data(), bytes.size());
  }
}

TEST(FuzzTest, Corpus) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(CCA_FUZZ_CORPUS)) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    cca::test::fuzz(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    ++count;
  }
  EXPECT_GT(count, 0) << "no corpus in " CCA_FUZZ_CORPUS;
}

}  // namespace
