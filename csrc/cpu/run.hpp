// The engine on a given table of functions. engine.hpp chooses the table by name; tests bring tables of their own.
#pragma once

#include "cpu/kernels.hpp"

namespace rpsft {

void project_drift(const std::vector<Projection>& items, const Kernels& kernels, int threads);
void pull_back(const std::vector<Pullback>& items, bool accumulate, const Kernels& kernels, int threads);
std::size_t workspace_bytes(std::int64_t rank, const Kernels& kernels, int threads);

}  // namespace rpsft
