// The tile registers of a thread and what Intel's Software Developer's Manual says that instructions do with them, for
// palette 1: eight tiles of at most 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace emulator {

// Functions return why the processor raises an exception, and then change nothing; null if they did their work.
class TileRegisters {
 public:
  const char* configure(const void* block);       // LDTILECFG, 64 bytes; palette 0 releases
  void store_configuration(void* block) const;    // STTILECFG
  void release();                                 // TILERELEASE
  const char* zero(int tile);                     // TILEZERO
  // Row r of a tile is at address + r * stride.
  const char* load(int tile, std::uint64_t address, std::uint64_t stride);         // TILELOADD, TILELOADDT1
  const char* store(int tile, std::uint64_t address, std::uint64_t stride);        // TILESTORED
  const char* multiply_add(int sums, int left, int right);                         // TDPBF16PS

  bool configured() const { return palette_ != 0; }

 private:
  static constexpr int tiles = 8, most_rows = 16, most_bytes = 64;
  struct Shape {
    int rows = 0, bytes = 0;
    bool valid() const { return rows != 0; }
  };

  const char* check(int tile) const;
  const char* check_transfer(int tile) const;

  int palette_ = 0, start_row_ = 0;
  Shape shapes_[tiles];
  // Beyond a tile's rows and columns there are zeros.
  alignas(64) std::uint32_t words_[tiles][most_rows][most_bytes / 4] = {};
};

}  // namespace emulator
