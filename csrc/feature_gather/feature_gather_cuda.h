// Host side of the CUDA kernel. It is queued on `stream` (a cudaStream_t of the current device); nothing
// allocates, waits for the device or uses another stream, so that calls can be captured in a graph. A failed
// launch raises std::runtime_error.
#pragma once

#include "feature_gather/feature_gather.h"

namespace nasfast::feature_gather::cuda {

// Bytes of device memory that a call needs at `workspace`.
int64_t forward_workspace(DType, const Params&);

void forward(const Params&, const Pointers&, void* workspace, void* stream);

}  // namespace nasfast::feature_gather::cuda
