// SPDX-License-Identifier: Apache-2.0
// The Python module fixed_size_kv_cache._C, and the only file that knows pybind11: it tells about the build.
// Importing it registers the operators of ops.cpp as torch.ops.fsdc; they are called through torch, not here.
#undef TORCH_TARGET_VERSION  // the pybind11 of torch 2.11 refuses it, and nothing here uses torch
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/isa.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) { return *text != '\0' ? py::object(py::str(text)) : py::object(py::none()); }

py::dict build_info() {
  py::dict info;
  info["version"] = FSDC_VERSION;
  info["torch"] = FSDC_TORCH;
  info["cuda"] = text_or_none(FSDC_CUDA);
  info["cuda_architectures"] = text_or_none(FSDC_CUDA_ARCHITECTURES);
  info["without_cuda_because"] = text_or_none(FSDC_WITHOUT_CUDA_BECAUSE);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of fixed_size_kv_cache. Importing it registers torch.ops.fsdc.";
  module.def("build_info", &build_info, "Version, torch, CUDA, architectures and compiler of this build.");
  module.def("use_cpu_isa", &fsdc::cpu::use_isa, "Chooses the instruction set, for tests; False where it is missing.");
  module.def(
      "cpu_isa", [] { return fsdc::cpu::name_of(fsdc::cpu::active_isa()); },
      "Instruction set in use: 'amx', 'avx512', 'avx2' or 'portable'.");
  module.def(
      "cpu_isa_of", [](const std::string& operation) { return fsdc::cpu::name_of(fsdc::cpu::isa_of(operation)); },
      "The instruction set that an operator runs on, for lack of loops for the one in use maybe a lower one.");
}
