#include <cca/cca.hpp>
#include <chrono>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  const std::int64_t batch = 1, length = 8192, heads = 8, kv_heads = 2, dim = 64;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto tokens = [&](std::int64_t h) {
    std::vector<float> data(static_cast<std::size_t>(batch * length * h * dim));
    for (float& x : data) x = normal(random);
    return data;
  };
  const std::vector<float> q = tokens(heads), k = tokens(kv_heads), v = tokens(kv_heads);
  std::vector<float> out(q.size());

  // Views of the memory that a model has already: here [batch][length][heads][dim].
  const auto query = cca::bshd(q.data(), batch, length, heads, dim);
  const auto key = cca::bshd(k.data(), batch, length, kv_heads, dim);
  const auto value = cca::bshd(v.data(), batch, length, kv_heads, dim);
  const auto result = cca::bshd(out.data(), batch, length, heads, dim);

  const auto seconds = [](auto&& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const cca::options options{.group_size = 16, .window = 1024};
  const double core_aware = seconds([&] { cca::attention(query, key, value, result, options); });
  const double dense = seconds([&] { cca::attention(query, key, value, result); });

  const cca::partition partition{options.group_size, options.window};
  std::printf("the last of %lld tokens sees %lld cores and %lld raw tokens\n", static_cast<long long>(length),
              static_cast<long long>(partition.core_count(length - 1)),
              static_cast<long long>(partition.raw(length - 1).size()));
  std::printf("CCA attention %.3f s, dense attention %.3f s\n", core_aware, dense);
}
