// CPU kernels of depthwise_conv2d, compiled once per instruction set.
#include "depthwise_conv2d/depthwise_conv2d.hpp"

namespace nasfast::depthwise_conv2d::NASFAST_ISA {

NASFAST_DEFINE_KERNELS

}  // namespace nasfast::depthwise_conv2d::NASFAST_ISA
