#pragma once

#include <cstdint>
#include <iosfwd>

inline constexpr std::int64_t length = 20, dim = 3;

/// A pool whose only thread is the caller's.
struct caller_pool {
  int NumThreads() const;
  template <class Task>
  void Schedule(const Task& task) {
    task();
  }
};
extern caller_pool the_pool;

/// Attention of `length` tokens of `dim` elements to themselves, gradients, pooled groups and a cache that goes through the
/// stream, in every element type, summed up. Compiled twice.
double older_unit(const float* tokens, std::iostream& stream);
double newer_unit(const float* tokens, std::iostream& stream);
