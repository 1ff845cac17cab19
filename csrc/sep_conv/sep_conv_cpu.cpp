// CPU kernels of sep_conv, compiled once per instruction set.
#include "sep_conv/sep_conv.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

NASFAST_DEFINE_KERNELS

}  // namespace nasfast::sep_conv::NASFAST_ISA
