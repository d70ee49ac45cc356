// What each query sees: # a raw token, ===o a group of 4 through its core.
#include <cca/partition.hpp>
#include <cstdio>
#include <string>

int main() {
  constexpr cca::partition partition{.group_size = 4, .window = 6};
  for (const int t : {5, 8, 9, 12, 13, 17}) {
    std::string seen;
    for (std::int64_t b = 0; b < partition.core_count(t); ++b) seen += "===o";
    seen.append(static_cast<std::size_t>(partition.raw(t).size()), '#');
    std::printf("t = %-3d %s\n", t, seen.c_str());
  }
}
