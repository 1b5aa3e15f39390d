// A stand-in for libcuda.so.1 in tests: devices that compute nothing, strict about contexts, with a record of every
// call. RPSFT_CUDA_DRIVER names it; tests also open it themselves and call the stub_ functions.
//
// An image is any text, or an ELF file. One that begins with "bad" does not load, and the compiler's log says why; a
// module has the entries whose names its image contains, and `registers=`, `local=` and `shared=` in it are what its
// functions take. PTX is text that begins with ".version" or "//".
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "launcher/driver.hpp"

using namespace rpsft::cuda;

#define STUB extern "C" __attribute__((visibility("default")))

struct CUctx_st {
  int device;
};
struct CUfunc_st {
  CUmodule owner;
  std::map<int, int> attributes;
};
struct CUmod_st {
  CUcontext context;
  std::string image;
  bool loaded;
};

namespace {

constexpr CUresult invalid_value = 1, not_initialized = 3, invalid_device = 101, invalid_context = 201;
constexpr CUresult invalid_ptx = 218, not_found = 500, launch_timeout = 702, capture_unsupported = 900;
constexpr int most_shared = 232448;

struct Error {
  CUresult result;
  const char *name, *words;
};

constexpr Error errors[] = {
    {invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {no_device, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {invalid_ptx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {221, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND", "PTX JIT compiler library not found"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {223, "CUDA_ERROR_JIT_COMPILATION_DISABLED", "PTX JIT compilation was disabled"},
    {not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {launch_timeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
};

CUctx_st primaries[] = {{0}, {1}, {2}};
constexpr int devices = sizeof primaries / sizeof *primaries;

std::mutex mutex;  // of everything below that is not thread_local
std::condition_variable meeting;
std::map<std::string, CUresult> forced;
std::deque<CUmod_st> modules;
std::deque<CUfunc_st> functions;
std::string lines;
int threads = 0, expected = 1, inside = 0;
bool initialized = false, capturing = false;
CUresult ptx_result = success;

thread_local std::vector<CUcontext> stack;
thread_local int thread = -1, capture_mode = 0;

std::string quoted(const std::string& text) { return '"' + text + '"'; }

std::string field(const char* name, const std::string& value) { return ", " + quoted(name) + ": " + value; }

template <class Number>
std::string field(const char* name, Number value) {
  return field(name, std::to_string(value));
}

std::string hex(const void* data, std::size_t bytes) {
  std::string text;
  for (std::size_t i = 0; i < bytes; ++i) {
    const unsigned char byte = static_cast<const unsigned char*>(data)[i];
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return quoted(text);
}

std::uint64_t fnv1a(const std::string& bytes) {
  std::uint64_t hash = 14695981039346656037u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  return hash;
}

// The mutex is held from here on, as long as the object lives.
class Call {
 public:
  explicit Call(const char* name) : lock_(mutex), name_(name) {
    if (thread < 0) thread = threads++;
  }

  CUresult end(CUresult result, const std::string& fields = "") {
    lines += '{' + quoted("call") + ": " + quoted(name_) + field("result", result) + field("thread", thread) + fields +
             "}\n";
    return result;
  }

  // The result that this call is to fail with.
  CUresult told() const {
    const auto found = forced.find(name_);
    return found != forced.end() ? found->second : success;
  }

  // That result, or the one that follows from the state that the call is made in.
  CUresult wrong(bool in_context = false) const {
    if (const CUresult result = told()) return result;
    if (!initialized) return not_initialized;
    return in_context && stack.empty() ? invalid_context : success;
  }

  bool wait_until_met() {
    ++inside;
    meeting.notify_all();
    // Arrivals stay counted, because threads that wake up late must see them too.
    return meeting.wait_for(lock_, std::chrono::seconds(20), [] { return inside >= expected; });
  }

 private:
  std::unique_lock<std::mutex> lock_;
  const char* name_;
};

int number_in(const std::string& image, const char* key) {
  const std::size_t at = image.find(key);
  return at == std::string::npos ? 0 : std::atoi(image.c_str() + at + std::strlen(key));
}

// The driver is not told how long an image is: the headers of an ELF file say so, and text ends with a 0.
std::string whole(const char* image) {
  if (std::strncmp(image, "\x7f""ELF", 4) != 0) return image;
  const auto number = [&](std::size_t at, std::size_t size) {
    std::uint64_t value = 0;
    std::memcpy(&value, image + at, size);
    return value;
  };
  // Fields of a 64-bit file: e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum; of a section its type and
  // extent.
  const std::uint64_t sections = number(0x28, 8), section_size = number(0x3a, 2), count = number(0x3c, 2);
  std::uint64_t end = std::max(sections + section_size * count, number(0x20, 8) + number(0x36, 2) * number(0x38, 2));
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t at = sections + section_size * i;
    constexpr std::uint64_t occupies_nothing = 8;  // SHT_NOBITS
    if (number(at + 4, 4) != occupies_nothing) end = std::max(end, number(at + 0x18, 8) + number(at + 0x20, 8));
  }
  return std::string(image, end);
}

bool is_ptx(const std::string& image) {
  return image.compare(0, 8, ".version") == 0 || image.compare(0, 2, "//") == 0;
}

CUresult say(CUresult result, const char* Error::*which, const char** text) {
  for (const Error& error : errors)
    if (error.result == result) {
      *text = error.*which;
      return success;
    }
  *text = nullptr;
  return invalid_value;
}

}  // namespace

// -- control ---------------------------------------------------------------------------------------------------

// Forgets calls, forced failures and meetings; not contexts and modules.
STUB void stub_reset() {
  const std::lock_guard<std::mutex> lock(mutex);
  forced.clear();
  lines.clear();
  inside = 0;
  expected = 1;
  capturing = false;
  ptx_result = success;
}

// Sets whether a stream is being captured: forbidden calls then fail in threads whose mode is not the relaxed one.
STUB void stub_capture(int whether) {
  const std::lock_guard<std::mutex> lock(mutex);
  capturing = whether != 0;
}

// Returns the calling thread's mode of capture, which is 0 at first.
STUB int stub_capture_mode() { return capture_mode; }

// Makes every load of PTX fail with `result`; 0 ends that. Machine code still loads.
STUB void stub_fail_ptx(int result) {
  const std::lock_guard<std::mutex> lock(mutex);
  ptx_result = result;
}

// Makes every `call` fail with `result`; 0 ends that.
STUB void stub_fail(const char* call, int result) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (result != success)
    forced[call] = result;
  else
    forced.erase(call);
}

// Makes each launch wait until this many have begun, and fail if they have not within 20 seconds.
STUB void stub_meet(int launches) {
  const std::lock_guard<std::mutex> lock(mutex);
  inside = 0;
  expected = launches;
}

// Writes one line of JSON per call since the last reset, as much as fits with a final 0. Returns the bytes of all.
STUB int stub_log(char* text, int size) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (size > 0) {
    const std::size_t copied = std::min(lines.size(), static_cast<std::size_t>(size - 1));
    std::memcpy(text, lines.data(), copied);
    text[copied] = '\0';
  }
  return static_cast<int>(lines.size());
}

// Contexts on the calling thread's stack, and the device of the one on top; -1: there is none.
STUB int stub_depth() { return static_cast<int>(stack.size()); }
STUB int stub_current() { return stack.empty() ? -1 : stack.back()->device; }

// -- the driver ------------------------------------------------------------------------------------------------

STUB CUresult cuInit(unsigned) {
  Call call("cuInit");
  if (const CUresult result = call.told()) return call.end(result);
  initialized = true;
  return call.end(success);
}

STUB CUresult cuDriverGetVersion(int* version) {
  Call call("cuDriverGetVersion");
  *version = 12040;
  return call.end(call.told());
}

STUB CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  Call call("cuDeviceGet");
  if (const CUresult result = call.wrong()) return call.end(result);
  if (ordinal < 0 || ordinal >= devices) return call.end(invalid_device);
  // A handle differs from its ordinal, so that a launcher that mixes them up fails.
  *device = ordinal + 100;
  return call.end(success, field("device", ordinal));
}

STUB CUresult cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount");
  *count = devices;
  return call.end(call.wrong());
}

STUB CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  Call call("cuDeviceGetName");
  if (const CUresult result = call.wrong()) return call.end(result);
  const std::string text = "Stub GPU " + std::to_string(device - 100);
  if (size <= static_cast<int>(text.size())) return call.end(invalid_value);
  std::strcpy(name, text.c_str());
  return call.end(success, field("device", device - 100));
}

STUB CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  Call call("cuDeviceGetAttribute");
  if (const CUresult result = call.wrong()) return call.end(result);
  if (attribute == capability_major)
    *value = 9;
  else if (attribute == capability_minor)
    *value = device - 100;
  else if (attribute == block_shared_optin)
    *value = most_shared;
  else
    return call.end(invalid_value);
  return call.end(success, field("device", device - 100));
}

STUB CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  Call call("cuDevicePrimaryCtxRetain");
  if (const CUresult result = call.wrong()) return call.end(result);
  *context = &primaries[device - 100];
  return call.end(success, field("device", device - 100));
}

STUB CUresult cuCtxGetCurrent(CUcontext* context) {
  Call call("cuCtxGetCurrent");
  *context = stack.empty() ? nullptr : stack.back();
  return call.end(call.wrong());
}

STUB CUresult cuCtxPushCurrent_v2(CUcontext context) {
  Call call("cuCtxPushCurrent_v2");
  if (const CUresult result = call.wrong()) return call.end(result);
  stack.push_back(context);
  return call.end(success, field("device", context->device));
}

STUB CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  Call call("cuCtxPopCurrent_v2");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  *context = stack.back();
  stack.pop_back();
  return call.end(success, field("device", (*context)->device));
}

STUB CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  Call call("cuThreadExchangeStreamCaptureMode");
  if (const CUresult result = call.wrong()) return call.end(result);
  if (*mode < 0 || *mode > capture_relaxed) return call.end(invalid_value);
  std::swap(*mode, capture_mode);
  return call.end(success, field("mode", capture_mode));
}

STUB CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned options, int* names, void** values) {
  // This is long enough for other threads to arrive here too if nothing holds them back.
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  Call call("cuModuleLoadDataEx");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  if (capturing && capture_mode != capture_relaxed) return call.end(capture_unsupported);
  const std::string bytes = whole(static_cast<const char*>(image));
  if (ptx_result != success && is_ptx(bytes)) return call.end(ptx_result);
  if (bytes.compare(0, 3, "bad") == 0) {
    const std::string reason = "ptxas application ptx input, line 1; fatal: no such instruction";
    char* log = nullptr;
    std::size_t size = 0;
    for (unsigned i = 0; i < options; ++i) {
      if (names[i] == jit_error_log) log = static_cast<char*>(values[i]);
      if (names[i] == jit_error_log_bytes) size = reinterpret_cast<std::size_t>(values[i]);
    }
    if (log != nullptr) std::strncpy(log, reason.c_str(), size);
    return call.end(invalid_ptx);
  }
  modules.push_back({stack.back(), bytes, true});
  *module = &modules.back();
  return call.end(success, field("device", stack.back()->device) + field("image", fnv1a(bytes)));
}

STUB CUresult cuModuleUnload(CUmodule module) {
  Call call("cuModuleUnload");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  if (!module->loaded || module->context != stack.back()) return call.end(invalid_value);
  module->loaded = false;
  return call.end(success, field("device", module->context->device));
}

STUB CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Call call("cuModuleGetFunction");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  const std::string& image = module->image;
  if (image.find(name) == std::string::npos) return call.end(not_found);
  const int shared = number_in(image, "shared=");
  functions.push_back({module,
                       {{function_registers, number_in(image, "registers=")},
                        {function_local, number_in(image, "local=")},
                        {function_shared, shared},
                        {function_dynamic_shared, (48 << 10) - shared},
                        {function_shared_carveout, -1}}});
  *function = &functions.back();
  return call.end(success, field("name", quoted(name)));
}

STUB CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  Call call("cuFuncSetAttribute");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  const int most = attribute == function_dynamic_shared ? most_shared - function->attributes[function_shared] : 100;
  if (value < 0 || value > most) return call.end(invalid_value);
  function->attributes[attribute] = value;
  return call.end(success, field("attribute", attribute) + field("value", value));
}

STUB CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
  Call call("cuFuncGetAttribute");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  *value = function->attributes.at(attribute);
  return call.end(success, field("attribute", attribute));
}

#if !defined(STUB_WITHOUT_LAUNCH)
STUB CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters,
                             void** extra) {
  Call call("cuLaunchKernel");
  if (const CUresult result = call.wrong(true)) return call.end(result);
  if (!call.wait_until_met()) return call.end(launch_timeout);
  if (!function->owner->loaded || function->owner->context != stack.back()) return call.end(invalid_context);
  if (static_cast<int>(shared) > function->attributes[function_dynamic_shared]) return call.end(invalid_value);
  if (grid_x * grid_y * grid_z == 0 || parameters != nullptr) return call.end(invalid_value);
  const void* buffer = nullptr;
  std::size_t bytes = 0;
  for (; extra != nullptr && *extra != nullptr; extra += 2) {
    const std::size_t which = reinterpret_cast<std::size_t>(extra[0]);
    if (which == launch_buffer) buffer = extra[1];
    if (which == launch_buffer_bytes) bytes = *static_cast<const std::size_t*>(extra[1]);
  }
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return '[' + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ']';
  };
  return call.end(success, field("device", stack.back()->device) + field("image", fnv1a(function->owner->image)) +
                               field("grid", triple(grid_x, grid_y, grid_z)) +
                               field("block", triple(block_x, block_y, block_z)) + field("shared", shared) +
                               field("stream", reinterpret_cast<std::size_t>(stream)) +
                               field("parameters", hex(buffer, bytes)));
}
#endif

STUB CUresult cuGetErrorName(CUresult result, const char** name) { return say(result, &Error::name, name); }

STUB CUresult cuGetErrorString(CUresult result, const char** words) { return say(result, &Error::words, words); }
