#pragma once

#include <array>
#include <cstdint>

#include "../../call.hpp"
#include "../../tensor_view.hpp"
#include "refuse.hpp"
#include "validate_views.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What blocks count. Without blocks both stay 1, or they would be ignored.
inline void require_selection_sizes(const named_view& blocks, const far_selection& selected) {
  const auto require = [&](const char* name, std::int64_t size) {
    if (size < 1) refuse(name, {size}, {"at least 1"});
    if (size > 1 && !given(blocks)) refuse(name, {size}, {"1: there are no far.selected.blocks"});
  };
  require("far.selected.block_rows", selected.block_rows);
  require("far.selected.block_queries", selected.block_queries);
  if (given(blocks)) require_sizes(blocks);
}

/// The list of blocks at `place`, each with a row below `length`.
inline void require_ascending(const std::int64_t* list, std::int64_t most, std::int64_t block_rows, std::int64_t length,
                              const std::array<std::int64_t, 3>& place) {
  const std::int64_t blocks = length / block_rows + (length % block_rows == 0 ? 0 : 1);
  for (std::int64_t i = 0; i < most; ++i) {
    const std::array at{place[0], place[1], place[2], i};
    if (!(-1 <= list[i] && list[i] < blocks))
      refuse("far.selected.blocks", {list[i], " at ", at}, {"a block in [0, ", blocks, "), or -1 behind the last"});
    if (i == 0 || list[i] == -1) continue;
    if (list[i - 1] == -1) refuse("far.selected.blocks", {list[i], " at ", at}, {"-1 behind the first -1"});
    if (list[i] <= list[i - 1])
      refuse("far.selected.blocks", {list[i], " at ", at}, {"ascending blocks: one above ", list[i - 1]});
  }
}

/// A list for each block of queries, of every sequence or of one for all, of heads that query heads share.
inline void require_selection(const named_view& query, const named_view& key, const named_view& blocks,
                              const far_selection& selected) {
  require_operand(blocks);
  const auto lists = [&](std::int64_t length) {
    return length / selected.block_queries + (length % selected.block_queries == 0 ? 0 : 1);
  };
  if (query.heads() > 0 && (blocks.heads() == 0 || query.heads() % blocks.heads() != 0))
    refuse(blocks.name, {blocks.heads(), " heads"}, {"a divisor of the ", query.heads(), " query heads"});
  const bool shared = blocks.batch() == 1 && query.batch() != 1;
  if (!shared || blocks.has_lengths() || query.has_lengths())
    require_shape(blocks, blocks.heads(), blocks.dim(), query, lists);
  else
    require_extents(blocks, {1, blocks.heads(), lists(query.length()), blocks.dim()});
  if (query.heads() == 0) return;
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < blocks.heads(); ++h)
      for (std::int64_t q = 0; q < lists(query.length(b)); ++q)
        require_ascending(selected.blocks.row(shared ? 0 : b, h, q), blocks.dim(), selected.block_rows, key.length(b),
                          {b, h, q});
}

}}}  // namespace cca::CCA_TARGET::detail
