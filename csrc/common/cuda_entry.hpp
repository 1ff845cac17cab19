// Python's entries to a CUDA kernel; nasfast._C and the emulation's module have the same.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/fields.hpp"

namespace nasfast {

// <name>_cuda: (dtype, sizes, pointers, workspace, stream) -> None: queues the kernels, without the GIL, by
// run(params, tensors, workspace, stream).
// <name>_cuda_workspace: (dtype, sizes) -> bytes of the workspace, by workspace(dtype, params).
template <class Params, template <class> class Tensors, class Workspace, class Run>
void bind_cuda_kernel(pybind11::module_& m, const std::string& name, Workspace workspace, Run run) {
    using Address = uintptr_t;
    m.def((name + "_cuda").c_str(),
          [run](int64_t dtype, const Fields<Params>& sizes, const Fields<Tensors<float>>& pointers,
                Address memory, Address stream) {
              with_type(dtype, [&](auto type) {
                  run(unpack<Params>(sizes), unpack<Tensors<decltype(type)>>(pointers),
                      reinterpret_cast<void*>(memory), reinterpret_cast<void*>(stream));
              });
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def((name + "_cuda_workspace").c_str(), [workspace](int64_t dtype, const Fields<Params>& sizes) {
        return workspace(DType(dtype), unpack<Params>(sizes));
    });
}

}  // namespace nasfast
