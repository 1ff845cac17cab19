// depthwise_conv2d in bfloat16 where the processor rounds to it by itself.
#include "depthwise_conv2d/depthwise_conv2d.hpp"

namespace nasfast::depthwise_conv2d::NASFAST_ISA {

void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl(p, t); }
void backward(const Params& p, const Backward<bfloat16>& t) { backward_impl(p, t); }

}  // namespace nasfast::depthwise_conv2d::NASFAST_ISA
