// H2O token by token, SnapKV over a prompt and what follows, and gradients given what was evicted, beside their
// definitions in double.
#include "heavy_hitters.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::rows;
const std::int64_t length = 80, heads = 4, kv_heads = 2, dim = 8, value_dim = 6;

/// Answers where query t of head h sees the tokens `kept(h, t)`, and what it gives to each of them is told to `given`.
template <class Kept, class Given>
rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value, const Kept& kept,
                        const Given& given) {
  rows<double> out(heads, length, value_dim);
  for (std::int64_t t = 0; t < length; ++t)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::vector<std::int64_t> tokens = kept(h / 2, t);
      std::vector<textbook::seen_row> seen;
      for (const std::int64_t j : tokens)
        seen.push_back({textbook::score(query.row(h, t), key.row(h / 2, j), dim), value.row(h / 2, j)});
      textbook::answer(seen, out.row(h, t), value_dim);
      given(h, t, tokens, textbook::weights(seen));
    }
  return out;
}

const auto nothing = [](auto&&...) {};

/// H2O by its definition: the sets of tokens of every step.
rows<double> h2o(const rows<double>& query, const rows<double>& key, const rows<double>& value, std::int64_t heavy,
                 std::int64_t recent) {
  std::vector<std::vector<std::int64_t>> cache(policies::index(kv_heads));
  rows<double> mass(kv_heads, length, 1);
  const auto kept = [&](std::int64_t h, std::int64_t t) {
    auto& set = cache[policies::index(h)];
    if (set.empty() || set.back() != t) set.push_back(t);
    return set;
  };
  const auto given = [&](std::int64_t h, std::int64_t t, const std::vector<std::int64_t>& tokens,
                         const std::vector<double>& weights) {
    for (std::size_t i = 0; i < tokens.size(); ++i) *mass.row(h / 2, tokens[i]) += weights[i];
    auto& set = cache[policies::index(h / 2)];
    if (h % 2 == 0 || set.size() < policies::index(heavy + recent)) return;
    const auto end = std::find_if(set.begin(), set.end(), [&](std::int64_t j) { return j > t + 1 - recent; });
    set.erase(std::min_element(
        set.begin(), end, [&](std::int64_t a, std::int64_t b) { return *mass.row(h / 2, a) < *mass.row(h / 2, b); }));
  };
  return definition(query, key, value, kept, given);
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  textbook::checks checks;
  rows<double> out(heads, length, value_dim), lse(heads, length, 1), whole = out;

  const std::int64_t heavy = 10, recent = 6;
  policies::heavy_hitters<double> cache(
      {.batch = 1, .heads = heads, .kv_heads = kv_heads, .dim = dim, .value_dim = value_dim}, heavy, recent);
  policies::evictions log(kv_heads, length);
  for (std::int64_t t = 0; t < length; ++t)
    cache.attend(operand(query).slice(t, 1), operand(key).slice(t, 1), operand(value).slice(t, 1),
                 out.view().slice(t, 1), log);
  checks.same("H2O", out, h2o(query, key, value, heavy, recent));
  const auto context = log.over(operand(key), operand(value), heads);
  policies::attend_far(operand(query), context, {whole.view(), lse.numbers()});
  checks.same("H2O, the sequence at once", whole, out);

  const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
  rows<double> grad_query = query, grad_key = key, grad_value = value;
  policies::attend_far_gradient(operand(query), context, {whole.view(), lse.numbers()}, operand(grad_out),
                                grad_query.view(), grad_key.view(), grad_value.view());
  const auto logged = [&](std::int64_t h, std::int64_t t) {
    std::vector<std::int64_t> tokens;
    for (std::int64_t j = 0; j <= t; ++j)
      if (t < *log.until.row(h, j)) tokens.push_back(j);
    return tokens;
  };
  const auto loss = [&] { return textbook::product(definition(query, key, value, logged, nothing), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);

  // SnapKV: dense attention over a prompt, whose last queries choose.
  const std::int64_t prompt = 60, last = 8, width = 5, kept = 12;
  policies::kernels::attention<double>(
      {operand(query).slice(0, prompt), operand(key).slice(0, prompt), operand(value).slice(0, prompt)},
      {out.view().slice(0, prompt), lse.numbers().slice(0, prompt)});
  const policies::evictions snap = policies::snapkv(
      operand(query), operand(key), cca::lse_view<const double>(lse.numbers()).slice(0, prompt), last, width, kept);
  policies::attend_far(operand(query), snap.over(operand(key), operand(value), heads), {out.view()});
  rows<double> mass(kv_heads, prompt, 1);
  const auto dense = [](std::int64_t, std::int64_t t) {
    std::vector<std::int64_t> tokens(policies::index(t + 1));
    std::iota(tokens.begin(), tokens.end(), 0);
    return tokens;
  };
  definition(query, key, value, dense, [&](std::int64_t h, std::int64_t t, const auto& tokens, const auto& weights) {
    for (std::size_t i = 0; i < tokens.size() && prompt - last <= t && t < prompt; ++i)
      *mass.row(h / 2, tokens[i]) += weights[i];
  });
  const auto chosen = [&](std::int64_t h, std::int64_t t) {
    if (t < prompt) return dense(h, t);
    std::vector<double> smooth;
    for (std::int64_t j = 0; j < prompt - last; ++j) {
      double most = 0;
      for (std::int64_t i = 0; i < prompt - last; ++i)
        if (std::abs(i - j) <= width / 2) most = std::max(most, *mass.row(h, i));
      smooth.push_back(most);
    }
    std::vector<std::int64_t> tokens = textbook::largest(smooth, kept);
    for (std::int64_t j = prompt - last; j <= t; ++j) tokens.push_back(j);
    return tokens;
  };
  checks.same("SnapKV", out, definition(query, key, value, chosen, nothing));

  const auto row_bytes = static_cast<double>((dim + value_dim) * 8);
  textbook::print_cost("H2O, last token", static_cast<double>(heavy + recent),
                       static_cast<double>(cache.bytes()) / static_cast<double>(kv_heads));
  const auto snap_rows = static_cast<double>(kept + last + length - prompt);
  textbook::print_cost("SnapKV, last token", snap_rows, snap_rows * row_bytes);
  textbook::print_cost("dense attention, last token", static_cast<double>(length),
                       static_cast<double>(length) * row_bytes);
  return checks.failures();
}
