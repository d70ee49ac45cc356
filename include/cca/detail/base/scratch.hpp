#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <span>

#include "refuse.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What every part of scratch memory is aligned to: a cache line, and the widest vector.
inline constexpr std::size_t scratch_alignment = 64;

/// A part of scratch memory has fewer bytes, so that those of a dozen parts can be added up in 64 bits.
inline constexpr long double most_bytes = 0x1p59L;

/// What the library allocates at a time, at most. A system with less memory may promise more, and end whoever uses it.
inline constexpr std::size_t most_allocated_bytes = std::size_t{1} << 40;

/// The product of sizes that callers choose, elements of a part of scratch memory.
template <class T, class... Size>
[[nodiscard]] constexpr std::int64_t element_count(Size... sizes) {
  const long double bytes = (static_cast<long double>(sizeof(T)) * ... * static_cast<long double>(sizes));
  if (bytes == 0) return 0;  // also where another product of the sizes would overflow
  if (!(0 < bytes && bytes < most_bytes))
    refuse("workspace", {"operands that need ", bytes, " bytes of it"}, {"fewer than 2^59"});
  return (std::int64_t{1} * ... * static_cast<std::int64_t>(sizes));
}

/// Bytes of `count` elements, rounded up so that what follows is aligned again.
template <class T>
[[nodiscard]] constexpr std::size_t scratch_bytes(std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(element_count<T>(count)) * sizeof(T);
  return (bytes + scratch_alignment - 1) / scratch_alignment * scratch_alignment;
}

/// A `std::bad_alloc` that says what was asked for.
class out_of_memory : public std::bad_alloc {
 public:
  explicit out_of_memory(std::size_t bytes) {
    std::snprintf(text_, sizeof text_, "cca: no memory for %zu bytes", bytes);
  }
  [[nodiscard]] const char* what() const noexcept override { return text_; }

 private:
  char text_[64];
};

/// Memory aligned to `scratch_alignment`, with nothing in it yet. Aligned by hand: glibc 2.36 does not find freed
/// memory again for an aligned allocation, and call after call would take fresh pages.
class aligned_memory {
 public:
  aligned_memory() = default;
  /// Errors name `argument`, for which the memory is.
  explicit aligned_memory(std::size_t bytes, const char* argument = "memory")
      : bytes_(bytes), block_(allocate(bytes, argument)) {}

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

  static std::byte* allocate(std::size_t bytes, const char* argument) {
    if (bytes > most_allocated_bytes)
      refuse(argument, {"a call that needs ", bytes, " bytes of it"},
             {"one from the caller: the library allocates at most 2^40 bytes"});
    try {
      return static_cast<std::byte*>(::operator new(bytes + scratch_alignment));
    } catch (const std::bad_alloc&) {
      throw out_of_memory(bytes);
    }
  }

  std::size_t bytes_ = 0;
  std::unique_ptr<std::byte, release> block_;
};

/// The scratch memory of one call: the caller's workspace, or memory of its own where there is none.
class scratch {
 public:
  /// `size_function` tells the caller how large a workspace has to be.
  scratch(std::span<std::byte> workspace, std::size_t bytes, const char* size_function = "workspace_size") {
    if (workspace.empty()) {
      own_ = aligned_memory(bytes, "workspace");
      next_ = own_.data();
      return;
    }
    void* aligned = workspace.data();
    std::size_t space = workspace.size();
    if (std::align(scratch_alignment, bytes, aligned, space) == nullptr)
      refuse("workspace", {workspace.size(), " bytes"}, {bytes + scratch_alignment, " (see ", size_function, ")"});
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
    return static_cast<std::size_t>(element_count<std::byte>(workers, scratch_bytes<T>(size)));
  }

 private:
  std::int64_t workers_, stride_;
  T* first_;
};

}}}  // namespace cca::CCA_TARGET::detail
