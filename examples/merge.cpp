// A context in two parts, each attended to by itself, joined by their log-sum-exps; and what a wrong argument is told.
#include <cca/cca.hpp>
#include <cstdio>
#include <stdexcept>
#include <vector>

int main() {
  // One query of dim 1 sees four keys of logits 0, 1, 2, 3. The values are the keys.
  const float q = 1, keys[] = {0, 1, 2, 3};
  float out[3], lse[3];
  const auto query = cca::bhsd(&q, 1, 1, 1, 1);
  const auto result = [&](int i) { return cca::bhsd(out + i, 1, 1, 1, 1); };
  const auto sum = [&](int i) { return cca::bhs(lse + i, 1, 1, 1); };
  const auto part = [&](int first, int count) { return cca::bhsd(keys + first, 1, 1, count, 1); };

  cca::attention({query, part(0, 2), part(0, 2)}, {result(0), sum(0)});
  cca::attention({query, part(2, 2), part(2, 2)}, {result(1), sum(1)});
  cca::merge({result(0), sum(0)}, {result(1), sum(1)}, {result(2), sum(2)});
  for (const int i : {0, 1, 2})
    std::printf("%s: out %.4f, lse %.4f\n",
                i == 2   ? "joined"
                : i == 1 ? "keys 2, 3"
                         : "keys 0, 1",
                static_cast<double>(out[i]), static_cast<double>(lse[i]));

  try {
    cca::attention(query, part(0, 2), part(0, 3), result(0));
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
  }
}
