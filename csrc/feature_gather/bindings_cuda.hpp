// Python's entry to the CUDA kernel.
#pragma once

#include "common/cuda_entry.hpp"
#include "feature_gather/feature_gather_cuda.h"

namespace nasfast::feature_gather::cuda {

inline void bind_cuda(pybind11::module_& m) {
    bind_cuda_kernel<Params, Call>(m, "feature_gather_forward", forward_workspace, forward);
}

}  // namespace nasfast::feature_gather::cuda
