// The kernels for matrix units with the vectors of AVX512-BF16, as AMX has them, and a model of the tile registers.
#include "amx_model.hpp"
#include "cpu/amx/tiled_kernels.hpp"
#include "cpu/isa/avx512_pairs.hpp"
#include "tile_model.hpp"

rpsft::Kernels modelled_avx512() {
  return TiledKernels<TileModel, Bfloat16Pair, rpsft::avx512_bf16_kernels>::table("amx_bf16 (a model, AVX512-BF16)");
}
