// CUDA kernels of mixed_op. The emulation (csrc/emulation) compiles this file too.
#include "mixed_op/mixed_op_backward.cuh"
#include "mixed_op/mixed_op_cuda.h"
#include "mixed_op/mixed_op_forward.cuh"

namespace nasfast::mixed_op::cuda {

template void forward(const Params&, const Forward<float>&, void*, void*);
template void forward(const Params&, const Forward<double>&, void*, void*);
template void forward(const Params&, const Forward<bfloat16>&, void*, void*);
template void forward(const Params&, const Forward<float16>&, void*, void*);

template void backward(const Params&, const Backward<float>&, void*, void*);
template void backward(const Params&, const Backward<double>&, void*, void*);
template void backward(const Params&, const Backward<bfloat16>&, void*, void*);
template void backward(const Params&, const Backward<float16>&, void*, void*);

}  // namespace nasfast::mixed_op::cuda
