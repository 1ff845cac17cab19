// CUDA kernels of deform_conv2d. The emulation (csrc/emulation) compiles this file too.
#include "deform_conv2d/deform_conv2d_backward.cuh"
#include "deform_conv2d/deform_conv2d_forward.cuh"

namespace nasfast::deform_conv2d::cuda {

NASFAST_INSTANTIATE_CUDA_KERNELS

}  // namespace nasfast::deform_conv2d::cuda
