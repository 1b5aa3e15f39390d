// The engine with amx_bf16 as it is compiled, from end to end, against double precision. Where the processor has no
// AMX, its instructions are emulated; where it has, this is the processor's own work.
#include "amx_cases.hpp"
#include "amx_emulator/trap.hpp"
#include "amx_model.hpp"
#include "cpu/amx/permission.hpp"

namespace {

const char* const isa = "amx_bf16";
bool emulated;

// The engine, with a look at the threads' tiles after each call.
Subject watched() {
  const Subject engine = subject(isa);
  const auto released = [](const char* what) {
    CHECK(emulator::threads_with_tiles() == 0, "%s: %d threads kept their tiles", what,
          emulator::threads_with_tiles());
  };
  return {engine.name, engine.pairs,
          [=](const auto& items, int threads) {
            engine.project(items, threads);
            released("project");
          },
          [=](const auto& items, bool add, int threads) {
            engine.pull_back(items, add, threads);
            released("pull_back");
          }};
}

// The same arithmetic, done by templates on a model of the tiles and by machine code: the same bits.
void check_bits(const Subject& engine) {
  const Subject model = subject(modelled_avx512(), true);
  for (const Case& c : cases_of_bits())
    CHECK(bits_of(engine, c) == bits_of(model, c), "%s: other bits than the model's", c.text().c_str());
}

emulator::Counts since(const emulator::Counts& then) {
  const emulator::Counts now = emulator::counts();
  return {now.configurations - then.configurations, now.releases - then.releases, now.zeros - then.zeros,
          now.loads - then.loads, now.stores - then.stores, now.products - then.products};
}

void expect(const char* what, const emulator::Counts& got, const emulator::Counts& wanted) {
  const auto list = [](const emulator::Counts& c) {
    return std::array<std::int64_t, 6>{c.configurations, c.releases, c.zeros, c.loads, c.stores, c.products};
  };
  const auto a = list(got), b = list(wanted);
  for (std::size_t i = 0; i < a.size(); ++i)
    CHECK(a[i] == b[i], "%s: number %d of configurations, releases, zeros, loads, stores, products is %lld, expected "
          "%lld", what, int(i), static_cast<long long>(a[i]), static_cast<long long>(b[i]));
}

// Instructions of both operations, from the equations. No more than these: each is paid for in cycles.
void check_counts(const Subject& engine) {
  // Four blocks of 64 rows, two chunks of 320 columns, two panels of 32 directions: whole tiles everywhere.
  constexpr std::int64_t m = 256, n = 640, k = 64, chunks = 2, blocks = 4;
  Held weight = random(m, n, 0.1), base = random(m, n, 0.1), grad = random(m, n, 0.1);
  Held left = random(m, k, 0.1), right = random(n, k, 0.1);
  for (Held* each : {&weight, &base, &grad, &left, &right}) lay_out(*each, Dtype::bfloat16, 0);
  std::vector<float> drift(k * k);
  float square = 0;
  rpsft::Projection projection;
  projection.weight = weight.matrix;
  projection.base = base.matrix;
  projection.left = left.matrix;
  projection.right = right.matrix;
  projection.drift = drift.data();
  projection.square = &square;
  rpsft::Pullback pullback;
  pullback.grad = grad.matrix;
  pullback.left = left.matrix;
  pullback.right = right.matrix;
  pullback.drift = drift.data();
  pullback.scale = 1;

  constexpr std::int64_t product = 16 * 16 * 32, sums = 32 * 32 / 4;
  // One load per product, and each tile of sums is zeroed or loaded when it begins, and stored when it ends.
  constexpr std::int64_t first = m * n * k / product, second = m * k * k / product;
  constexpr std::int64_t slice = m * k / sums, fold = blocks * k * k / sums;
  for (int threads : {1, 2}) {
    emulator::Counts before = emulator::counts();
    engine.project({projection}, threads);
    expect("project", since(before),
           {threads, threads, slice, first + second + (chunks - 1) * slice + fold, chunks * slice + fold,
            first + second});
    before = emulator::counts();
    engine.pull_back({pullback}, true, threads);
    constexpr std::int64_t tiles = (m * k + m * n) / sums;
    expect("pull_back", since(before), {threads, threads, tiles, second + first, tiles, second + first});
  }
  // Tiles are configured once per call, not once per weight.
  const emulator::Counts before = emulator::counts();
  engine.project({projection, projection, projection}, 1);
  engine.pull_back({pullback, pullback}, false, 1);
  CHECK(since(before).configurations == 2, "%lld configurations in two calls",
        static_cast<long long>(since(before).configurations));
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  emulated = !rpsft::amx::this_system().tiles;
  const std::vector<std::string> usable = rpsft::instruction_sets();
  if (!std::count(usable.begin(), usable.end(), isa)) {
    for (const rpsft::MissingInstructionSet& each : rpsft::missing_instruction_sets())
      if (each.name == isa) std::printf("%s: not tested, %s\n", isa, each.reason.c_str());
    return 0;
  }
  const Subject engine = watched();
  check_bits(engine);
  if (emulated) check_counts(engine);
  check_empty(engine);
  for (int i = 0; i < cases; ++i) check(random_case(), engine);
  check_whole(engine);
  check_sizes(engine);
  const emulator::Counts all = emulator::counts();
  CHECK(all.configurations == all.releases, "%lld configurations, %lld releases",
        static_cast<long long>(all.configurations), static_cast<long long>(all.releases));
  CHECK(!emulated || all.products > 0, "nothing was emulated");
  std::printf("%s on %s tiles: %d random cases; %lld products, %lld loads, %lld stores\n", isa,
              emulated ? "emulated" : "the processor's own", cases, static_cast<long long>(all.products),
              static_cast<long long>(all.loads), static_cast<long long>(all.stores));
  return failures() != 0;
}
