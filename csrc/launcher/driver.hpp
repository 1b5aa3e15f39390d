// The part of the CUDA driver's interface that the launcher uses, declared by hand: building needs no CUDA toolkit, and
// importing neither a GPU nor a driver. The driver's library is opened when it is first used.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;

namespace rpsft::cuda {

// In the driver's own header CUresult and the attributes are enums, which are as large as an int.
using CUresult = int;
using CUdevice = int;
using CUcontext = CUctx_st*;
using CUmodule = CUmod_st*;
using CUfunction = CUfunc_st*;
using CUstream = CUstream_st*;

constexpr CUresult success = 0;
constexpr CUresult no_device = 100;

// The image never runs on this device with this driver: CUDA_ERROR_INVALID_IMAGE,
// NO_BINARY_FOR_GPU, INVALID_PTX, JIT_COMPILER_NOT_FOUND, UNSUPPORTED_PTX_VERSION, JIT_COMPILATION_DISABLED.
constexpr CUresult unfit[] = {200, 209, 218, 221, 222, 223};

constexpr int capability_major = 75, capability_minor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int block_shared_optin = 97;  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

constexpr int capture_relaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED, an enum as large as an int

constexpr int function_shared = 1;           // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
constexpr int function_local = 3;            // CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
constexpr int function_registers = 4;        // CU_FUNC_ATTRIBUTE_NUM_REGS
constexpr int function_dynamic_shared = 8;   // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int function_shared_carveout = 9;  // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT

constexpr int jit_error_log = 5, jit_error_log_bytes = 6;  // CU_JIT_ERROR_LOG_BUFFER, ..._SIZE_BYTES

constexpr std::size_t launch_end = 0, launch_buffer = 1, launch_buffer_bytes = 2;  // CU_LAUNCH_PARAM_*

// Every function by the name that the library exports it under.
#define RPSFT_CUDA_CALLS(CALL)                                                                                    \
  CALL(cuInit, unsigned flags)                                                                                    \
  CALL(cuDriverGetVersion, int* version)                                                                          \
  CALL(cuDeviceGet, CUdevice* device, int ordinal)                                                                \
  CALL(cuDeviceGetCount, int* count)                                                                              \
  CALL(cuDeviceGetName, char* name, int size, CUdevice device)                                                    \
  CALL(cuDeviceGetAttribute, int* value, int attribute, CUdevice device)                                          \
  CALL(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)                                             \
  CALL(cuCtxGetCurrent, CUcontext* context)                                                                       \
  CALL(cuCtxPushCurrent_v2, CUcontext context)                                                                    \
  CALL(cuCtxPopCurrent_v2, CUcontext* context)                                                                    \
  CALL(cuThreadExchangeStreamCaptureMode, int* mode)                                                              \
  CALL(cuModuleLoadDataEx, CUmodule* module, const void* image, unsigned options, int* names, void** values)      \
  CALL(cuModuleUnload, CUmodule module)                                                                           \
  CALL(cuModuleGetFunction, CUfunction* function, CUmodule module, const char* name)                              \
  CALL(cuFuncSetAttribute, CUfunction function, int attribute, int value)                                         \
  CALL(cuFuncGetAttribute, int* value, int attribute, CUfunction function)                                        \
  CALL(cuLaunchKernel, CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,  \
       unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra)     \
  CALL(cuGetErrorName, CUresult result, const char** name)                                                        \
  CALL(cuGetErrorString, CUresult result, const char** words)

struct Calls {
#define RPSFT_CUDA_MEMBER(name, ...) CUresult (*name)(__VA_ARGS__) = nullptr;
  RPSFT_CUDA_CALLS(RPSFT_CUDA_MEMBER)
#undef RPSFT_CUDA_MEMBER
};

// The device and kernel that a call is made for, where there are any yet: the message of its failure names them.
struct Subject {
  int device = -1;
  const std::string* kernel = nullptr;
};

// A failure with one of `unfit`: another image of the same kernel may run.
class LoadError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The driver of this process, opened. Its functions are called as members; check() turns what they return into
// exceptions.
class Driver : public Calls {
 public:
  // libcuda.so.1, or the library that the environment variable RPSFT_CUDA_DRIVER names. Throws std::runtime_error where
  // it cannot be opened or lacks a function; the next call tries again.
  static Driver& get();

  // Throws std::runtime_error for anything but success, of the kind LoadError for `unfit`. `call` is the function's
  // name; `detail` is added to the driver's description of the result. Any call may find an image unfit: a driver that
  // loads lazily looks at it as late as at its launch.
  void check(CUresult result, const char* call, const Subject& subject, const std::string& detail = "") const;

  CUdevice device(int ordinal, const Subject& subject) const;

  // The context that the CUDA runtime, and so torch, works in. It is retained once per device and never released: torch
  // keeps it as long.
  CUcontext primary_context(const Subject& subject);

 private:
  Driver();

  std::string describe(const Subject& subject) const;

  std::mutex mutex_;
  std::map<int, CUcontext> contexts_;
};

// The driver's CUDA version times 1000: 12040 is 12.4.
int driver_version();

// 0 where there is a driver that finds no GPU.
int device_count();

std::string device_name(int ordinal);
std::pair<int, int> compute_capability(int ordinal);

// Bytes of shared memory that a block may have at most, where its kernel asks for more than the plain 48 KiB.
int shared_memory_per_block(int ordinal);

}  // namespace rpsft::cuda
