// CPU kernels of the mixed operation, compiled once per instruction set. Results are identical for any number
// of threads: the sizes alone decide the order of every sum.
#include "common/gemm.hpp"
#include "mixed_op/mixed_op.h"
#include "mixed_op/mixed_op_backward.hpp"
#include "mixed_op/mixed_op_forward.hpp"

namespace nasfast::mixed_op::NASFAST_ISA {

void forward(const Params& p, const Forward<float>& t) { forward_impl<VectorProduct<float>>(p, t); }
void forward(const Params& p, const Forward<double>& t) { forward_impl<VectorProduct<double>>(p, t); }
void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl<VectorProduct<float>>(p, t); }
void backward(const Params& p, const Backward<float>& t) { backward_impl<VectorProduct<float>>(p, t); }
void backward(const Params& p, const Backward<double>& t) { backward_impl<VectorProduct<double>>(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl<VectorProduct<float>>(p, t); }

}  // namespace nasfast::mixed_op::NASFAST_ISA
