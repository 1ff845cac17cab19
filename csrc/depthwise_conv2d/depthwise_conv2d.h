// Depthwise convolution of stride 1: one kernel for each channel. Maps are channels last.
#pragma once

#include <cstdint>

#include "common/kernels.hpp"

namespace nasfast::depthwise_conv2d {

// Fields in the order of nasfast.ops.depthwise_conv2d.Geometry.
struct Params {
    int64_t batch, channels, height, width;
    int64_t out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t pad_h, pad_w;
    int64_t dilation_h, dilation_w;
};

template <class T>
struct Forward {
    const T* input;   // [N, H, W, C]
    const T* weight;  // [C, kh, kw]
    T* output;        // [N, Ho, Wo, C]
};

// Null pointers: gradients that are not wanted.
template <class T>
struct Backward {
    const T* grad;               // [N, Ho, Wo, C]
    const T* input;              // [N, H, W, C]
    const T* weight;             // [C, kh, kw]
    T* grad_input;               // [N, H, W, C]
    Accumulate<T>* grad_weight;  // [C, kh, kw]
};

NASFAST_KERNELS_PER_ISA

}  // namespace nasfast::depthwise_conv2d
