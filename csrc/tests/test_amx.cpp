// The kernels for matrix units with a model of the tile registers, against double precision: the templates that an AMX
// processor runs. Once with vectors in plain C++, once with those that AMX has beside it, where the processor has them.
#include "amx_cases.hpp"
#include "amx_model.hpp"
#include "cpu/amx/tiled_kernels.hpp"
#include "portable_pairs.hpp"
#include "tile_model.hpp"

namespace {

rpsft::Kernels modelled_portable() {
  return TiledKernels<TileModel, PortablePair, rpsft::portable_kernels>::table("amx_bf16 (a model, plain C++)");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 150;
  std::vector<Subject> engines{subject(modelled_portable(), true)};
#if defined(RPSFT_HAS_AMX_MODEL_AVX512)
  const std::vector<std::string> here = rpsft::instruction_sets();
  if (std::count(here.begin(), here.end(), "avx512_bf16")) {
    engines.push_back(subject(modelled_avx512(), true));
  } else {
    std::printf("amx_bf16 (a model, AVX512-BF16): not tested, this processor has no AVX512-BF16\n");
  }
#endif
  for (const Subject& engine : engines) {
    check_empty(engine);
    for (int i = 0; i < cases; ++i) check(random_case(), engine);
    // Not where a few cases are asked for: an emulator takes many minutes for these.
    if (cases >= 30) check_whole(engine);
    // The quicker of both.
    if (cases >= 100 && &engine == &engines.back()) check_sizes(engine);
    std::printf("%s: %d random cases\n", engine.name.c_str(), cases);
  }
  // Vectors only pack: they round as each other do.
  for (const Case& c : cases_of_bits()) {
    const std::vector<unsigned char> plain = bits_of(engines.front(), c);
    for (const Subject& engine : engines)
      CHECK(bits_of(engine, c) == plain, "%s: other bits than in plain C++: %s", engine.name.c_str(), c.text().c_str());
  }
  return failures() != 0;
}
