# SPDX-License-Identifier: Apache-2.0
# fsdc_torch: headers and libraries of the installed torch. FSDC_TORCH_CUDA: its CUDA fits this toolkit.
#
# Not find_package(Torch): it takes 16 s, asks nvcc for GPUs it no longer knows, and fails without a toolkit.
if(DEFINED Torch_DIR)
  get_filename_component(root "${Torch_DIR}/../../.." ABSOLUTE)
else()
  find_package(Python3 COMPONENTS Interpreter)
  if(Python3_FOUND)
    set(where "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])")
    execute_process(COMMAND ${Python3_EXECUTABLE} -c "${where}" OUTPUT_VARIABLE root
                    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()
if(NOT EXISTS "${root}/include/torch")
  message(STATUS "torch: not found (Python is '${Python3_EXECUTABLE}'), so only the kernels are built. "
                 "Use -DPython3_EXECUTABLE=<python> or -DTorch_DIR=<libtorch>/share/cmake/Torch")
  return()
endif()

add_library(fsdc_torch INTERFACE)
target_include_directories(fsdc_torch SYSTEM INTERFACE
                           ${root}/include ${root}/include/torch/csrc/api/include)
target_link_libraries(fsdc_torch INTERFACE ${root}/lib/libtorch_cpu.so ${root}/lib/libc10.so)
if(TARGET fsdc_kernels_cuda AND EXISTS ${root}/lib/libtorch_cuda.so)
  # The libcudart that torch itself loads, where it brings one: a process must have one only.
  file(GLOB cudart ${root}/../nvidia/cu*/lib/libcudart.so.${CUDAToolkit_VERSION_MAJOR})
  if(NOT cudart AND NOT EXISTS ${root}/../nvidia)
    set(cudart CUDA::cudart)
  endif()
  if(cudart)
    set(FSDC_TORCH_CUDA ON)
    target_link_libraries(fsdc_torch INTERFACE
                          ${root}/lib/libtorch_cuda.so ${root}/lib/libc10_cuda.so ${cudart})
  else()
    message(STATUS "torch: its CUDA is of another major than nvcc ${CUDAToolkit_VERSION}: fsdc has no CUDA")
  endif()
endif()
