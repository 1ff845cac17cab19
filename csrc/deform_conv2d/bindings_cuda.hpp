// Python's entries to the CUDA kernels.
#pragma once

#include "common/cuda_entry.hpp"
#include "deform_conv2d/deform_conv2d_cuda.h"

namespace nasfast::deform_conv2d::cuda {

inline void bind_cuda(pybind11::module_& m) {
    bind_cuda_kernel<Params, Forward>(m, "deform_conv2d_forward", forward_workspace,
                                      [](const auto&... arguments) { forward(arguments...); });
    bind_cuda_kernel<Params, Backward>(m, "deform_conv2d_backward", backward_workspace,
                                       [](const auto&... arguments) { backward(arguments...); });
}

}  // namespace nasfast::deform_conv2d::cuda
