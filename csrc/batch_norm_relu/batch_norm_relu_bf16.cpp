// batch_norm_relu in bfloat16 where the processor rounds to it by itself.
#include "batch_norm_relu/batch_norm_relu.hpp"

namespace nasfast::batch_norm_relu::NASFAST_ISA {

void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl(p, t); }

}  // namespace nasfast::batch_norm_relu::NASFAST_ISA
