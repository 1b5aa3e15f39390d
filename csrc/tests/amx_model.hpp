// Tables of functions for matrix units whose tile registers are a model's.
#pragma once

#include "cpu/kernels.hpp"

// Only for processors that have AVX512-BF16.
rpsft::Kernels modelled_avx512();
