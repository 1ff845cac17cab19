// CPU kernels of batch_norm_relu, compiled once per instruction set.
#include "batch_norm_relu/batch_norm_relu.hpp"

namespace nasfast::batch_norm_relu::NASFAST_ISA {

void forward(const Params& p, const Forward<float>& t) { forward_impl(p, t); }
void forward(const Params& p, const Forward<double>& t) { forward_impl(p, t); }
void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl(p, t); }
void backward(const Params& p, const Backward<float>& t) { backward_impl(p, t); }
void backward(const Params& p, const Backward<double>& t) { backward_impl(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl(p, t); }

}  // namespace nasfast::batch_norm_relu::NASFAST_ISA
