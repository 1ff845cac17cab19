// Python's entries to the CUDA kernels; nasfast._C and the emulation's module have the same.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cuda_device.h"
#include "common/fields.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "feature_gather/feature_gather.h"
#include "mixed_op/mixed_op.h"

namespace nasfast {

// <name>_cuda: (dtype, sizes, pointers, workspace, stream, device) -> None: queues the kernels, without the
// GIL, by run(params, tensors, workspace, stream). <name>_cuda_workspace: (dtype, sizes, device) -> bytes of
// the workspace, by workspace(T(), params). `device` is an index; whatever device is current, the call works
// on this one and leaves the other current.
template <class Params, template <class> class Tensors, class Workspace, class Run>
void bind_cuda_kernel(pybind11::module_& m, const std::string& name, Workspace workspace, Run run) {
    using Address = uintptr_t;
    m.def((name + "_cuda").c_str(),
          [run](int64_t dtype, const Fields<Params>& sizes, const Fields<Tensors<float>>& pointers,
                Address memory, Address stream, int device) {
              const CurrentDevice current(device);
              with_type(dtype, [&](auto type) {
                  run(unpack<Params>(sizes), unpack<Tensors<decltype(type)>>(pointers),
                      reinterpret_cast<void*>(memory), reinterpret_cast<void*>(stream));
              });
          },
          pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def((name + "_cuda_workspace").c_str(),
          [workspace](int64_t dtype, const Fields<Params>& sizes, int device) {
              const CurrentDevice current(device);
              return with_type(dtype, [&](auto type) { return workspace(type, unpack<Params>(sizes)); });
          });
}

#define NASFAST_BIND_CUDA(op, way, Tensors)                                                    \
    bind_cuda_kernel<op::Params, op::Tensors>(                                                 \
        m, #op "_" #way,                                                                       \
        [](auto type, const auto& p) { return op::cuda::way##_workspace<decltype(type)>(p); }, \
        [](const auto&... arguments) { op::cuda::way(arguments...); })

inline void bind_cuda(pybind11::module_& m) {
    NASFAST_BIND_CUDA(deform_conv2d, forward, Forward);
    NASFAST_BIND_CUDA(deform_conv2d, backward, Backward);
    namespace deform = deform_conv2d;
    const auto nothing = [](auto, const deform::Part&) { return int64_t(0); };
    bind_cuda_kernel<deform::Part, deform::ColumnsForward>(
        m, "deform_conv2d_columns_forward", nothing, [](const auto& p, const auto& t, void*, void* stream) {
            deform::cuda::columns_forward(p, t, stream);
        });
    bind_cuda_kernel<deform::Part, deform::ColumnsBackward>(
        m, "deform_conv2d_columns_backward", nothing, [](const auto& p, const auto& t, void*, void* stream) {
            deform::cuda::columns_backward(p, t, stream);
        });
    NASFAST_BIND_CUDA(feature_gather, forward, Call);
    NASFAST_BIND_CUDA(mixed_op, forward, Forward);
    NASFAST_BIND_CUDA(mixed_op, backward, Backward);
}

}  // namespace nasfast
