// The matrix product of the instruction set that is being compiled, for elements of type T.
#pragma once

#ifdef NASFAST_BF16
#include "common/gemm_bf16.hpp"
#else
#include "common/gemm.hpp"
#endif

namespace nasfast::NASFAST_ISA {

#ifdef NASFAST_BF16
template <class T>
using ProductOf = Bf16Product;
#else
template <class T>
using ProductOf = VectorProduct<Accumulate<T>>;
#endif

}  // namespace nasfast::NASFAST_ISA
