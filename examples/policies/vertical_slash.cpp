// MInference's vertical-slash pattern: answers and gradients beside the definition in double.
#include "vertical_slash.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "textbook.hpp"

namespace {

using policies::index;
using policies::rows;
const std::int64_t length = 90, heads = 4, kv_heads = 2, dim = 8, value_dim = 6;
const policies::vertical_slash_sizes sizes{
    .verticals = 9, .slashes = 8, .first_columns = 3, .near_diagonals = 2, .last_queries = 16};

/// Whether query t of head h sees token j, `[heads][length][length]`.
rows<double> chosen(const rows<double>& query, const rows<double>& key, const rows<double>& value) {
  rows<double> sees(heads, length, length);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<double> column(index(length)), diagonal(index(length));
    for (std::int64_t t = length - sizes.last_queries; t < length; ++t) {
      std::vector<textbook::seen_row> all;
      for (std::int64_t j = 0; j <= t; ++j)
        all.push_back({textbook::score(query.row(h, t), key.row(h / 2, j), dim), value.row(h / 2, j)});
      const std::vector<double> weight = textbook::weights(all);
      for (std::int64_t j = 0; j <= t; ++j)
        column[index(j)] += weight[index(j)], diagonal[index(t - j)] += weight[index(j)];
    }
    for (std::int64_t j = 0; j < sizes.first_columns; ++j) column[index(j)] = 1e3;
    for (std::int64_t j = 0; j < sizes.near_diagonals; ++j) diagonal[index(j)] = 1e3;
    for (std::int64_t t = 0; t < length; ++t) {
      for (const std::int64_t j : textbook::largest(column, sizes.verticals))
        if (j <= t) sees.row(h, t)[j] = 1;
      for (const std::int64_t distance : textbook::largest(diagonal, sizes.slashes))
        if (distance <= t) sees.row(h, t)[t - distance] = 1;
    }
  }
  return sees;
}

/// The same where tiles of queries and keys are read whole.
rows<double> whole_tiles(const rows<double>& sees, std::int64_t block) {
  rows<double> whole(heads, length, length);
  for (std::int64_t h = 0; h < heads; ++h)
    for (std::int64_t t = 0; t < length; ++t)
      for (std::int64_t j = 0; j <= t; ++j)
        for (std::int64_t i = t / block * block; i < std::min((t / block + 1) * block, length); ++i)
          for (std::int64_t k = j / block * block; k < std::min((j / block + 1) * block, length); ++k)
            if (sees.row(h, i)[k] == 1) whole.row(h, t)[j] = 1;
  return whole;
}

}  // namespace

int main() {
  auto query = textbook::random_rows(heads, length, dim, 1), key = textbook::random_rows(kv_heads, length, dim, 2),
       value = textbook::random_rows(kv_heads, length, value_dim, 3);
  const auto operand = [](const rows<double>& r) { return r.view(); };
  const auto sees = chosen(query, key, value);
  const auto row_bytes = static_cast<double>((dim + value_dim) * 8), kept = static_cast<double>(length) * row_bytes;

  textbook::checks checks;
  for (const std::int64_t block : {1, 4}) {
    const std::string tiles = "tiles of " + std::to_string(block);
    const rows<double> whole = whole_tiles(sees, block);
    const auto definition = [&] {
      return textbook::answers(query, key, value,
                               [&](std::int64_t h, std::int64_t t, std::int64_t j) { return whole.row(h, t)[j] == 1; });
    };

    auto in_blocks = sizes;
    in_blocks.block = block;
    rows<double> out(heads, length, value_dim), lse(heads, length, 1);
    const policies::vertical_slash pattern(operand(query), operand(key), operand(value), in_blocks);
    const auto context = pattern.over(operand(key), operand(value));
    policies::attend_far(operand(query), context, {out.view(), lse.numbers()});
    checks.same(tiles.c_str(), out, definition());

    const auto grad_out = textbook::random_rows(heads, length, value_dim, 4);
    rows<double> grad_query = query, grad_key = key, grad_value = value;
    policies::attend_far_gradient(operand(query), context, {out.view(), lse.numbers()}, operand(grad_out),
                                  grad_query.view(), grad_key.view(), grad_value.view());
    const auto loss = [&] { return textbook::product(definition(), grad_out); };
    checks.derivatives(query, grad_query, key, grad_key, value, grad_value, loss, tiles + ", ");

    double scores = 0;
    for (const double seen : whole.data) scores += seen / static_cast<double>(heads * length);
    textbook::print_cost(("vertical-slash, " + tiles).c_str(), scores, kept);
  }
  textbook::print_cost("dense attention, mean", static_cast<double>(length + 1) / 2, kept);
  return checks.failures();
}
