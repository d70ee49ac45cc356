// One source, compiled for two instruction sets into one program: UNIT names the function. It uses every part of the
// library, and nothing beside it whose inline functions the two could share.
#include "unit.hpp"

#include <cca/cca.hpp>
#include <cca/kv_cache_file.hpp>

float UNIT(const float* tokens) {
  constexpr std::int64_t group = 2, cores = length / group;
  constexpr cca::options options{.group_size = group, .window = 4};
  float out[length * dim], lse[length], grad[3][length * dim], core[2][cores * dim];
  const auto tokens_of = [](auto* data) { return cca::bhsd(data, 1, 1, length, dim); };
  const auto cores_of = [](auto* data) { return cca::bhsd(data, 1, 1, cores, dim); };
  const auto view = tokens_of(tokens);
  const auto result = tokens_of(out);
  const auto sums = cca::bhs(lse, 1, 1, length);

  cca::pool(view, view, view, cores_of(core[0]), cores_of(core[1]), {.group_size = group});
  cca::attention({view, view, view}, {result, sums}, options);
  cca::attention_gradient({view, view, view}, {result, sums}, {view},
                          {tokens_of(grad[0]), tokens_of(grad[1]), tokens_of(grad[2])}, options);
  cca::merge({result, sums}, {result, sums}, {result, sums});
  cca::kv_cache<float> cache({.batch = 1, .heads = 1, .kv_heads = 1, .dim = dim}, options);
  cache.attend(view, view, view, tokens_of(grad[0]));
  cca::attention(view, view, view, tokens_of(grad[1]), {.window = 4});

  float sum = 0;
  for (const float x : out) sum += x;
  for (const auto& g : grad)
    for (const float x : g) sum += x;
  for (const auto& c : core)
    for (const float x : c) sum += x;
  return sum;
}
