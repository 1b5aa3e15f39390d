#include "amx_emulator/instruction.hpp"

#include <cstring>

namespace emulator {
namespace {

// The three bytes of a long VEX prefix. The processor stores R, X, B and vvvv inverted.
struct Vex {
  bool r, x, b, w, wide;
  unsigned map, unused, vvvv, prefix;

  explicit Vex(const unsigned char* code)
      : r(!(code[1] & 0x80)),
        x(!(code[1] & 0x40)),
        b(!(code[1] & 0x20)),
        w(code[2] & 0x80),
        wide(code[2] & 4),
        map(code[1] & 0x1f),
        unused(code[2] >> 3 & 15),
        vvvv(~code[2] >> 3 & 15),
        prefix(code[2] & 3) {}
};

enum Prefix { no_prefix, prefix_66, prefix_f3, prefix_f2 };

std::int32_t displacement(const unsigned char* at, int bytes) {
  if (bytes == 1) return static_cast<signed char>(*at);
  std::int32_t value = 0;
  std::memcpy(&value, at, static_cast<std::size_t>(bytes));
  return value;
}

// The memory operand after the byte ModRM at code[4]: its address in parts, as TILELOADD takes them apart.
struct Memory {
  std::uint64_t base = 0, index = 0;
  int length = 0;  // of the instruction
  bool sib = false;

  Memory(const unsigned char* code, const Vex& vex, const Registers& registers) {
    const unsigned modrm = code[4], mod = modrm >> 6, rm = modrm & 7;
    const unsigned char* next = code + 5;
    sib = rm == 4;
    bool has_base = true, next_instruction = false;
    unsigned base_register = rm;
    if (sib) {
      const unsigned byte = *next++, scale = byte >> 6, number = (byte >> 3 & 7) | (vex.x ? 8u : 0u);
      base_register = byte & 7;
      if (number != 4) index = registers.of[number] << scale;
      has_base = base_register != 5 || mod != 0;
    } else if (mod == 0 && rm == 5) {
      has_base = false;
      next_instruction = true;
    }
    const int bytes = mod == 1 ? 1 : mod == 2 || !has_base ? 4 : 0;
    if (has_base) base = registers.of[base_register | (vex.b ? 8u : 0u)];
    base += static_cast<std::uint64_t>(static_cast<std::int64_t>(displacement(next, bytes)));
    length = static_cast<int>(next - code) + bytes;
    if (next_instruction) base += reinterpret_cast<std::uint64_t>(code) + static_cast<std::uint64_t>(length);
  }
};

// Opcode 49.
void configuration(Instruction& found, const unsigned char* code, const Vex& vex, const Registers& registers) {
  const unsigned modrm = code[4], mod = modrm >> 6, number = modrm >> 3 & 7;
  if (mod == 3) {
    found.length = 5;
    if (vex.prefix == no_prefix && modrm == 0xc0) found.operation = Operation::tilerelease;
    if (vex.prefix == prefix_f2 && (modrm & 7) == 0) {
      found.operation = Operation::tilezero;
      found.tile = static_cast<int>(number);
      if (vex.r) found.malformed = "a tile beyond tmm7";
    }
    return;
  }
  if (number != 0 || vex.prefix > prefix_66) return;
  found.operation = vex.prefix == no_prefix ? Operation::ldtilecfg : Operation::sttilecfg;
  const Memory memory(code, vex, registers);
  found.length = memory.length;
  found.address = memory.base + memory.index;
}

// Opcode 4b.
void transfer(Instruction& found, const unsigned char* code, const Vex& vex, const Registers& registers) {
  const unsigned modrm = code[4];
  if (vex.prefix == no_prefix || modrm >> 6 == 3) return;
  // With the prefix 66 it is TILELOADDT1: the same, with a hint that the data is not needed again.
  found.operation = vex.prefix == prefix_f3 ? Operation::tilestored : Operation::tileloadd;
  found.tile = static_cast<int>(modrm >> 3 & 7);
  const Memory memory(code, vex, registers);
  found.length = memory.length;
  found.address = memory.base;
  found.stride = memory.index;
  if (vex.r) found.malformed = "a tile beyond tmm7";
  if (!memory.sib) found.malformed = "an address without the byte SIB";
}

// Opcode 5c.
void product(Instruction& found, const unsigned char* code, const Vex& vex) {
  const unsigned modrm = code[4];
  if (vex.prefix != prefix_f3 || modrm >> 6 != 3) return;
  found.operation = Operation::tdpbf16ps;
  found.length = 5;
  found.tile = static_cast<int>(modrm >> 3 & 7);
  found.left = static_cast<int>(modrm & 7);
  found.right = static_cast<int>(vex.vvvv & 7);
  if (vex.r || vex.b || vex.vvvv > 7) found.malformed = "a tile beyond tmm7";
}

}  // namespace

Instruction decode(const unsigned char* code, const Registers& registers) {
  Instruction found;
  if (code[0] != 0xc4) return found;
  const Vex vex(code);
  if (vex.map != 2) return found;  // 0F38
  if (code[3] == 0x49) configuration(found, code, vex, registers);
  if (code[3] == 0x4b) transfer(found, code, vex, registers);
  if (code[3] == 0x5c) product(found, code, vex);
  if (found.operation == Operation::none) return found;
  if (vex.w || vex.wide) found.malformed = "VEX.W or VEX.L is set";
  if (found.operation != Operation::tdpbf16ps && vex.unused != 15) found.malformed = "VEX.vvvv names a register";
  return found;
}

}  // namespace emulator
