// CUDA kernels of deform_conv2d. The emulation (csrc/emulation) compiles this file too.
#include "deform_conv2d/deform_conv2d_backward.cuh"
#include "deform_conv2d/deform_conv2d_cuda.h"
#include "deform_conv2d/deform_conv2d_forward.cuh"

namespace nasfast::deform_conv2d::cuda {

int64_t forward_workspace(DType, const Params&) { return 0; }

template void forward(const Params&, const Forward<float>&, void*, void*);
template void forward(const Params&, const Forward<double>&, void*, void*);
template void forward(const Params&, const Forward<bfloat16>&, void*, void*);
template void forward(const Params&, const Forward<float16>&, void*, void*);

template void backward(const Params&, const Backward<float>&, void*, void*);
template void backward(const Params&, const Backward<double>&, void*, void*);
template void backward(const Params&, const Backward<bfloat16>&, void*, void*);
template void backward(const Params&, const Backward<float16>&, void*, void*);

}  // namespace nasfast::deform_conv2d::cuda
