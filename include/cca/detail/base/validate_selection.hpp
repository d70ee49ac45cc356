#pragma once

#include <array>
#include <cstdint>

#include "../../call.hpp"
#include "../../tensor_view.hpp"
#include "numbers.hpp"
#include "refuse.hpp"
#include "validate_views.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What blocks count. Without blocks both stay 1, or they would be ignored.
inline void require_selection_sizes(const far_selection& selected) {
  const auto require = [&](const char* name, std::int64_t size) {
    if (size < 1) refuse(name, to_string(size), "at least 1");
    if (size > 1 && !given(selected.blocks)) refuse(name, to_string(size), "1: there are no far.selected.blocks");
  };
  require("far.selected.block_rows", selected.block_rows);
  require("far.selected.block_queries", selected.block_queries);
  if (given(selected.blocks)) require_sizes("far.selected.blocks", selected.blocks);
}

/// The list of blocks at `place`, each with a row below `length`.
inline void require_ascending(const std::int64_t* list, std::int64_t most, std::int64_t block_rows, std::int64_t length,
                              const std::array<std::int64_t, 3>& place) {
  const std::int64_t blocks = length / block_rows + (length % block_rows == 0 ? 0 : 1);
  const auto refuse_block = [&](std::int64_t i, const text& wanted) {
    refuse("far.selected.blocks", to_string(list[i]) + " at " + to_string<4>({place[0], place[1], place[2], i}), wanted);
  };
  for (std::int64_t i = 0; i < most; ++i) {
    if (!(-1 <= list[i] && list[i] < blocks))
      refuse_block(i, "a block in [0, " + to_string(blocks) + "), or -1 behind the last");
    if (i == 0 || list[i] == -1) continue;
    if (list[i - 1] == -1) refuse_block(i, "-1 behind the first -1");
    if (list[i] <= list[i - 1]) refuse_block(i, "ascending blocks: one above " + to_string(list[i - 1]));
  }
}

/// A list for each block of queries, of every sequence or of one for all, of heads that query heads share.
template <class Query, class Key>
void require_selection(const tensor_view<Query>& query, const tensor_view<Key>& key, const far_selection& selected) {
  const tensor_view<const std::int64_t>& blocks = selected.blocks;
  const char* const name = "far.selected.blocks";
  require_operand(name, blocks);
  const auto lists = [&](std::int64_t length) {
    return length / selected.block_queries + (length % selected.block_queries == 0 ? 0 : 1);
  };
  if (query.heads() > 0 && (blocks.heads() == 0 || query.heads() % blocks.heads() != 0))
    refuse(name, to_string(blocks.heads()) + " heads", "a divisor of the " + to_string(query.heads()) + " query heads");
  const bool shared = blocks.batch() == 1 && query.batch() != 1;
  if (!shared || blocks.has_lengths() || query.has_lengths())
    require_shape(name, blocks, blocks.heads(), blocks.dim(), query, lists);
  else
    require_extents(name, blocks, {1, blocks.heads(), lists(query.length()), blocks.dim()});
  if (query.heads() == 0) return;
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < blocks.heads(); ++h)
      for (std::int64_t q = 0; q < lists(query.length(b)); ++q)
        require_ascending(blocks.row(shared ? 0 : b, h, q), blocks.dim(), selected.block_rows, key.length(b), {b, h, q});
}

}}}  // namespace cca::CCA_TARGET::detail
