// In a program that links this, the engine's workspace ends at a forbidden page and begins as NaN. Not under
// sanitizers, which watch memory themselves.
#include "guarded_memory.hpp"

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  void* memory = allocate_guarded(bytes, static_cast<std::size_t>(alignment), Flush::end);
  std::memset(memory, 0xff, bytes);
  return memory;
}

void operator delete(void* memory, std::align_val_t) noexcept { free_guarded(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { free_guarded(memory); }
