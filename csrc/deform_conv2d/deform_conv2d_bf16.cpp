// deform_conv2d in bfloat16 with matrix instructions for it, compiled for AVX512-BF16 and for AMX. Other
// processors widen to float32 (deform_conv2d_cpu.cpp).
#include "common/gemm_bf16.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "deform_conv2d/deform_conv2d_backward.hpp"
#include "deform_conv2d/deform_conv2d_forward.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {

void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl<Bf16Product>(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl<Bf16Product>(p, t); }

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
