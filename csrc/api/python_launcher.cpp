// The Python submodule of the launcher. It opens the driver only when one of its functions is called. Those calls
// release the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <utility>

#include "launcher/launcher.hpp"

namespace py = pybind11;

namespace {

using rpsft::cuda::Kernel;

std::unique_ptr<Kernel> kernel(const py::bytes& image, std::string entry, std::string name, std::int64_t threads,
                               std::int64_t shared, const std::vector<std::pair<std::int64_t, std::int64_t>>& layout) {
  std::vector<rpsft::cuda::Parameter> parameters;
  for (const auto& [offset, size] : layout) parameters.push_back({offset, size});
  return std::make_unique<Kernel>(image, std::move(entry), std::move(name), threads, shared, std::move(parameters));
}

std::tuple<int, int, int> resources(Kernel& kernel, int device) {
  const rpsft::cuda::Resources used = kernel.resources(device);
  return {used.registers, used.local_bytes, used.shared_bytes};
}

}  // namespace

void bind_cuda(py::module_ module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Launches CUDA kernels that were compiled ahead of time. The driver is opened at first use.";

  py::register_exception<rpsft::cuda::LoadError>(module, "LoadError", PyExc_RuntimeError).doc() =
      "The device or the driver cannot use the image; another image of the same kernel may work.";

  py::class_<Kernel>(module, "Kernel", "One entry of a cubin, a fat binary or PTX; layout: (offset, size) each.")
      .def(py::init(&kernel), py::arg("image"), py::arg("entry"), py::arg("name"), py::arg("threads"),
           py::arg("shared"), py::arg("layout"))
      .def("launch", &Kernel::launch, py::arg("device"), py::arg("stream"), py::arg("grid"), py::arg("arguments"),
           Unlocked(), "Queues the kernel on a stream of a device. The first launch on a device loads it.")
      .def("resources", &resources, py::arg("device"), Unlocked(),
           "(registers, local bytes, static shared bytes): of a thread, of a thread, of a block. Loads the kernel.");

  module.def("driver_version", &rpsft::cuda::driver_version, Unlocked(), "12040 is CUDA 12.4.");
  module.def("device_count", &rpsft::cuda::device_count, Unlocked(), "0 where the driver finds no GPU.");
  module.def("device_name", &rpsft::cuda::device_name, py::arg("device"), Unlocked());
  module.def("compute_capability", &rpsft::cuda::compute_capability, py::arg("device"), Unlocked(), "(major, minor)");
  module.def("shared_memory_per_block", &rpsft::cuda::shared_memory_per_block, py::arg("device"), Unlocked(),
             "Bytes that a block may ask for.");
}
