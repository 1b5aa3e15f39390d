// Runs machine code for AMX on a processor without it: catches SIGILL, does what the instruction does on tile registers
// of the calling thread's own, and goes on behind it. For tests alone; every instruction takes microseconds.
#pragma once

#include <cstdint>

namespace emulator {

// Catches SIGILL in this process from now on. What is no instruction of AMX goes to the handler from before.
void install();

// What an instruction did that the processor answers with an exception. Unless replaced, it is printed, with the
// instruction's address, and the process aborts.
extern void (*on_fault)(const char* reason, std::uint64_t address);

// Instructions since the process began, of all threads.
struct Counts {
  std::int64_t configurations = 0, releases = 0, zeros = 0, loads = 0, stores = 0, products = 0;
};
Counts counts();

// Threads whose tiles are configured now, those that have ended included.
int threads_with_tiles();

}  // namespace emulator
