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

/// What a unit computes, in order. A class of the program, not of the standard library, which units would share.
class numbers {
 public:
  /// One more. Another unit's may differ by the tolerance, of numbers above 1 by as much of them.
  void append(double number, double tolerance);

  /// Whether there are as many of the other unit, all are finite and none differs by more.
  [[nodiscard]] bool agree_with(const numbers& other) const;

 private:
  static constexpr std::int64_t capacity = 20000;
  double number_[capacity], tolerance_[capacity];
  std::int64_t count_ = 0;
};

/// Attention of `length` tokens of `dim` elements to themselves, gradients, pooled groups and a cache that goes through
/// the stream, in every element type.
using unit = void(const float* tokens, std::iostream& stream, numbers& to);
