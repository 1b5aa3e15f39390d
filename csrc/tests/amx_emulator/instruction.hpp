// Decodes the instructions of AMX that the engine uses.
#pragma once

#include <cstdint>

namespace emulator {

// The general registers of the interrupted code by their numbers in machine code: rax, rcx, rdx, rbx, rsp, rbp, rsi,
// rdi, r8 to r15.
struct Registers {
  std::uint64_t of[16];
};

enum class Operation { none, ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps };

struct Instruction {
  Operation operation = Operation::none;  // none: not an instruction of AMX that is known here
  const char* malformed = nullptr;        // why the processor refuses it (#UD) whatever its tiles are, or null
  int length = 0;                         // in bytes
  int tile = 0;                           // the one that is zeroed, loaded or stored, or the sums
  int left = 0, right = 0;
  std::uint64_t address = 0;
  std::uint64_t stride = 0;  // in bytes, modulo 2^64
};

// Reads the instruction at `code`. It looks at no more bytes than the instruction has.
Instruction decode(const unsigned char* code, const Registers& registers);

}  // namespace emulator
