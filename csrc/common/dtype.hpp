// Element types of tensors. The half types are storage only; kernels compute in Accumulate<T>.
#pragma once

#include <cstdint>

namespace nasfast {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Codes of nasfast.ops._native.DTYPES.
enum class DType : int64_t { float32, float64, bfloat16, float16 };

template <class T>
struct AccumulateOf {
    using type = float;
};
template <>
struct AccumulateOf<double> {
    using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace nasfast
