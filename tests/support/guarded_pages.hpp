#pragma once

// Memory of which every touch beside it faults, or of which there is more than the machine has.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#include "entry_points.hpp"

namespace cca::test {

/// Address space from the system, without content and without a claim on memory until it is touched.
class mapping {
 public:
  mapping(std::size_t bytes, int protection) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) memory_ = static_cast<std::byte*>(memory);
  }
  mapping(const mapping&) = delete;
  mapping& operator=(const mapping&) = delete;
  ~mapping() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }

  /// Null where the system refuses so much address space.
  [[nodiscard]] std::byte* data() const { return memory_; }

 private:
  std::size_t bytes_;
  std::byte* memory_ = nullptr;
};

/// Pages between two that fault when they are touched.
class guarded_pages {
 public:
  explicit guarded_pages(std::size_t bytes = std::size_t{1} << 21)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        bytes_((bytes + page_ - 1) / page_ * page_),
        mapping_(bytes_ + 2 * page_, PROT_NONE) {
    if (mprotect(mapping_.data() + page_, bytes_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }

  /// The first or the last `bytes` of them: what lies before or after faults.
  [[nodiscard]] std::byte* at(bool end, std::size_t bytes) const {
    if (bytes > bytes_) throw std::bad_alloc();
    return mapping_.data() + page_ + (end ? bytes_ - bytes : 0);
  }

 private:
  std::size_t page_, bytes_;
  mapping mapping_;
};

/// A view of rows with `padding` elements between them, and none after the last: that is where a guard begins.
template <class T>
tensor_view<T> place(const guarded_pages& pages, bool end, const extents& e, std::int64_t padding) {
  tensor_view<T> view{nullptr, e, {}};
  view.stride = {e[1] * e[2] * (e[3] + padding), e[2] * (e[3] + padding), e[3] + padding, 1};
  const std::int64_t elements = view.empty() ? 0 : e[0] * e[1] * e[2] * (e[3] + padding) - padding;
  view.data = reinterpret_cast<T*>(pages.at(end, static_cast<std::size_t>(elements) * sizeof(T)));
  return view;
}

}  // namespace cca::test
