// Where the samples of a deformable convolution lie; for forward and backward.
#pragma once

#include "common/cuda_kernel.cuh"
#include "deform_conv2d/deform_conv2d.h"

namespace nasfast::deform_conv2d::cuda {

using namespace nasfast::cuda;

// Kernels count pixels and elements in 64 bits, but what is named here in 32.
inline void check_sizes(const Params& p) {
    const struct {
        const char* name;
        int64_t size;
    } sizes[] = {
        {"deform_conv2d: CUDA wants at most 2^30 channels of input", p.channels},
        {"deform_conv2d: CUDA wants at most 2^30 channels of the output", p.out_channels},
        {"deform_conv2d: CUDA wants at most 2^30 rows of input with the padding", p.height + 2 * p.pad_h},
        {"deform_conv2d: CUDA wants at most 2^30 columns of input with the padding", p.width + 2 * p.pad_w},
        {"deform_conv2d: CUDA wants at most 2^30 elements of weight for a channel",
         p.channels / p.groups * p.kernel_h * p.kernel_w},
        {"deform_conv2d: CUDA wants at most 2^30 offsets of a pixel",
         p.offset_groups * p.kernel_h * p.kernel_w}};
    for (const auto& [name, size] : sizes)
        if (size > 1 << 30) refuse(name, size, "split the call");
}

// The grid of so many blocks.
inline dim3 grid(int64_t blocks) {
    if (blocks > 0x7fffffff)
        refuse("deform_conv2d: CUDA wants at most 2^31 - 1 tiles of output pixels", blocks,
               "split the batch");
    return dim3(unsigned(blocks));
}

// Corners are numbered 0 upper left, 1 upper right, 2 lower left, 3 lower right.
template <class A>
struct Sample {
    int64_t corner;   // index of corner 0 in [N, H, W]; meaningless where nothing is inside
    A y, x;           // from corner 0 to the sample, in [0, 1)
    unsigned inside;  // bit i: corner i lies in the image. No bit for a sample that does not count

    // The bilinear weights, zero outside the image.
    __device__ __forceinline__ void weights(A (&weights)[4], A factor) const {
        const A top = (1 - y) * factor, bottom = y * factor;
        weights[0] = inside & 1 ? top * (1 - x) : 0;
        weights[1] = inside & 2 ? top * x : 0;
        weights[2] = inside & 4 ? bottom * (1 - x) : 0;
        weights[3] = inside & 8 ? bottom * x : 0;
    }
};

// Index in [N, H, W] of a corner, from that of corner 0.
__device__ __forceinline__ int64_t corner_step(const Params& p, int corner) {
    return (corner & 1) + (corner & 2 ? p.width : 0);
}

// An output pixel.
struct Place {
    int64_t image;
    int y, x;
};

// Of an index in [N, Ho, Wo].
__device__ __forceinline__ Place place_of(const Params& p, int64_t pixel) {
    const int64_t line = pixel / p.out_width;
    return {line / p.out_height, int(line % p.out_height), int(pixel % p.out_width)};
}

// The sample of one tap, by its `shift` (dy, dx).
template <class A>
__device__ __forceinline__ Sample<A> locate(const Params& p, const A* shift, const Place& place, int tap) {
    const int line = tap / int(p.kernel_w), place_in_line = tap % int(p.kernel_w);
    const A y = A(place.y * int(p.stride_h) - int(p.pad_h) + line * int(p.dilation_h)) + shift[0];
    const A x = A(place.x * int(p.stride_w) - int(p.pad_w) + place_in_line * int(p.dilation_w)) + shift[1];
    // false for NaN; what is true fits into an integer
    if (!(y > -1 && y < A(int(p.height)) && x > -1 && x < A(int(p.width)))) return {0, 0, 0, 0};
    const A top = floor(y), left = floor(x);
    const int row = int(top), column = int(left), height = int(p.height), width = int(p.width);
    const unsigned rows = (row >= 0 ? 3u : 0u) | (row + 1 < height ? 12u : 0u);
    const unsigned columns = (column >= 0 ? 5u : 0u) | (column + 1 < width ? 10u : 0u);
    return {(place.image * height + row) * width + column, y - top, x - left, rows & columns};
}

// The same by the index of the output pixel in [N, Ho, Wo], the offset group and the tap.
template <class A>
__device__ __forceinline__ Sample<A> locate(const Params& p, const A* offset, int64_t pixel, int64_t d,
                                            int64_t tap) {
    const A* shift = offset + pixel * p.offset_step + (d * p.kernel_h * p.kernel_w + tap) * 2;
    return locate(p, shift, place_of(p, pixel), int(tap));
}

// The mask's factor of that sample.
template <class A>
__device__ __forceinline__ A mask_at(const Params& p, const A* mask, int64_t pixel, int64_t d, int64_t tap) {
    return mask ? mask[pixel * p.mask_step + d * p.kernel_h * p.kernel_w + tap] : A(1);
}

// The sum of the corners' chunks; tf32: rounded to it.
template <bool tf32, class T, class A>
__device__ __forceinline__ uint4 weighted_sum(const uint4 (&chunks)[4], const A (&weights)[4], T type) {
    if constexpr (sizeof(T) == 2) {
        uint4 result;
        const uint32_t* words[4];
        uint32_t* sums = &result.x;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = &chunks[i].x;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float first = 0, second = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = widen_pair(words[i][word], type);
                first += weights[i] * pair.x;
                second += weights[i] * pair.y;
            }
            sums[word] = narrow_pair(first, second, type);
        }
        return result;
    } else {
        Chunk<T> result{};
#pragma unroll
        for (int e = 0; e < Chunk<T>::size; ++e) {
#pragma unroll
            for (int i = 0; i < 4; ++i) result.values[e] += weights[i] * as_chunk<T>(chunks[i]).values[e];
            if constexpr (tf32) result.values[e] = bits_to_float(to_tf32(result.values[e]));
        }
        return as_words(result);
    }
}

}  // namespace nasfast::deform_conv2d::cuda
