// The Python module of the engine. It takes addresses, shapes and strides instead of tensors.
// python_launcher.cpp adds the submodule `cuda`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/engine.hpp"
#include "cpu/threads.hpp"

namespace py = pybind11;

void bind_cuda(py::module_ module);

namespace {

rpsft::Matrix matrix(std::uintptr_t address, rpsft::Dtype dtype, std::int64_t rows, std::int64_t cols,
                     std::int64_t row_stride, std::int64_t col_stride) {
  return {reinterpret_cast<void*>(address), dtype, rows, cols, row_stride, col_stride};
}

rpsft::Projection projection(const rpsft::Matrix& weight, const rpsft::Matrix& base, const rpsft::Matrix& left,
                             const rpsft::Matrix& right, std::uintptr_t block, std::uintptr_t drift,
                             std::uintptr_t square, std::int64_t head, std::int64_t tail) {
  return {weight,
          base,
          left,
          right,
          reinterpret_cast<const float*>(block),
          reinterpret_cast<float*>(drift),
          reinterpret_cast<float*>(square),
          {head, tail}};
}

rpsft::Pullback pullback(const rpsft::Matrix& grad, const rpsft::Matrix& left, const rpsft::Matrix& right,
                         const rpsft::Matrix& weight, const rpsft::Matrix& base, std::uintptr_t drift, float scale,
                         std::int64_t head, std::int64_t tail) {
  return {grad, left, right, weight, base, reinterpret_cast<const float*>(drift), scale, {head, tail}};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The CPU engine that rpsft_kernels.ops.native calls, and the submodule cuda.";

  py::enum_<rpsft::Dtype>(module, "Dtype")
      .value("bfloat16", rpsft::Dtype::bfloat16)
      .value("float16", rpsft::Dtype::float16)
      .value("float32", rpsft::Dtype::float32);

  py::class_<rpsft::Matrix>(module, "Matrix", "A matrix in memory; strides in elements. Without arguments: absent.")
      .def(py::init<>())
      .def(py::init(&matrix), py::arg("address"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
           py::arg("row_stride"), py::arg("col_stride"));
  py::class_<rpsft::Projection>(module, "Projection", "One weight's arguments of project_drift.")
      .def(py::init(&projection), py::arg("weight"), py::arg("base"), py::arg("left"), py::arg("right"),
           py::arg("block"), py::arg("drift"), py::arg("square"), py::arg("head") = 0, py::arg("tail") = 0);
  py::class_<rpsft::Pullback>(module, "Pullback", "One weight's arguments of pull_back.")
      .def(py::init(&pullback), py::arg("grad"), py::arg("left"), py::arg("right"), py::arg("weight"), py::arg("base"),
           py::arg("drift"), py::arg("scale"), py::arg("head") = 0, py::arg("tail") = 0);

  module.def("instruction_sets", &rpsft::instruction_sets,
             "Instruction sets that the engine can use here, best first.");
  module.def(
      "missing_instruction_sets",
      [] {
        std::vector<std::pair<std::string, std::string>> missing;
        for (const auto& each : rpsft::missing_instruction_sets()) missing.emplace_back(each.name, each.reason);
        return missing;
      },
      "The other instruction sets, and why the engine cannot use them here.");
  module.def("team_kind", &rpsft::team_kind, "Whose threads the engine uses: 'OpenMP' or its own 'threads'.");
  module.def("workspace_bytes", &rpsft::workspace_bytes, py::arg("rank"), py::arg("instruction_set"),
             py::arg("threads"), "The most bytes of workspace that a calling thread allocates.");
  module.def("project_drift", &rpsft::project_drift, py::arg("items"), py::arg("instruction_set"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
  module.def("pull_back", &rpsft::pull_back, py::arg("items"), py::arg("accumulate"), py::arg("instruction_set"),
             py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  bind_cuda(module.def_submodule("cuda"));
}
