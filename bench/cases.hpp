#pragma once

#include <cstddef>
#include <string_view>

#include "shape.hpp"

/// What the parts of cca_bench know of each other.
namespace bench {

/// Bytes that this program has allocated so far.
std::size_t allocated_bytes();

void add_attention_cases();
void add_decode_cases();
void add_gradient_cases();
void add_packed_cases();
void add_score_cases();
void add_selection_cases();
void add_unit_cases();

/// The cases of one shape. `kind` says what is seen: see `take_contexts`.
void add_attention_shape(shape of, std::string_view kind);
void add_decode_shape(shape of);
void add_gradient_shape(shape of, std::string_view kind);
void add_unit_shape(shape of, std::string_view kind, bool gradient);

}  // namespace bench
