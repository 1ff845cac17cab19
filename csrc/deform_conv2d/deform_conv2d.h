// Modulated deformable convolution (DCNv2, Zhu et al., CVPR 2019). Maps are channels last.
#pragma once

#include <cstdint>

#include "common/kernels.hpp"

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
    int64_t offset_step, mask_step;  // elements from one output pixel to the next in offset and in mask
    int64_t weight_channels_last;    // 0: weight and grad_weight are [Co, C/G, kh, kw]; CUDA always gets 1
    int64_t deterministic;           // CUDA: the same bits in every run
    int64_t tf32;                    // CUDA: float32 products may use tf32 tensor cores
};

// K = kernel_h * kernel_w taps, G = groups, D = offset_groups. Null pointers: mask and bias where there is
// none, every gradient that is not wanted (grad_mask only with mask). Dense unless a step is named.
template <class T>
struct Forward {
    using A = Accumulate<T>;
    const T* input;   // [N, H, W, C]
    const A* offset;  // [N, Ho, Wo, D, K, 2], (dy, dx) in pixels; offset_step
    const A* mask;    // [N, Ho, Wo, D, K]; mask_step
    const T* weight;  // [Co, kh, kw, C/G]
    const A* bias;    // [Co]
    T* output;        // [N, Ho, Wo, Co]
};

template <class T>
struct Backward {
    using A = Accumulate<T>;
    const T* grad;    // [N, Ho, Wo, Co]
    const T* input;   // [N, H, W, C]
    const A* offset;  // [N, Ho, Wo, D, K, 2]; offset_step
    const A* mask;    // [N, Ho, Wo, D, K]; mask_step
    const T* weight;  // [Co, kh, kw, C/G]
    T* grad_input;    // [N, H, W, C]
    A* grad_offset;   // [N, Ho, Wo, D, K, 2]
    A* grad_weight;   // [Co, kh, kw, C/G]
    A* grad_bias;     // [Co]
    A* grad_mask;     // [N, Ho, Wo, D, K]
};

NASFAST_KERNELS_PER_ISA
NASFAST_CUDA_KERNELS

// ---- CUDA, with the columns of some output pixels in memory, between which and the weight another library
// makes the products. There is one weight group, `chunked` channels, and no deterministic sum.

struct Part : Params {
    int64_t first_pixel, pixels;  // in [N, Ho, Wo]
};

template <class T>
struct ColumnsForward {
    using A = Accumulate<T>;
    const T* input;  // as in Forward
    const A* offset;
    const A* mask;
    T* columns;  // [pixels, K, C]: the samples, with the mask
};

// Null pointers: every gradient that is not wanted.
template <class T>
struct ColumnsBackward {
    using A = Accumulate<T>;
    const T* grad_columns;  // [pixels, K, C]
    const T* input;         // as in Backward
    const A* offset;
    const A* mask;
    T* columns;      // [pixels, K, C]; may be where grad_columns is
    A* grad_input;   // [N, H, W, C]; is added to
    A* grad_offset;  // [N, Ho, Wo, D, K, 2], of which the pixels' are written
    A* grad_mask;    // [N, Ho, Wo, D, K], likewise
};

namespace cuda {
template <class T>
void columns_forward(const Part&, const ColumnsForward<T>&, void* stream);
template <class T>
void columns_backward(const Part&, const ColumnsBackward<T>&, void* stream);
}  // namespace cuda

}  // namespace nasfast::deform_conv2d
