// Memory whose neighbours cannot be touched: a step outside ends the test at once, also one by vectors, tiles or code
// that no sanitizer instruments.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

inline std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

enum class Flush { begin, end };  // which end of the memory lies at a forbidden page

// Reserves a page for the mapping's size, a forbidden page, whole pages around `bytes`, and a forbidden page.
inline void* allocate_guarded(std::size_t bytes, std::size_t alignment, Flush flush) {
  const std::size_t page = page_bytes(), inside = (bytes + page - 1) / page * page, whole = inside + 3 * page;
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* first = static_cast<unsigned char*>(mapped);
  std::memcpy(first, &whole, sizeof whole);
  mprotect(first + page, page, PROT_NONE);
  mprotect(first + 2 * page + inside, page, PROT_NONE);
  return first + 2 * page + (flush == Flush::end ? (inside - bytes) / alignment * alignment : 0);
}

inline void free_guarded(void* memory) {
  if (!memory) return;
  const std::size_t page = page_bytes();
  auto* first = reinterpret_cast<unsigned char*>(reinterpret_cast<std::uintptr_t>(memory) / page * page) - 2 * page;
  std::size_t whole;
  std::memcpy(&whole, first, sizeof whole);
  munmap(first, whole);
}

// For containers: every other allocation ends at a forbidden page, the others begin at one.
template <class T>
struct Guarded {
  using value_type = T;

  Guarded() = default;
  template <class Other>
  Guarded(const Guarded<Other>&) {}

  T* allocate(std::size_t count) {
    static unsigned turn = 0;
    return static_cast<T*>(allocate_guarded(count * sizeof(T), alignof(T), turn++ % 2 ? Flush::begin : Flush::end));
  }
  void deallocate(T* memory, std::size_t) { free_guarded(memory); }

  friend bool operator==(const Guarded&, const Guarded&) { return true; }
  friend bool operator!=(const Guarded&, const Guarded&) { return false; }
};

}  // namespace
