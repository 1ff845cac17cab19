// CPU kernels of deform_conv2d, compiled once per instruction set. Samples go straight into the operand of a
// matrix product, a cache-resident tile at a time. Results are identical for any number of threads: the order
// of every sum is fixed by the sizes.
#include "common/gemm.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "deform_conv2d/deform_conv2d_backward.hpp"
#include "deform_conv2d/deform_conv2d_forward.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {

void forward(const Params& p, const Forward<float>& t) { forward_impl<VectorProduct<float>>(p, t); }
void forward(const Params& p, const Forward<double>& t) { forward_impl<VectorProduct<double>>(p, t); }
void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl<VectorProduct<float>>(p, t); }
void backward(const Params& p, const Backward<float>& t) { backward_impl<VectorProduct<float>>(p, t); }
void backward(const Params& p, const Backward<double>& t) { backward_impl<VectorProduct<double>>(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl<VectorProduct<float>>(p, t); }

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
