// Starts kernels that were compiled ahead of time. It knows no torch and no Python: addresses and a stream come in.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launcher/driver.hpp"

namespace rpsft::cuda {

// The place of one argument in the kernel's parameter memory, in bytes.
struct Parameter {
  std::int64_t offset, size;
};

// The resources of a compiled kernel, as the driver reports them.
struct Resources {
  int registers;     // of a thread
  int local_bytes;   // of a thread, for values that did not fit into registers
  int shared_bytes;  // of a block, declared inside the kernel; dynamic shared memory is not among them
};

using Grid = std::array<std::int64_t, 3>;

// One entry of one image (a cubin, a fat binary or PTX), usable on every device that the image fits.
//
// The image is loaded into a device's primary context at the first launch there, once, whatever the number of threads,
// also where that launch is captured into a CUDA graph.
// A load that fails leaves nothing behind, and the next launch tries again: memory that was short may be free by then,
// and an image that does not fit the device fails with the same message. A loaded module lives until the process ends,
// longer than its Kernel: launches still queued may run it, and unloading at exit would race with the driver's own
// teardown.
//
// Any number of threads may use one Kernel at a time. Messages of failures name the kernel, the device and the driver's
// function; an error of an earlier kernel that ran on the device may come out here, as everywhere in CUDA.
class Kernel {
 public:
  // `name` is for messages. `threads` of a block and `shared` bytes of dynamic shared memory are what the image was
  // compiled for. Throws std::invalid_argument.
  Kernel(std::string image, std::string entry, std::string name, std::int64_t threads, std::int64_t shared,
         std::vector<Parameter> layout);

  // Queues the kernel on a stream of the device (0: the default stream) and returns. Arguments are in the layout's
  // order. A grid with a dimension of 0 has nothing to do and needs no driver. The calling thread's current context is
  // restored. Throws std::invalid_argument or std::runtime_error; LoadError where this image cannot run there, but
  // another one might.
  void launch(int device, std::uint64_t stream, const Grid& grid, const std::vector<std::uint64_t>& arguments);

  // Loads the kernel like a launch does.
  Resources resources(int device);

 private:
  struct Loaded {
    CUcontext context;
    CUfunction function;
    Resources resources;
  };

  [[noreturn]] void refuse(const std::string& what) const;
  void check_layout() const;
  void check_device(int device) const;
  std::vector<unsigned char> pack(const std::vector<std::uint64_t>& arguments) const;
  const Loaded& load_once(Driver& driver, const Subject& subject);
  Loaded load(Driver& driver, const Subject& subject) const;

  const std::string image_, entry_, name_;
  const std::int64_t threads_, shared_;
  const std::vector<Parameter> layout_;

  std::mutex mutex_;  // of loaded_; not held during a launch
  std::map<int, Loaded> loaded_;
};

}  // namespace rpsft::cuda
