// Counts the instructions of AMX that the engine executes for a bfloat16 weight in base form, emulated, on one thread:
//
//   count_amx ROWS COLUMNS RANK
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "amx_emulator/trap.hpp"
#include "cpu/amx/permission.hpp"
#include "cpu/engine.hpp"

namespace {

void print(const char* operation, const emulator::Counts& before) {
  const emulator::Counts now = emulator::counts();
  std::printf("%-9s %10lld products %10lld loads %9lld stores %9lld zeros %3lld configurations\n", operation,
              static_cast<long long>(now.products - before.products), static_cast<long long>(now.loads - before.loads),
              static_cast<long long>(now.stores - before.stores), static_cast<long long>(now.zeros - before.zeros),
              static_cast<long long>(now.configurations - before.configurations));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "count_amx ROWS COLUMNS RANK\n");
    return 2;
  }
  if (rpsft::amx::this_system().tiles) {
    std::fprintf(stderr, "this processor has AMX: its instructions are not emulated, and not counted\n");
    return 1;
  }
  const std::int64_t rows = std::atoll(argv[1]), cols = std::atoll(argv[2]), rank = std::atoll(argv[3]);
  const auto matrix = [](std::vector<std::uint16_t>& memory, std::int64_t height, std::int64_t width) {
    memory.assign(static_cast<std::size_t>(height * width), 0);
    return rpsft::Matrix{memory.data(), rpsft::Dtype::bfloat16, height, width, width, 1};
  };
  std::vector<std::uint16_t> weight, base, grad, left, right;
  std::vector<float> drift(static_cast<std::size_t>(rank * rank));
  float square = 0;
  rpsft::Projection projection;
  projection.weight = matrix(weight, rows, cols);
  projection.base = matrix(base, rows, cols);
  projection.left = matrix(left, rows, rank);
  projection.right = matrix(right, cols, rank);
  projection.drift = drift.data();
  projection.square = &square;
  rpsft::Pullback pullback;
  pullback.grad = matrix(grad, rows, cols);
  pullback.left = projection.left;
  pullback.right = projection.right;
  pullback.drift = drift.data();
  pullback.scale = 1;
  emulator::Counts before = emulator::counts();
  rpsft::project_drift({projection}, "amx_bf16", 1);
  print("project", before);
  before = emulator::counts();
  rpsft::pull_back({pullback}, true, "amx_bf16", 1);
  print("pull_back", before);
  return 0;
}
