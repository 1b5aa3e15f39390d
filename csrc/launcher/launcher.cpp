#include "launcher/launcher.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace rpsft::cuda {
namespace {

// CUDA's own limits.
constexpr std::int64_t most_threads = 1024;
constexpr std::int64_t most_parameter_bytes = 32764;
constexpr Grid largest_grid = {0x7fffffff, 0xffff, 0xffff};
// A block's shared memory, declared and dynamic, up to which a kernel need not say that it wants more.
constexpr std::int64_t plain_shared = 48 << 10;

// Makes a context current. No push is needed where it is current already, as after torch's own calls.
class Current {
 public:
  Current(const Driver& driver, CUcontext context, const Subject& subject) : driver_(driver), subject_(subject) {
    CUcontext before = nullptr;
    driver.check(driver.cuCtxGetCurrent(&before), "cuCtxGetCurrent", subject);
    if (before == context) return;
    driver.check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent", subject);
    pushed_ = true;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  // Restores the context after a failure as well; the failure itself is what is reported.
  ~Current() { pop(); }

  void restore() { driver_.check(pop(), "cuCtxPopCurrent", subject_); }

 private:
  CUresult pop() {
    CUcontext popped = nullptr;
    return std::exchange(pushed_, false) ? driver_.cuCtxPopCurrent_v2(&popped) : success;
  }

  const Driver& driver_;
  const Subject& subject_;
  bool pushed_ = false;
};

// Lets the thread make calls that are forbidden while any stream is captured into a CUDA graph, such as loading a
// module: none of them touches a stream.
class Uncaptured {
 public:
  Uncaptured(const Driver& driver, const Subject& subject) : driver_(driver), subject_(subject) {
    driver.check(driver.cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode", subject);
    changed_ = true;
  }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

  // Restores the mode after a failure as well; the failure itself is what is reported.
  ~Uncaptured() { exchange(); }

  void restore() { driver_.check(exchange(), "cuThreadExchangeStreamCaptureMode", subject_); }

 private:
  CUresult exchange() {
    return std::exchange(changed_, false) ? driver_.cuThreadExchangeStreamCaptureMode(&mode_) : success;
  }

  const Driver& driver_;
  const Subject& subject_;
  int mode_ = capture_relaxed;  // while it is in force: the thread's own
  bool changed_ = false;
};

// A module that is unloaded unless it is kept: half a load must not stay behind.
class Module {
 public:
  Module(const Driver& driver, const std::string& image, const Subject& subject) : driver_(driver) {
    // Only the log says why the driver's compiler refuses PTX. Sizes go in and come out as values in pointers.
    char log[2048] = "";
    int names[] = {jit_error_log, jit_error_log_bytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
    const CUresult result = driver.cuModuleLoadDataEx(&module_, image.c_str(), 2, names, values);
    driver.check(result, "cuModuleLoadDataEx", subject, log);
  }
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  ~Module() {
    if (module_ != nullptr) driver_.cuModuleUnload(module_);
  }

  CUmodule get() const { return module_; }
  void keep() { module_ = nullptr; }

 private:
  const Driver& driver_;
  CUmodule module_ = nullptr;
};

}  // namespace

Kernel::Kernel(std::string image, std::string entry, std::string name, std::int64_t threads, std::int64_t shared,
               std::vector<Parameter> layout)
    : image_(std::move(image)),
      entry_(std::move(entry)),
      name_(std::move(name)),
      threads_(threads),
      shared_(shared),
      layout_(std::move(layout)) {
  if (image_.empty()) refuse("image: got no bytes, expected a cubin, a fat binary or PTX");
  if (entry_.empty()) refuse("entry: got an empty name, expected one of the image's kernels");
  if (threads_ < 1 || threads_ > most_threads)
    refuse("threads: got " + std::to_string(threads_) + ", expected 1 to " + std::to_string(most_threads));
  if (shared_ < 0 || shared_ > 0x7fffffff)
    refuse("shared: got " + std::to_string(shared_) + ", expected a number of bytes");
  check_layout();
}

void Kernel::refuse(const std::string& what) const { throw std::invalid_argument("kernel '" + name_ + "': " + what); }

void Kernel::check_layout() const {
  std::vector<Parameter> ordered = layout_;
  const auto before = [](const Parameter& one, const Parameter& other) { return one.offset < other.offset; };
  std::sort(ordered.begin(), ordered.end(), before);
  std::int64_t end = 0;
  for (const auto& [offset, size] : ordered) {
    const std::string got = "layout: got (" + std::to_string(offset) + ", " + std::to_string(size) + ")";
    if (size != 1 && size != 2 && size != 4 && size != 8) refuse(got + ", expected a size of 1, 2, 4 or 8 bytes");
    if (offset < 0 || offset > most_parameter_bytes - size)
      refuse(got + ", expected an offset inside the " + std::to_string(most_parameter_bytes) + " bytes that CUDA has");
    if (offset % size != 0) refuse(got + ", expected an offset that is a multiple of the size");
    if (offset < end) refuse(got + ", which overlaps another argument");
    end = offset + size;
  }
}

void Kernel::check_device(int device) const {
  if (device < 0) refuse("device: got " + std::to_string(device) + ", expected 0 or more");
}

std::vector<unsigned char> Kernel::pack(const std::vector<std::uint64_t>& arguments) const {
  if (arguments.size() != layout_.size())
    refuse("arguments: got " + std::to_string(arguments.size()) + ", expected " + std::to_string(layout_.size()));
  std::size_t bytes = 0;
  for (const auto& [offset, size] : layout_) bytes = std::max(bytes, static_cast<std::size_t>(offset + size));
  std::vector<unsigned char> buffer(bytes, 0);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const auto& [offset, size] = layout_[i];
    if (size < 8 && arguments[i] >> (8 * size) != 0)
      refuse("argument " + std::to_string(i) + ": got " + std::to_string(arguments[i]) + ", which does not fit in " +
             std::to_string(size) + " bytes");
    // Hosts of CUDA devices are little-endian, as the devices are: the low bytes come first.
    std::memcpy(buffer.data() + offset, &arguments[i], static_cast<std::size_t>(size));
  }
  return buffer;
}

const Kernel::Loaded& Kernel::load_once(Driver& driver, const Subject& subject) {
  // The lock is held while loading, so that other threads wait for this load instead of loading the kernel again.
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto entry = loaded_.find(subject.device);
  if (entry != loaded_.end()) return entry->second;
  return loaded_.emplace(subject.device, load(driver, subject)).first->second;
}

Kernel::Loaded Kernel::load(Driver& driver, const Subject& subject) const {
  Loaded fresh{driver.primary_context(subject), nullptr, {}};
  Uncaptured uncaptured(driver, subject);
  Current current(driver, fresh.context, subject);
  Module module(driver, image_, subject);
  const CUresult result = driver.cuModuleGetFunction(&fresh.function, module.get(), entry_.c_str());
  driver.check(result, "cuModuleGetFunction", subject, "entry '" + entry_ + "'");
  const auto read = [&](int attribute, int& value) {
    driver.check(driver.cuFuncGetAttribute(&value, attribute, fresh.function), "cuFuncGetAttribute", subject);
  };
  const auto set = [&](int attribute, std::int64_t value) {
    driver.check(driver.cuFuncSetAttribute(fresh.function, attribute, static_cast<int>(value)), "cuFuncSetAttribute",
                 subject, std::to_string(shared_) + " bytes of dynamic shared memory");
  };
  read(function_registers, fresh.resources.registers);
  read(function_local, fresh.resources.local_bytes);
  read(function_shared, fresh.resources.shared_bytes);
  if (fresh.resources.shared_bytes + shared_ > plain_shared) {
    set(function_dynamic_shared, shared_);
    // Triton does the same for such kernels: more of a multiprocessor's memory for blocks, less for the L1 cache.
    set(function_shared_carveout, 100);
  }
  current.restore();
  uncaptured.restore();
  module.keep();
  return fresh;
}

void Kernel::launch(int device, std::uint64_t stream, const Grid& grid, const std::vector<std::uint64_t>& arguments) {
  check_device(device);
  for (std::size_t axis = 0; axis < grid.size(); ++axis)
    if (grid[axis] < 0 || grid[axis] > largest_grid[axis])
      refuse(std::string("grid: got ") + "xyz"[axis] + " = " + std::to_string(grid[axis]) + ", expected 0 to " +
             std::to_string(largest_grid[axis]));
  std::vector<unsigned char> buffer = pack(arguments);
  if (std::find(grid.begin(), grid.end(), 0) != grid.end()) return;

  Driver& driver = Driver::get();
  const Subject subject{device, &name_};
  const Loaded& own = load_once(driver, subject);
  // One buffer and its size, not kernelParams: there the driver would follow as many pointers as the image has
  // parameters, past the end of the array where image and layout disagree.
  std::size_t bytes = buffer.size();
  void* extra[] = {reinterpret_cast<void*>(launch_buffer), buffer.data(), reinterpret_cast<void*>(launch_buffer_bytes),
                   &bytes, reinterpret_cast<void*>(launch_end)};
  Current current(driver, own.context, subject);
  const CUresult result = driver.cuLaunchKernel(
      own.function, static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2]),
      static_cast<unsigned>(threads_), 1, 1, static_cast<unsigned>(shared_),
      reinterpret_cast<CUstream>(static_cast<std::uintptr_t>(stream)), nullptr, bytes != 0 ? extra : nullptr);
  driver.check(result, "cuLaunchKernel", subject);
  current.restore();
}

Resources Kernel::resources(int device) {
  check_device(device);
  const Subject subject{device, &name_};
  return load_once(Driver::get(), subject).resources;
}

}  // namespace rpsft::cuda
