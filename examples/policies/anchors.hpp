#pragma once

#include <cstdint>
#include <vector>

#include "evictions.hpp"

namespace policies {

/// Anchor attention: of each segment of the text its last token stays, whose own key and value stand for the segment,
/// since the model learns to gather it there. This is the token-wise anchor attention of AnchorCoder, Zhang et al.,
/// arXiv 2411.06680, whose anchors are given by the data (ends of lines of code); its attention to anchors of other
/// layers is not here.
///
/// A token sees its own segment and the anchors before it: a token between anchors is visible up to the next anchor's
/// position, an anchor for good. A cache keeps the anchors and the segment that is being written.
///
/// @param anchors  positions, ascending; the tokens behind the last one are a segment that has not ended
[[nodiscard]] inline evictions anchor_attention(const std::vector<std::int64_t>& anchors, std::int64_t kv_heads,
                                                std::int64_t length) {
  evictions result(kv_heads, length);
  for (std::int64_t h = 0; h < kv_heads; ++h) {
    std::int64_t j = 0;
    for (const std::int64_t anchor : anchors) {
      for (; j < anchor; ++j) *result.until.row(h, j) = anchor + 1;
      j = anchor + 1;
    }
  }
  return result;
}

}  // namespace policies
