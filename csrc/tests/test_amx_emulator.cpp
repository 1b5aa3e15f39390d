// The emulator of AMX against hand-made values, encodings and mistakes. Where the processor has AMX, the values are
// computed by its own tiles, and what needs a signal is left out.
#include <sys/wait.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "amx_emulator/instruction.hpp"
#include "amx_emulator/tile_registers.hpp"
#include "amx_emulator/trap.hpp"
#include "check.hpp"
#include "cpu/amx/permission.hpp"
#include "cpu/amx/tile_unit.hpp"
#include "guarded_memory.hpp"
#include "tile_cases.hpp"
#include "tile_model.hpp"

namespace {

using emulator::Operation;
using emulator::TileRegisters;

// Machine code at the end of accessible memory, as an assembler wrote it.
void check_decoder() {
  emulator::Registers registers{};
  for (unsigned i = 0; i < 16; ++i) registers.of[i] = 1000 * (i + 1);
  const auto read = [&](std::vector<unsigned char> code) {
    void* memory = allocate_guarded(code.size(), 1, Flush::end);
    std::memcpy(memory, code.data(), code.size());
    const emulator::Instruction found = emulator::decode(static_cast<unsigned char*>(memory), registers);
    const bool whole = found.operation == Operation::none || found.length == static_cast<int>(code.size());
    CHECK(whole, "%d bytes of %d", found.length, int(code.size()));
    emulator::Instruction result = found;
    // Addresses relative to the next instruction, as if that were at 0.
    if (found.operation == Operation::ldtilecfg && (code[4] & 0xc7) == 5)
      result.address -= reinterpret_cast<std::uint64_t>(memory) + code.size();
    free_guarded(memory);
    return result;
  };
  struct Row {
    const char* text;
    std::vector<unsigned char> code;
    Operation operation;
    int tile = 0, left = 0, right = 0;
    std::int64_t address = 0, stride = 0;
  };
  constexpr Operation load = Operation::tileloadd, store = Operation::tilestored, product = Operation::tdpbf16ps;
  const Row rows[] = {
      {"tileloadd (%rax,%r9,1), %tmm4", {0xc4, 0xa2, 0x7b, 0x4b, 0x24, 0x08}, load, 4, 0, 0, 1000, 10000},
      {"tileloadd (%rsi,%r10,1), %tmm6", {0xc4, 0xa2, 0x7b, 0x4b, 0x34, 0x16}, load, 6, 0, 0, 7000, 11000},
      {"tileloadd (%r11,%r9,1), %tmm5", {0xc4, 0x82, 0x7b, 0x4b, 0x2c, 0x0b}, load, 5, 0, 0, 12000, 10000},
      {"tileloadd 8(%r12,%rbx,8), %tmm1", {0xc4, 0xc2, 0x7b, 0x4b, 0x4c, 0xdc, 8}, load, 1, 0, 0, 13008, 32000},
      {"tileloadd -512(%rsp,%rcx,2), %tmm0", {0xc4, 0xe2, 0x7b, 0x4b, 0x84, 0x4c, 0, 0xfe, 0xff, 0xff}, load, 0, 0, 0,
       4488, 4000},
      {"tileloadd (%rdi), %tmm2: no index", {0xc4, 0xe2, 0x7b, 0x4b, 0x14, 0x27}, load, 2, 0, 0, 8000, 0},
      {"tileloadd 64(,%rdx,4), %tmm3: no base", {0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x95, 64, 0, 0, 0}, load, 3, 0, 0, 64,
       12000},
      {"tileloaddt1 (%rax,%rbx,1), %tmm7", {0xc4, 0xe2, 0x79, 0x4b, 0x3c, 0x18}, load, 7, 0, 0, 1000, 4000},
      {"tilestored %tmm1, 0(%r13,%r8,1)", {0xc4, 0x82, 0x7a, 0x4b, 0x4c, 0x05, 0}, store, 1, 0, 0, 14000, 9000},
      {"tdpbf16ps %tmm6, %tmm4, %tmm0", {0xc4, 0xe2, 0x4a, 0x5c, 0xc4}, product, 0, 4, 6},
      {"tdpbf16ps %tmm7, %tmm5, %tmm3", {0xc4, 0xe2, 0x42, 0x5c, 0xdd}, product, 3, 5, 7},
      {"tilezero %tmm5", {0xc4, 0xe2, 0x7b, 0x49, 0xe8}, Operation::tilezero, 5},
      {"tilerelease", {0xc4, 0xe2, 0x78, 0x49, 0xc0}, Operation::tilerelease},
      {"ldtilecfg -64(%rsp)", {0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0xc0}, Operation::ldtilecfg, 0, 0, 0, 4936},
      {"ldtilecfg (%r15)", {0xc4, 0xc2, 0x78, 0x49, 0x07}, Operation::ldtilecfg, 0, 0, 0, 16000},
      {"ldtilecfg 256(%rip)", {0xc4, 0xe2, 0x78, 0x49, 0x05, 0, 1, 0, 0}, Operation::ldtilecfg, 0, 0, 0, 256},
      {"sttilecfg 16(%rbp)", {0xc4, 0xe2, 0x79, 0x49, 0x45, 16}, Operation::sttilecfg, 0, 0, 0, 6016},
      {"tdpbssd, which the engine does not use", {0xc4, 0xe2, 0x4b, 0x5e, 0xc4}, Operation::none},
      {"vpaddd of AVX2", {0xc5, 0xfd, 0xfe, 0xc0}, Operation::none},
      {"ud2", {0x0f, 0x0b}, Operation::none},
  };
  for (const Row& row : rows) {
    const emulator::Instruction found = read(row.code);
    const bool same = found.operation == row.operation && !found.malformed && found.tile == row.tile &&
                      found.left == row.left && found.right == row.right &&
                      found.address == static_cast<std::uint64_t>(row.address) &&
                      found.stride == static_cast<std::uint64_t>(row.stride);
    CHECK(same, "%s: operation %d, tiles %d %d %d, address %llu, stride %llu, %s", row.text, int(found.operation),
          found.tile, found.left, found.right, static_cast<unsigned long long>(found.address),
          static_cast<unsigned long long>(found.stride), found.malformed ? found.malformed : "");
  }
  const std::vector<unsigned char> refused[] = {
      {0xc4, 0xe2, 0x7b, 0x4b, 0x20},        // tileloadd without the byte SIB
      {0xc4, 0x22, 0x7b, 0x4b, 0x24, 0x08},  // a tile 12
      {0xc4, 0xa2, 0x4b, 0x4b, 0x24, 0x08},  // vvvv in use
      {0xc4, 0xa2, 0x7f, 0x4b, 0x24, 0x08},  // VEX.L
      {0xc4, 0xa2, 0xfb, 0x4b, 0x24, 0x08},  // VEX.W
      {0xc4, 0xe2, 0x0a, 0x5c, 0xc4},        // a right operand 14
  };
  for (const auto& code : refused) CHECK(read(code).malformed, "%02x %02x", code[2], code[4]);
}

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// What the processor answers with an exception, each with its reason.
void check_faults() {
  TileRegisters tiles;
  const auto refuses = [](const char* got, const char* words) {
    CHECK(got && std::string(got).find(words) != std::string::npos, "'%s', expected '%s'", got ? got : "", words);
  };
  const auto address = [](const void* at) { return reinterpret_cast<std::uint64_t>(at); };
  alignas(64) std::uint32_t memory[16][16] = {};
  refuses(tiles.zero(0), "no tiles are configured");
  refuses(tiles.load(0, address(memory), 64), "no tiles are configured");
  refuses(tiles.multiply_add(0, 1, 2), "no tiles are configured");
  const auto configures = [&](auto change) {
    Configuration block;
    for (int i = 0; i < 7; ++i) {
      block.row_bytes[i] = 64;
      block.rows[i] = 16;
    }
    change(block);
    return tiles.configure(&block);
  };
  refuses(configures([](auto& c) { c.palette = 2; }), "palette");
  refuses(configures([](auto& c) { c.reserved[13] = 1; }), "reserved");
  refuses(configures([](auto& c) { c.row_bytes[8] = 64; }), "reserved");
  refuses(configures([](auto& c) { c.rows[8] = 1; }), "reserved");
  refuses(configures([](auto& c) { c.rows[3] = 17; }), "larger");
  refuses(configures([](auto& c) { c.row_bytes[3] = 68; }), "larger");
  refuses(configures([](auto& c) { c.rows[3] = 0; }), "alone");
  refuses(configures([](auto& c) { c.row_bytes[3] = 0; }), "alone");
  CHECK(!tiles.configured(), "a refused configuration changes nothing");
  CHECK(!configures([](auto& c) { c.rows[2] = 8, c.row_bytes[4] = 62, c.start_row = 15; }), "a configuration");
  refuses(tiles.zero(7), "leaves out");
  refuses(tiles.store(7, address(memory), 64), "leaves out");
  refuses(tiles.load(4, address(memory), 64), "whole elements");
  refuses(tiles.load(2, address(memory), 64), "start row");
  refuses(tiles.multiply_add(0, 0, 1), "one tile");
  refuses(tiles.multiply_add(0, 1, 1), "one tile");
  refuses(tiles.multiply_add(0, 1, 7), "leaves out");
  refuses(tiles.multiply_add(0, 1, 2), "cannot be multiplied");
  refuses(tiles.multiply_add(2, 0, 1), "cannot be multiplied");
  refuses(tiles.multiply_add(0, 1, 4), "whole elements");
  CHECK(!configures([](auto& c) { c.palette = 0; }) && !tiles.configured(), "palette 0 releases the tiles");
}

// Tiles smaller than the registers: what is beyond them stays zero, and is neither loaded nor stored.
void check_small_tiles() {
  TileRegisters tiles;
  // 3 x 2 pairs times 2 pairs x 5.
  Configuration block;
  block.rows[0] = 3, block.row_bytes[0] = 20;
  block.rows[1] = 3, block.row_bytes[1] = 8;
  block.rows[2] = 2, block.row_bytes[2] = 20;
  CHECK(!tiles.configure(&block), "a configuration");
  Configuration again;
  tiles.store_configuration(&again);
  CHECK(std::memcmp(&block, &again, sizeof block) == 0, "what was configured is stored");
  const auto pair = [](float first, float second) {
    return static_cast<std::uint32_t>(bfloat16(second)) << 16 | bfloat16(first);
  };
  // Whole rows that would be infinite if they were read beyond their tile.
  std::uint32_t a[16][16], b[16][16];
  float c[16][16];
  for (auto* matrix : {&a, &b})
    for (auto& row : *matrix)
      for (std::uint32_t& word : row) word = 0x7f807f80;
  for (auto& row : c)
    for (float& value : row) value = -7;
  for (int m = 0; m < 3; ++m)
    for (int k = 0; k < 2; ++k) a[m][k] = pair(float(m + 1), float(k - 2));
  for (int k = 0; k < 2; ++k)
    for (int n = 0; n < 5; ++n) b[k][n] = pair(float(n - k), float(3 * n));
  CHECK(!tiles.load(1, reinterpret_cast<std::uint64_t>(a), 64), "a load");
  CHECK(!tiles.load(2, reinterpret_cast<std::uint64_t>(b), 64), "a load");
  CHECK(!tiles.zero(0) && !tiles.multiply_add(0, 1, 2) && !tiles.multiply_add(0, 1, 2), "products");
  CHECK(!tiles.store(0, reinterpret_cast<std::uint64_t>(c), 64), "a store");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float wanted = -7;
      if (m < 3 && n < 5) {
        wanted = 0;
        for (int k = 0; k < 2; ++k) wanted += 2 * float((m + 1) * (n - k) + (k - 2) * 3 * n);
      }
      CHECK(c[m][n] == wanted, "(%d, %d): %g, expected %g", m, n, c[m][n], wanted);
    }
}

// Any bits, denormals and infinities among them, against the model.
template <class Unit>
std::vector<std::uint32_t> product_of(const std::uint32_t (*a)[16], const std::uint32_t (*b)[16]) {
  std::vector<std::uint32_t> c(256, 0x00300000);
  Unit::configure();
  Unit::fence();
  Unit::template load<0>(c.data(), 64);
  Unit::template load<4>(a, 64);
  Unit::template load<6>(b, 64);
  Unit::template multiply_add<0, 4, 6>();
  Unit::template store<0>(c.data(), 64);
  Unit::fence();
  Unit::release();
  return c;
}

void check_random_bits() {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    std::uint32_t a[16][16], b[16][16];
    // Exponents around 2^-63, so that products are around the smallest normal number; in some rounds any.
    const auto element = [&] {
      const std::uint32_t exponent = round % 4 ? 60 + random() % 12 : random() % 255;
      return (random() & 0x807f) | exponent << 7;
    };
    for (auto* matrix : {&a, &b})
      for (auto& row : *matrix)
        for (std::uint32_t& word : row) word = element() << 16 | element();
    const auto got = product_of<TileUnit>(a, b), wanted = product_of<TileModel>(a, b);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const float x = from_bits(got[i]), y = from_bits(wanted[i]);
      CHECK(got[i] == wanted[i] || (x != x && y != y), "round %d, element %d: %08x, the model %08x", round, int(i),
            got[i], wanted[i]);
    }
  }
}

sigjmp_buf back;
std::string reported;

void report(const char* reason, std::uint64_t) {
  reported = reason;
  siglongjmp(back, 1);
}

void leave(int) { siglongjmp(back, 1); }

// The reason that the emulator gives for what `act` does, or an empty string.
template <class Act>
std::string reason_of(const Act& act) {
  reported.clear();
  const auto kept = emulator::on_fault;
  emulator::on_fault = report;
  if (sigsetjmp(back, 1) == 0) act();
  emulator::on_fault = kept;
  return reported;
}

void check_signals() {
  alignas(64) static std::uint32_t memory[16][16];
  CHECK(reason_of([] { TileUnit::load<3>(memory, 64); }) == "#UD: no tiles are configured", "'%s'", reported.c_str());
  CHECK(emulator::threads_with_tiles() == 0, "%d", emulator::threads_with_tiles());
  // A start row is where a load that a page fault has interrupted goes on.
  Configuration half;
  half.start_row = 15;
  half.rows[3] = 16, half.row_bytes[3] = 64;
  asm volatile("ldtilecfg %0" : : "m"(half));
  CHECK(emulator::threads_with_tiles() == 1, "%d", emulator::threads_with_tiles());
  CHECK(reason_of([] { TileUnit::zero<2>(); }) == "#UD: a tile that the configuration leaves out", "'%s'",
        reported.c_str());
  std::uint32_t row[16], out[16][16] = {};
  for (int i = 0; i < 16; ++i) row[i] = static_cast<std::uint32_t>(i + 1);
  // Rows before the start row are not read: they would be far outside.
  const std::uintptr_t far = std::uintptr_t{1} << 40, first = reinterpret_cast<std::uintptr_t>(row) - 15 * far;
  TileUnit::load<3>(reinterpret_cast<const void*>(first), static_cast<Index>(far));
  TileUnit::store<3>(out, 64);
  TileUnit::fence();
  for (int r = 0; r < 16; ++r)
    for (int i = 0; i < 16; ++i)
      CHECK(out[r][i] == (r == 15 ? row[i] : 0), "row %d, word %d: %u", r, i, out[r][i]);
  // Each thread has tiles of its own, and one that ends with them is found.
  std::string other;
  std::thread([&] { other = reason_of([] { TileUnit::zero<3>(); }); }).join();
  CHECK(other == "#UD: no tiles are configured", "'%s'", other.c_str());
  TileUnit::release();
  CHECK(emulator::threads_with_tiles() == 0, "%d", emulator::threads_with_tiles());
  std::thread(TileUnit::configure).join();
  CHECK(emulator::threads_with_tiles() == 1, "a thread that kept its tiles: %d", emulator::threads_with_tiles());
}

// A tile that ends behind the memory it is loaded from ends the process.
void check_bounds() {
  for (const bool inside : {true, false}) {
    const pid_t child = fork();
    if (child == 0) {
      close(STDERR_FILENO);  // a sanitizer's report of what is meant to happen
      void* memory = allocate_guarded(1024, 4, Flush::end);
      TileUnit::configure();
      TileUnit::load<1>(static_cast<char*>(memory) + (inside ? 0 : 4), 64);
      TileUnit::store<1>(memory, 64);
      TileUnit::release();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    const bool ended_well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    CHECK(ended_well == inside, "status %d", status);
  }
}

// What is no instruction of AMX is none of the emulator's business.
void check_others() {
  CHECK(reported.empty(), "'%s'", reported.c_str());
  bool came_back = false;
  if (sigsetjmp(back, 1) == 0) {
    asm volatile("ud2");
  } else {
    came_back = true;
  }
  CHECK(came_back, "the handler from before was not called");
}

}  // namespace

int main() {
  check_decoder();
  if (!__builtin_cpu_supports("avx512f")) {
    std::printf("tiles: not tested, this processor has no AVX-512, with which they are emulated\n");
    return failures() != 0;
  }
  check_faults();
  check_small_tiles();
  const rpsft::amx::System here = rpsft::amx::this_system();
  const bool emulated = !here.tiles;
  const std::string refusal = emulated ? "" : rpsft::amx::refusal(here);
  if (!refusal.empty()) std::printf("signals and values: not tested, %s\n", refusal.c_str());
  if (!refusal.empty()) return failures() != 0;
  if (emulated) {
    std::signal(SIGILL, leave);
    emulator::install();
    emulator::install();
    reported.clear();
    check_others();
  }
  check_tiles<TileUnit>();
  check_random_bits();
  check_bounds();
  if (emulated) check_signals();
  std::printf("values by %s tiles\n", emulated ? "emulated" : "the processor's own");
  return failures() != 0;
}
