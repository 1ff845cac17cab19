// The mixed operation in bfloat16 with matrix instructions for it, compiled for AVX512-BF16 and for AMX.
#include "common/gemm_bf16.hpp"
#include "mixed_op/mixed_op.h"
#include "mixed_op/mixed_op_backward.hpp"
#include "mixed_op/mixed_op_forward.hpp"

namespace nasfast::mixed_op::NASFAST_ISA {

void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl<Bf16Product>(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl<Bf16Product>(p, t); }

}  // namespace nasfast::mixed_op::NASFAST_ISA
