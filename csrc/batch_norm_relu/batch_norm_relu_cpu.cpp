// CPU kernels of batch_norm_relu, compiled once per instruction set.
#include "batch_norm_relu/batch_norm_relu.hpp"

namespace nasfast::batch_norm_relu::NASFAST_ISA {

NASFAST_DEFINE_KERNELS

}  // namespace nasfast::batch_norm_relu::NASFAST_ISA
