#pragma once

#include <cstddef>

/// What the parts of cca_bench know of each other.
namespace bench {

/// Bytes that this program has allocated so far.
std::size_t allocated_bytes();

void add_decode_cases();
void add_gradient_cases();
void add_packed_cases();
void add_score_cases();
void add_selection_cases();
void add_unit_cases();

}  // namespace bench
