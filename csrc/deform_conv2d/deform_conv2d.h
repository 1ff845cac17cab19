// Modulated deformable convolution (DCNv2, Zhu et al., CVPR 2019). All tensors are dense, channels last.
#pragma once

#include <cstdint>

#include "common/isa.hpp"

namespace nasfast::deform_conv2d {

// Fields in the order of nasfast.ops.deform_conv2d.Geometry.
struct Params {
    int64_t batch, channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_h, pad_w;
    int64_t dilation_h, dilation_w;
    int64_t groups, offset_groups;
};

// K = kernel_h * kernel_w taps, G = groups, D = offset_groups. Null pointers: mask and bias where there is
// none, every gradient that is not wanted (grad_mask only with mask).
template <class T>
struct Forward {
    const T* input;   // [N, H, W, C]
    const T* offset;  // [N, Ho, Wo, D, K, 2], (dy, dx) in pixels
    const T* mask;    // [N, Ho, Wo, D, K]
    const T* weight;  // [G, K, C/G, Co/G]
    const T* bias;    // [Co]
    T* output;        // [N, Ho, Wo, Co]
};

template <class T>
struct Backward {
    const T* grad;    // [N, Ho, Wo, Co]
    const T* input;   // [N, H, W, C]
    const T* offset;  // [N, Ho, Wo, D, K, 2]
    const T* mask;    // [N, Ho, Wo, D, K]
    const T* weight;  // [G, K, Co/G, C/G], transposed against Forward
    T* grad_input;    // [N, H, W, C]
    T* grad_offset;   // [N, Ho, Wo, D, K, 2]
    T* grad_weight;   // [G, K, C/G, Co/G]
    T* grad_bias;     // [Co]
    T* grad_mask;     // [N, Ho, Wo, D, K]
};

NASFAST_PER_ISA(                                           //
    void forward(const Params&, const Forward<float>&);    //
    void forward(const Params&, const Forward<double>&);   //
    void backward(const Params&, const Backward<float>&);  //
    void backward(const Params&, const Backward<double>&);)

}  // namespace nasfast::deform_conv2d
