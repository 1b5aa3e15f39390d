#include "amx_emulator/trap.hpp"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ucontext.h>

#include "amx_emulator/instruction.hpp"
#include "amx_emulator/tile_registers.hpp"

namespace emulator {
namespace {

// SIGILL is raised by the instruction itself, which is never inside another function of the C library: the handler may
// do whatever ordinary code may.
void abort_with(const char* reason, std::uint64_t address) {
  std::fprintf(stderr, "AMX emulator: %s, by the instruction at 0x%llx\n", reason,
               static_cast<unsigned long long>(address));
  std::abort();
}

thread_local TileRegisters own;

std::atomic<int> with_tiles{0};
std::atomic<std::int64_t> configurations{0}, releases{0}, zeros{0}, loads{0}, stores{0}, products{0};
struct sigaction before;

const char* perform(const Instruction& instruction) {
  const int had = own.configured();
  const char* reason = nullptr;
  switch (instruction.operation) {
    case Operation::ldtilecfg:
      reason = own.configure(reinterpret_cast<const void*>(instruction.address));
      ++configurations;
      break;
    case Operation::sttilecfg:
      own.store_configuration(reinterpret_cast<void*>(instruction.address));
      break;
    case Operation::tilerelease:
      own.release();
      ++releases;
      break;
    case Operation::tilezero:
      reason = own.zero(instruction.tile);
      ++zeros;
      break;
    case Operation::tileloadd:
      reason = own.load(instruction.tile, instruction.address, instruction.stride);
      ++loads;
      break;
    case Operation::tilestored:
      reason = own.store(instruction.tile, instruction.address, instruction.stride);
      ++stores;
      break;
    case Operation::tdpbf16ps:
      reason = own.multiply_add(instruction.tile, instruction.left, instruction.right);
      ++products;
      break;
    case Operation::none:
      break;
  }
  with_tiles += int{own.configured()} - had;
  return reason;
}

Registers registers_of(const ucontext_t& context) {
  constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  Registers registers{};
  for (int i = 0; i < 16; ++i) registers.of[i] = static_cast<std::uint64_t>(context.uc_mcontext.gregs[order[i]]);
  return registers;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
  if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    // The instruction runs again, and now ends the process.
    ::signal(SIGILL, SIG_DFL);
    return;
  }
  before.sa_handler(signal);
}

void handle(int signal, siginfo_t* info, void* interrupted) {
  auto& context = *static_cast<ucontext_t*>(interrupted);
  greg_t& at = context.uc_mcontext.gregs[REG_RIP];
  const Registers registers = registers_of(context);
  bool any = false;
  // Tile instructions change no general register, so those that follow at once need no signal of their own.
  for (;; any = true) {
    const Instruction instruction = decode(reinterpret_cast<const unsigned char*>(at), registers);
    if (instruction.operation == Operation::none) break;
    const char* reason = instruction.malformed ? instruction.malformed : perform(instruction);
    if (reason) on_fault(reason, static_cast<std::uint64_t>(at));
    at += instruction.length;
  }
  if (!any) pass_on(signal, info, interrupted);
}

}  // namespace

void (*on_fault)(const char* reason, std::uint64_t address) = abort_with;

void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  struct sigaction was;
  sigaction(SIGILL, &action, &was);
  // A second call must not make the handler its own successor.
  if (!(was.sa_flags & SA_SIGINFO) || was.sa_sigaction != handle) before = was;
}

Counts counts() { return {configurations, releases, zeros, loads, stores, products}; }

int threads_with_tiles() { return with_tiles; }

}  // namespace emulator
