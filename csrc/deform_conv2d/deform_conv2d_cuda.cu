// CUDA kernels of deform_conv2d. The emulation (csrc/emulation) compiles this file too.
#include "deform_conv2d/deform_conv2d_backward.cuh"
#include "deform_conv2d/deform_conv2d_columns.cuh"
#include "deform_conv2d/deform_conv2d_forward.cuh"

namespace nasfast::deform_conv2d::cuda {

NASFAST_INSTANTIATE_CUDA_KERNELS

#define NASFAST_INSTANTIATE_COLUMNS(T)                                           \
    template void columns_forward(const Part&, const ColumnsForward<T>&, void*); \
    template void columns_backward(const Part&, const ColumnsBackward<T>&, void*);
NASFAST_INSTANTIATE_COLUMNS(float)
NASFAST_INSTANTIATE_COLUMNS(double)
NASFAST_INSTANTIATE_COLUMNS(bfloat16)
NASFAST_INSTANTIATE_COLUMNS(float16)

}  // namespace nasfast::deform_conv2d::cuda
