// CUDA kernels of mixed_op. The emulation (csrc/emulation) compiles this file too.
#include "mixed_op/mixed_op_backward.cuh"
#include "mixed_op/mixed_op_forward.cuh"

namespace nasfast::mixed_op::cuda {

NASFAST_INSTANTIATE_CUDA_KERNELS

}  // namespace nasfast::mixed_op::cuda
