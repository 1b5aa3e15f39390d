// Compiles only if launcher/driver.hpp agrees with the driver's own header, which must be on the include path.
#include "launcher/driver.hpp"

#include <cuda.h>

#include <type_traits>

namespace {

namespace own = rpsft::cuda;

// Passed the same way: the same type, or numbers of the same size (the header's enums are ints here).
template <class One, class Other>
constexpr bool same() {
  constexpr bool numbers = std::is_scalar_v<One> && std::is_scalar_v<Other>;
  if constexpr (std::is_same_v<One, Other>) return true;
  if constexpr (std::is_pointer_v<One> && std::is_pointer_v<Other>)
    return same<std::remove_pointer_t<One>, std::remove_pointer_t<Other>>();
  else if constexpr (numbers && !std::is_pointer_v<One> && !std::is_pointer_v<Other>)
    return sizeof(One) == sizeof(Other);
  return false;
}

template <class... P, class R, class... Q>
constexpr bool same_function(own::CUresult (*)(P...), R (*)(Q...)) {
  if constexpr (sizeof...(P) == sizeof...(Q)) return same<own::CUresult, R>() && (same<P, Q>() && ...);
  return false;
}

#define RPSFT_CUDA_SAME(name, ...) \
  static_assert(same_function(decltype(own::Calls::name)(nullptr), decltype(&::name)(nullptr)), #name " differs");
RPSFT_CUDA_CALLS(RPSFT_CUDA_SAME)

static_assert(own::success == CUDA_SUCCESS);
static_assert(own::no_device == CUDA_ERROR_NO_DEVICE);
static_assert(own::capability_major == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(own::capability_minor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(own::block_shared_optin == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(own::capture_relaxed == CU_STREAM_CAPTURE_MODE_RELAXED && sizeof(CUstreamCaptureMode) == sizeof(int));
static_assert(own::unfit[0] == CUDA_ERROR_INVALID_IMAGE && own::unfit[1] == CUDA_ERROR_NO_BINARY_FOR_GPU);
static_assert(own::unfit[2] == CUDA_ERROR_INVALID_PTX && own::unfit[3] == CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
static_assert(own::unfit[4] == CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
static_assert(own::unfit[5] == CUDA_ERROR_JIT_COMPILATION_DISABLED);
static_assert(own::function_shared == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
static_assert(own::function_local == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
static_assert(own::function_registers == CU_FUNC_ATTRIBUTE_NUM_REGS);
static_assert(own::function_dynamic_shared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(own::function_shared_carveout == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT);
static_assert(own::jit_error_log == CU_JIT_ERROR_LOG_BUFFER);
static_assert(own::jit_error_log_bytes == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES);
static_assert(own::launch_end == CU_LAUNCH_PARAM_END_AS_INT);
static_assert(own::launch_buffer == CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT);
static_assert(own::launch_buffer_bytes == CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT);

}  // namespace
