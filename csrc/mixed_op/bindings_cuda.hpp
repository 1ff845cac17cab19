// Python's entries to the CUDA kernels.
#pragma once

#include "common/cuda_entry.hpp"
#include "mixed_op/mixed_op_cuda.h"

namespace nasfast::mixed_op::cuda {

inline void bind_cuda(pybind11::module_& m) {
    bind_cuda_kernel<Params, Forward>(m, "mixed_op_forward", forward_workspace,
                                      [](const auto&... arguments) { forward(arguments...); });
    bind_cuda_kernel<Params, Backward>(m, "mixed_op_backward", backward_workspace,
                                       [](const auto&... arguments) { backward(arguments...); });
}

}  // namespace nasfast::mixed_op::cuda
