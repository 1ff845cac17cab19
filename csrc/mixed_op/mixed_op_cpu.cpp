// CPU kernels of the mixed operation, compiled once per instruction set. Results are identical for any number
// of threads: the sizes alone decide the order of every sum.
#include "mixed_op/mixed_op_backward.hpp"
#include "mixed_op/mixed_op_forward.hpp"

namespace nasfast::mixed_op::NASFAST_ISA {

NASFAST_DEFINE_KERNELS

}  // namespace nasfast::mixed_op::NASFAST_ISA
