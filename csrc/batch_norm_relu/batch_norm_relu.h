// Batch normalisation in training, and the ReLU behind it. Maps are channels last.
#pragma once

#include <cstdint>

#include "common/kernels.hpp"

namespace nasfast::batch_norm_relu {

// Fields in the order of nasfast.ops.batch_norm_relu.Sizes.
struct Params {
    int64_t pixels, channels;  // pixels of the whole batch
    double eps;
};

template <class T>
struct Forward {
    using A = Accumulate<T>;
    const T* input;   // [pixels, C]
    const A* weight;  // [C]
    const A* bias;    // [C]
    T* output;        // [pixels, C]
    A* statistics;    // [2, C]: mean, biased variance
};

template <class T>
struct Backward {
    using A = Accumulate<T>;
    const T* grad;        // [pixels, C]
    const T* input;       // [pixels, C]
    const A* weight;      // [C]
    const A* bias;        // [C]
    const A* statistics;  // [2, C]
    T* grad_input;        // [pixels, C]
    A* grad_weight;       // [C]
    A* grad_bias;         // [C]
};

NASFAST_KERNELS_PER_ISA

}  // namespace nasfast::batch_norm_relu
