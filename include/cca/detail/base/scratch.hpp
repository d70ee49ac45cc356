#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "refuse.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What every part of scratch memory is aligned to: a cache line, and the widest vector.
inline constexpr std::size_t scratch_alignment = 64;

/// Bytes of `count` elements, rounded up so that what follows is aligned again.
template <class T>
[[nodiscard]] constexpr std::size_t scratch_bytes(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  return (bytes + scratch_alignment - 1) / scratch_alignment * scratch_alignment;
}

/// Memory aligned to `scratch_alignment`, with nothing in it yet. Aligned by hand: glibc 2.36 does not find freed
/// memory again for an aligned allocation, and call after call would take fresh pages.
class aligned_memory {
 public:
  aligned_memory() = default;
  explicit aligned_memory(std::size_t bytes)
      : bytes_(bytes), block_(static_cast<std::byte*>(::operator new(bytes + scratch_alignment))) {}

  [[nodiscard]] std::byte* data() const {
    void* aligned = block_.get();
    std::size_t space = bytes_ + scratch_alignment;
    return static_cast<std::byte*>(std::align(scratch_alignment, bytes_, aligned, space));
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  struct release {
    void operator()(std::byte* p) const { ::operator delete(p); }
  };
  std::size_t bytes_ = 0;
  std::unique_ptr<std::byte, release> block_;
};

/// The scratch memory of one call: the caller's workspace, or memory of its own where there is none.
class scratch {
 public:
  scratch(std::span<std::byte> workspace, std::size_t bytes) {
    if (workspace.empty()) {
      own_ = aligned_memory(bytes);
      next_ = own_.data();
      return;
    }
    void* aligned = workspace.data();
    std::size_t space = workspace.size();
    if (std::align(scratch_alignment, bytes, aligned, space) == nullptr)
      refuse("workspace", std::to_string(workspace.size()) + " bytes",
             std::to_string(bytes + scratch_alignment) + " (see workspace_size)");
    next_ = static_cast<std::byte*>(aligned);
  }

  /// The next `count` elements.
  template <class T>
  [[nodiscard]] T* take(std::int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += scratch_bytes<T>(count);
    return taken;
  }

 private:
  aligned_memory own_;
  std::byte* next_ = nullptr;
};

/// Scratch memory of the workers of one call, `size` elements each.
template <class T>
class worker_scratch {
 public:
  worker_scratch(scratch& memory, std::int64_t workers, std::int64_t size)
      : workers_(workers),
        stride_(static_cast<std::int64_t>(scratch_bytes<T>(size) / sizeof(T))),
        first_(memory.take<T>(workers * stride_)) {}

  [[nodiscard]] std::int64_t workers() const { return workers_; }
  [[nodiscard]] T* operator[](std::int64_t worker) const { return first_ + worker * stride_; }

  [[nodiscard]] static constexpr std::size_t bytes(std::int64_t workers, std::int64_t size) {
    return static_cast<std::size_t>(workers) * scratch_bytes<T>(size);
  }

 private:
  std::int64_t workers_, stride_;
  T* first_;
};

}}}  // namespace cca::CCA_TARGET::detail
