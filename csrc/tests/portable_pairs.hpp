// Words of bfloat16 pairs in plain C++, so that kernels for matrix units can be tested on any processor.
#pragma once

#include "cpu/isa/portable_lanes.hpp"
#include "cpu/word.hpp"

namespace {

struct PortablePair {
  using Lanes = PortableLanes;
  using Vector = Lanes::Vector;
  static constexpr int elements = 2;

  static std::uint32_t make(float first, float second) {
    Bfloat16 low, high;
    narrow(first, low);
    narrow(second, high);
    return static_cast<std::uint32_t>(high.bits) << 16 | low.bits;
  }

  static void along(Vector row, std::uint32_t* words) {
    for (int i = 0; i < Lanes::width; i += 2) words[i / 2] = make(row.lane[i], row.lane[i + 1]);
  }

  static void across(Vector first, Vector second, std::uint32_t* words) {
    for (int i = 0; i < Lanes::width; ++i) words[i] = make(first.lane[i], second.lane[i]);
  }

  static void pair(const Bfloat16* first, const Bfloat16* second, std::uint32_t* words) {
    for (int i = 0; i < Lanes::width; ++i)
      words[i] = static_cast<std::uint32_t>(second[i].bits) << 16 | first[i].bits;
  }

  static void interleave(const Bfloat16* first, const Bfloat16* second, std::uint32_t* words) {
    pair(first, second, words);
    pair(first + Lanes::width, second + Lanes::width, words + Lanes::width);
  }
};

}  // namespace
