// CPU kernels of deform_conv2d, compiled once per instruction set. Samples go straight into the operand of a
// matrix product, a cache-resident tile at a time. Results are identical for any number of threads: the order
// of every sum is fixed by the sizes.
#include "deform_conv2d/deform_conv2d_backward.hpp"
#include "deform_conv2d/deform_conv2d_forward.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {

NASFAST_DEFINE_KERNELS

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
