// AMX: tiles of bfloat16 pairs (tdpbf16ps). Vectors, and what has no such products, are AVX512-BF16's.
//
// Written where no processor with AMX was at hand: the same templates run with a model of the tile registers
// (csrc/tests/tile_model.hpp), and what is compiled here with an emulator of the instructions (csrc/tests/amx_emulator).
// It never ran on AMX.
#include "cpu/amx/tile_unit.hpp"
#include "cpu/amx/tiled_kernels.hpp"
#include "cpu/isa/avx512_pairs.hpp"

namespace rpsft {

Kernels amx_bf16_kernels() {
  return TiledKernels<TileUnit, Bfloat16Pair, avx512_bf16_kernels>::table("amx_bf16");
}

}  // namespace rpsft
