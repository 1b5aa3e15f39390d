// Every instruction set that this machine has, against double precision.
#include "engine_cases.hpp"

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 150;
  for (const std::string& isa : rpsft::instruction_sets()) {
    const Subject engine = subject(isa);
    check_empty(engine);
    for (int i = 0; i < cases; ++i) check(random_case(), engine);
    for (int i = 0; i < 6; ++i)
      for (int form = 0; form < 2; ++form) check(large_case(i, form), engine);
    // At this rank pull_back needs a larger workspace for pairs of bfloat16 than for float32.
    check({448, 420, 256, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, 0, 0}, engine);
    check({300, 260, 130, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, Dtype::bfloat16, 0, 0}, engine);
    check({210, 900, 64, Dtype::float32, Dtype::bfloat16, Dtype::bfloat16, Dtype::float32, 0, 0}, engine);
    check({900, 210, 64, Dtype::float32, Dtype::bfloat16, Dtype::bfloat16, Dtype::float32, 0, 0}, engine);
    std::printf("%s: %d random cases\n", isa.c_str(), cases);
  }
  for (const rpsft::MissingInstructionSet& each : rpsft::missing_instruction_sets()) {
    std::printf("%s: not tested, %s\n", each.name.c_str(), each.reason.c_str());
    try {
      rpsft::project_drift({}, each.name, 1);
      CHECK(false, "%s must be refused", each.name.c_str());
    } catch (const std::invalid_argument& error) {
      CHECK(std::string(error.what()).find(each.reason) != std::string::npos, "%s", error.what());
    }
  }
  try {
    rpsft::project_drift({}, "none", 1);
    CHECK(false, "an unknown instruction set must be refused");
  } catch (const std::invalid_argument&) {
  }
  return failures() != 0;
}
