// Depthwise convolution, pointwise convolution, batch normalisation in training and ReLU. Maps are channels
// last.
#pragma once

#include <cstdint>

#include "common/kernels.hpp"

namespace nasfast::sep_conv {

// Fields in the order of nasfast.ops.sep_conv.Geometry.
struct Params {
    int64_t batch, channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t pad_h, pad_w;
    int64_t dilation_h, dilation_w;
    double eps;
};

template <class T>
struct Forward {
    using A = Accumulate<T>;
    const T* input;      // [N, H, W, C]
    const A* depthwise;  // [C, kh, kw]
    const A* pointwise;  // [Co, C]
    const A* weight;     // [Co]
    const A* bias;       // [Co]
    T* output;           // [N, Ho, Wo, Co]
    T* middle;           // [N, Ho, Wo, C]: of the depthwise convolution
    T* raw;              // [N, Ho, Wo, Co]: of the pointwise convolution
    A* statistics;       // [2, Co]: mean, biased variance
};

template <class T>
struct Backward {
    using A = Accumulate<T>;
    const T* grad;        // [N, Ho, Wo, Co]
    const T* input;       // [N, H, W, C]
    const A* depthwise;   // [C, kh, kw]
    const A* pointwise;   // [Co, C]
    const A* weight;      // [Co]
    const A* bias;        // [Co]
    const T* middle;      // [N, Ho, Wo, C]
    const T* raw;         // [N, Ho, Wo, Co]
    const A* statistics;  // [2, Co]
    T* grad_input;        // [N, H, W, C]; null: not wanted
    A* grad_depthwise;    // [C, kh, kw]
    A* grad_pointwise;    // [Co, C]
    A* grad_weight;       // [Co]
    A* grad_bias;         // [Co]
};

NASFAST_KERNELS_PER_ISA

}  // namespace nasfast::sep_conv
