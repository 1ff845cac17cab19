// Python's entries to the CUDA kernels; nasfast._C and the emulation's module have the same.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/fields.hpp"
#include "mixed_op/mixed_op_cuda.h"

namespace nasfast::mixed_op::cuda {

// (dtype, sizes, pointers, workspace, stream) -> None: queues the kernels, without the GIL.
// (dtype, sizes) -> bytes of the workspace.
inline void bind_cuda(pybind11::module_& m) {
    using Address = uintptr_t;
    const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
    m.def(
        "mixed_op_forward_cuda",
        [=](int64_t dtype, const Fields<Params>& sizes, const Fields<Forward<float>>& pointers,
            Address workspace, Address stream) {
            with_type(dtype, [&](auto type) {
                forward(unpack<Params>(sizes), unpack<Forward<decltype(type)>>(pointers), pointer(workspace),
                        pointer(stream));
            });
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def(
        "mixed_op_backward_cuda",
        [=](int64_t dtype, const Fields<Params>& sizes, const Fields<Backward<float>>& pointers,
            Address workspace, Address stream) {
            with_type(dtype, [&](auto type) {
                backward(unpack<Params>(sizes), unpack<Backward<decltype(type)>>(pointers),
                         pointer(workspace), pointer(stream));
            });
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def("mixed_op_forward_cuda_workspace", [](int64_t dtype, const Fields<Params>& sizes) {
        return forward_workspace(DType(dtype), unpack<Params>(sizes));
    });
    m.def("mixed_op_backward_cuda_workspace", [](int64_t dtype, const Fields<Params>& sizes) {
        return backward_workspace(DType(dtype), unpack<Params>(sizes));
    });
}

}  // namespace nasfast::mixed_op::cuda
