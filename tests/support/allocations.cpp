#include "allocations.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<std::int64_t> allocations{0};

constexpr std::int64_t no_limit = std::numeric_limits<std::int64_t>::max();
thread_local std::int64_t allocations_left = no_limit;
thread_local std::size_t bytes_left = 0;

void* allocate(std::size_t size, std::size_t alignment) {
  ++allocations;
  if (allocations_left != no_limit) {
    if (allocations_left == 0 || size > bytes_left) throw std::bad_alloc();
    --allocations_left;
    bytes_left -= size;
  }
  // aligned_alloc wants a multiple of the alignment.
  void* memory = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

namespace cca::test {

std::int64_t allocation_count() { return allocations; }

allocation_limit::allocation_limit(std::int64_t count, std::size_t bytes) {
  allocations_left = count;
  bytes_left = bytes;
}

allocation_limit::~allocation_limit() { allocations_left = no_limit; }

}  // namespace cca::test

// The forms for arrays and those that do not throw call these.
void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
