// Host side of the CUDA kernels. Everything is queued on `stream` (a cudaStream_t of the current device);
// nothing allocates, waits for the device or uses another stream, so that calls can be captured in a graph.
// A failed launch raises std::runtime_error.
#pragma once

#include "mixed_op/mixed_op.h"

namespace nasfast::mixed_op::cuda {

// Bytes of device memory, aligned to 256, that the call of the same sizes needs at `workspace`.
int64_t forward_workspace(DType, const Params&);
int64_t backward_workspace(DType, const Params&);

template <class T>
void forward(const Params&, const Forward<T>&, void* workspace, void* stream);
template <class T>
void backward(const Params&, const Backward<T>&, void* workspace, void* stream);

}  // namespace nasfast::mixed_op::cuda
