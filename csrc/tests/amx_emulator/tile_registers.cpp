// It is compiled with AVX-512, which every processor that runs the engine's kernels for AMX has: its fused
// multiply-adds round as tdpbf16ps does while denormals are off. The model of csrc/tests/tile_model.hpp computes the
// same without them, so that each checks the other.
#include "amx_emulator/tile_registers.hpp"

#include <immintrin.h>

#include <cstring>
#include <initializer_list>

namespace emulator {
namespace {

// Rounding to nearest even, denormal inputs are zero, denormal results become zero, no exceptions: tdpbf16ps neither
// reads nor changes MXCSR.
class ProductRounding {
 public:
  ProductRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8000 | 0x40); }
  ProductRounding(const ProductRounding&) = delete;
  ProductRounding& operator=(const ProductRounding&) = delete;
  ~ProductRounding() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

using Row = std::uint32_t[16];
using Words = std::uint32_t __attribute__((vector_size(64)));

// The first and the second elements of pairs of bfloat16, as float32.
__m512 first_of(Words pairs) { return reinterpret_cast<__m512>(pairs << 16); }
__m512 second_of(Words pairs) { return reinterpret_cast<__m512>(pairs & 0xffff0000u); }

// sums[m][n] += sum over k of the first elements of pairs, and that of the second ones, each summed from zero in order.
__attribute__((noinline)) void multiply(Row* sums, const Row* left, const Row* right, int rows, int pairs,
                                        __mmask16 columns) {
  for (int m = 0; m < rows; ++m) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
      const Words a = left[m][k] - Words{}, b = reinterpret_cast<Words>(_mm512_load_si512(right[k]));
      first = _mm512_fmadd_ps(first_of(a), first_of(b), first);
      second = _mm512_fmadd_ps(second_of(a), second_of(b), second);
    }
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums[m]), _mm512_add_ps(first, second));
    _mm512_store_ps(sums[m], _mm512_maskz_mov_ps(columns, sum));
  }
}

bool any(const unsigned char* begin, const unsigned char* end) {
  for (; begin < end; ++begin)
    if (*begin) return true;
  return false;
}

}  // namespace

const char* TileRegisters::configure(const void* block) {
  unsigned char bytes[64];
  std::memcpy(bytes, block, sizeof bytes);
  if (bytes[0] > 1) return "#GP: a palette that the processor does not have";
  if (bytes[0] == 0) return release(), nullptr;
  if (any(bytes + 2, bytes + 16) || any(bytes + 32, bytes + 48) || any(bytes + 56, bytes + 64))
    return "#GP: reserved bytes of the configuration are not zero";
  Shape shapes[tiles];
  for (int i = 0; i < tiles; ++i) {
    shapes[i] = {bytes[48 + i], bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8};
    if (shapes[i].rows > most_rows || shapes[i].bytes > most_bytes) return "#GP: a tile is larger than the palette's";
    if ((shapes[i].rows == 0) != (shapes[i].bytes == 0)) return "#GP: a tile has rows or columns alone";
  }
  palette_ = 1;
  start_row_ = bytes[1];
  std::memcpy(shapes_, shapes, sizeof shapes);
  std::memset(words_, 0, sizeof words_);
  return nullptr;
}

void TileRegisters::store_configuration(void* block) const {
  unsigned char bytes[64] = {};
  bytes[0] = static_cast<unsigned char>(palette_);
  bytes[1] = static_cast<unsigned char>(start_row_);
  for (int i = 0; i < tiles; ++i) {
    bytes[16 + 2 * i] = static_cast<unsigned char>(shapes_[i].bytes);
    bytes[48 + i] = static_cast<unsigned char>(shapes_[i].rows);
  }
  std::memcpy(block, bytes, sizeof bytes);
}

void TileRegisters::release() {
  palette_ = start_row_ = 0;
  for (Shape& shape : shapes_) shape = {};
  std::memset(words_, 0, sizeof words_);
}

const char* TileRegisters::check(int tile) const {
  if (!configured()) return "#UD: no tiles are configured";
  if (!shapes_[tile].valid()) return "#UD: a tile that the configuration leaves out";
  return nullptr;
}

const char* TileRegisters::check_transfer(int tile) const {
  if (const char* reason = check(tile)) return reason;
  if (shapes_[tile].bytes % 4) return "#UD: rows that are not whole elements";
  if (start_row_ >= shapes_[tile].rows) return "#UD: the start row is beyond the tile";
  return nullptr;
}

const char* TileRegisters::zero(int tile) {
  if (const char* reason = check(tile)) return reason;
  std::memset(words_[tile], 0, sizeof words_[tile]);
  start_row_ = 0;
  return nullptr;
}

const char* TileRegisters::load(int tile, std::uint64_t address, std::uint64_t stride) {
  if (const char* reason = check_transfer(tile)) return reason;
  const Shape shape = shapes_[tile];
  const auto row = static_cast<std::uint64_t>(start_row_);
  std::memset(words_[tile] + row, 0, sizeof words_[tile] - row * most_bytes);
  for (std::uint64_t r = row; r < static_cast<std::uint64_t>(shape.rows); ++r)
    std::memcpy(words_[tile][r], reinterpret_cast<const void*>(address + r * stride),
                static_cast<std::size_t>(shape.bytes));
  start_row_ = 0;
  return nullptr;
}

const char* TileRegisters::store(int tile, std::uint64_t address, std::uint64_t stride) {
  if (const char* reason = check_transfer(tile)) return reason;
  const Shape shape = shapes_[tile];
  for (auto r = static_cast<std::uint64_t>(start_row_); r < static_cast<std::uint64_t>(shape.rows); ++r)
    std::memcpy(reinterpret_cast<void*>(address + r * stride), words_[tile][r], static_cast<std::size_t>(shape.bytes));
  start_row_ = 0;
  return nullptr;
}

const char* TileRegisters::multiply_add(int sums, int left, int right) {
  if (sums == left || sums == right || left == right) return "#UD: two operands are one tile";
  for (int tile : {sums, left, right}) {
    if (const char* reason = check(tile)) return reason;
    if (shapes_[tile].bytes % 4) return "#UD: rows that are not whole elements";
  }
  const Shape c = shapes_[sums], a = shapes_[left], b = shapes_[right];
  if (c.rows != a.rows || a.bytes / 4 != b.rows || c.bytes != b.bytes) return "#UD: shapes that cannot be multiplied";
  const ProductRounding rounding;
  multiply(words_[sums], words_[left], words_[right], a.rows, b.rows,
           static_cast<__mmask16>((1u << (c.bytes / 4)) - 1));
  start_row_ = 0;
  return nullptr;
}

}  // namespace emulator
