// Two images of different numbers of keypoints: what one hears from the other, and gradients, beside the definition
// in double.
#include "matchable_keypoints.hpp"

#include <cmath>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::index;
using policies::rows;
const std::int64_t here = 40, there = 60, heads = 2, dim = 8, value_dim = 6, count = 12;
const double apart = 0.8;

/// One keypoint after the other: the most matchable that is apart from those before it.
std::vector<bool> sample(const std::vector<policies::point>& at, const std::vector<double>& matchability) {
  std::vector<bool> sampled(at.size()), open(at.size(), true);
  for (std::int64_t n = 0; n < count; ++n) {
    std::size_t best = at.size();
    for (std::size_t i = 0; i < at.size(); ++i)
      if (open[i] && (best == at.size() || matchability[i] > matchability[best])) best = i;
    if (best == at.size()) break;
    sampled[best] = true;
    for (std::size_t i = 0; i < at.size(); ++i) {
      const double x = at[i][0] - at[best][0], y = at[i][1] - at[best][1];
      if (x * x + y * y < apart * apart) open[i] = false;
    }
  }
  return sampled;
}

rows<double> definition(const rows<double>& query, const rows<double>& key, const rows<double>& value,
                        const rows<double>& matchability, const std::vector<bool>& sampled) {
  rows<double> out(heads, here, value_dim);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t i = 0; i < here; ++i) {
      std::vector<textbook::seen_row> seen;
      for (std::int64_t j = 0; j < there; ++j)
        if (sampled[index(j)])
          seen.push_back({textbook::score(query.row(h, i), key.row(h, j), dim) + std::log(*matchability.row(0, j)),
                          value.row(h, j)});
      textbook::answer(seen, out.row(h, i), value_dim);
    }
  return out;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, here, dim, 1), key = textbook::random_rows(heads, there, dim, 2),
       value = textbook::random_rows(heads, there, value_dim, 3), matchability = textbook::random_rows(1, there, 1, 4);
  for (double& m : matchability.data) m = 1 / (1 + std::exp(m));
  const auto places = textbook::random_rows(1, there, 2, 5);
  std::vector<policies::point> at;
  for (std::int64_t j = 0; j < there; ++j) at.push_back({places.row(0, j)[0], places.row(0, j)[1]});
  const auto sampled = sample(at, matchability.data);

  textbook::checks checks;
  rows<double> out(heads, here, value_dim), lse(heads, here, 1);
  const policies::matchable_keypoints<double> policy(at, matchability.data, count, apart);
  const policies::view<const double> asking = query.view();
  const auto context = policy.context(key.view(), value.view(), here);
  policies::attend_far(asking, context, {out.view(), lse.numbers()});
  checks.same("answers", out, definition(query, key, value, matchability, sampled));

  const auto grad_out = textbook::random_rows(heads, here, value_dim, 6);
  rows<double> grad_query = query, grad_key = key, grad_value = value, grad_matchability = matchability;
  policy.gradient(asking, context, {out.view(), lse.numbers()}, grad_out.view(), grad_query, grad_key, grad_value,
                  grad_matchability.data);
  const auto loss = [&] { return textbook::product(definition(query, key, value, matchability, sampled), grad_out); };
  checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss);
  checks.derivative("gradient of the matchability", matchability, grad_matchability, loss);

  // What is kept is what is read.
  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), read = static_cast<double>(policy.sampled());
  textbook::print_cost("MaKeGNN", read, read * row_bytes);
  textbook::print_cost("all keypoints", static_cast<double>(there), static_cast<double>(there) * row_bytes);
  return checks.failures();
}
