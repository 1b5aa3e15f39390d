#include "launcher/driver.hpp"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace rpsft::cuda {
namespace {

#if defined(_WIN32)

Calls open_driver() {
  throw std::runtime_error(
      "kernels compiled ahead of time are not launched on Windows: only the Linux driver, libcuda.so.1, is known here");
}

#else

Calls open_driver() {
  const char* named = std::getenv("RPSFT_CUDA_DRIVER");
  const std::string path = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* said = dlerror();
    const std::string why = said != nullptr ? said : "no reason given";
    throw std::runtime_error("no CUDA driver: '" + path + "' does not open (" + why +
                             "); libcuda.so.1 comes with NVIDIA's GPU driver, RPSFT_CUDA_DRIVER names another library");
  }
  const auto find = [&](const char* name) {
    if (void* address = dlsym(library, name)) return address;
    dlclose(library);
    throw std::runtime_error("no CUDA driver: '" + path + "' has no function " + name +
                             ", which NVIDIA's drivers have had since CUDA 10.1");
  };
  Calls calls;
#define RPSFT_CUDA_FIND(name, ...) calls.name = reinterpret_cast<decltype(calls.name)>(find(#name));
  RPSFT_CUDA_CALLS(RPSFT_CUDA_FIND)
#undef RPSFT_CUDA_FIND
  return calls;
}

#endif

int attribute(int ordinal, int which) {
  const Driver& driver = Driver::get();
  const Subject subject{ordinal};
  int value = 0;
  const CUdevice device = driver.device(ordinal, subject);
  driver.check(driver.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute", subject);
  return value;
}

}  // namespace

Driver::Driver() : Calls(open_driver()) {}

Driver& Driver::get() {
  // Never destroyed: threads may still launch while the process ends. An initialization that throws is tried again.
  static Driver& driver = *new Driver;
  return driver;
}

std::string Driver::describe(const Subject& subject) const {
  if (subject.device < 0) return "CUDA";
  std::string words = "CUDA device " + std::to_string(subject.device);
  CUdevice device = 0;
  char name[256] = "";
  if (cuDeviceGet(&device, subject.device) == success && cuDeviceGetName(name, sizeof name, device) == success)
    words += " (" + std::string(name) + ")";
  return subject.kernel != nullptr ? "kernel '" + *subject.kernel + "' on " + words : words;
}

void Driver::check(CUresult result, const char* call, const Subject& subject, const std::string& detail) const {
  if (result == success) return;
  // Both stay null for a result that this driver does not know.
  const char* name = nullptr;
  const char* words = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &words);
  std::string message = describe(subject) + ": " + call + " failed with ";
  message += name != nullptr ? name : "an unknown error";
  message += " (" + std::to_string(result) + ")";
  if (words != nullptr) message += ", " + std::string(words);
  if (!detail.empty()) message += "; " + detail;
  if (std::find(std::begin(unfit), std::end(unfit), result) != std::end(unfit)) throw LoadError(message);
  throw std::runtime_error(message);
}

CUdevice Driver::device(int ordinal, const Subject& subject) const {
  // This costs next to nothing after the first call.
  check(cuInit(0), "cuInit", subject);
  CUdevice device = 0;
  check(cuDeviceGet(&device, ordinal), "cuDeviceGet", subject);
  return device;
}

CUcontext Driver::primary_context(const Subject& subject) {
  const std::lock_guard<std::mutex> lock(mutex_);
  CUcontext& context = contexts_[subject.device];
  if (context == nullptr) {
    CUcontext kept = nullptr;
    check(cuDevicePrimaryCtxRetain(&kept, device(subject.device, subject)), "cuDevicePrimaryCtxRetain", subject);
    context = kept;
  }
  return context;
}

int driver_version() {
  const Driver& driver = Driver::get();
  int version = 0;
  driver.check(driver.cuDriverGetVersion(&version), "cuDriverGetVersion", {});
  return version;
}

int device_count() {
  const Driver& driver = Driver::get();
  const CUresult result = driver.cuInit(0);
  if (result == no_device) return 0;
  driver.check(result, "cuInit", {});
  int count = 0;
  driver.check(driver.cuDeviceGetCount(&count), "cuDeviceGetCount", {});
  return count;
}

std::string device_name(int ordinal) {
  const Driver& driver = Driver::get();
  const Subject subject{ordinal};
  char name[256] = "";
  driver.check(driver.cuDeviceGetName(name, sizeof name, driver.device(ordinal, subject)), "cuDeviceGetName", subject);
  return name;
}

std::pair<int, int> compute_capability(int ordinal) {
  return {attribute(ordinal, capability_major), attribute(ordinal, capability_minor)};
}

int shared_memory_per_block(int ordinal) { return attribute(ordinal, block_shared_optin); }

}  // namespace rpsft::cuda
