// The kernels for matrix units with a model of the tile registers, against double precision: the templates that an AMX
// processor runs. Once with vectors in plain C++, once with those that AMX has beside it, where the processor has them.
#include "amx_model.hpp"
#include "cpu/amx/tiled_kernels.hpp"
#include "engine_cases.hpp"
#include "portable_pairs.hpp"
#include "tile_model.hpp"

namespace {

rpsft::Kernels modelled_portable() {
  return TiledKernels<TileModel, PortablePair, rpsft::portable_kernels>::table("amx_bf16 (a model, plain C++)");
}

// Blocks and chunks have other sizes where the longer basis is large, and again at large ranks.
void check_sizes(const Subject& engine) {
  for (int i = 2; i < 6; ++i)
    for (int form = 0; form < 2; ++form) check(large_case(i, form), engine);
  const Dtype half = Dtype::bfloat16, single = Dtype::float32;
  check({290, 1990, 270, half, half, half, half, 0, 0}, engine);
  check({1990, 290, 270, single, half, half, single, 0, 0}, engine);
  check({450, 470, 440, half, half, half, half, 0, 0}, engine);
}

// Whole strips, in place and contiguous: the way of real layers.
void check_whole(const Subject& engine) {
  for (Dtype weight : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
    for (Dtype base : {Dtype::bfloat16, Dtype::float32})
      for (auto [rows, cols] : {std::pair<std::int64_t, std::int64_t>{128, 448}, {448, 128}})
        for (bool add : {true, false})
          check({rows, cols, 64, weight, base, Dtype::bfloat16, weight, 0, 0, 0, 0, add}, engine);
  // One less and one more than whole.
  for (std::int64_t rank : {31, 32, 33, 63, 65})
    for (auto [rows, cols] : {std::pair<std::int64_t, std::int64_t>{97, 127}, {129, 95}})
      check({rows, cols, rank, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, 0, 0}, engine);
}

std::vector<float> drift_of(const Subject& engine, std::int64_t rows, std::int64_t cols, std::int64_t rank) {
  generator.seed(7);
  Held weight = random(rows, cols, 0.1), base = random(rows, cols, 0.1);
  Held left = random(rows, rank, 0.1), right = random(cols, rank, 0.1);
  for (Held* each : {&weight, &base, &left, &right}) lay_out(*each, Dtype::bfloat16, 0);
  std::vector<float> drift(rank * rank + 1);
  rpsft::Projection projection;
  projection.weight = weight.matrix;
  projection.base = base.matrix;
  projection.left = left.matrix;
  projection.right = right.matrix;
  projection.drift = drift.data();
  projection.square = &drift.back();
  engine.project({projection}, 2);
  return drift;
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
  for (auto [rows, cols, rank] : {std::array<std::int64_t, 3>{96, 160, 64}, {170, 90, 45}}) {
    const std::vector<float> plain = drift_of(engines.front(), rows, cols, rank);
    for (const Subject& engine : engines)
      CHECK(drift_of(engine, rows, cols, rank) == plain, "%s: other bits than in plain C++", engine.name.c_str());
  }
  return failures() != 0;
}
