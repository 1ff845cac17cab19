// CPU kernels of deform_conv2d, compiled once per instruction set. Every unit of work is a fixed piece of
// the problem and owns what it writes: results are identical for any number of threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "deform_conv2d/deform_conv2d.h"

namespace nasfast::deform_conv2d::NASFAST_ISA {
namespace {

using nasfast::NASFAST_ISA::gemm;
using nasfast::NASFAST_ISA::parallel_for;

constexpr int64_t kTile = 32;   // output pixels per matrix product
constexpr int64_t kSlice = 32;  // input channels per unit of the backward pass

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bilinear sample: the four corners (top left, top right, bottom left, bottom right), their weights and the
// derivatives of the weights by y and x. A corner outside the image is zero and marked by index -1.
template <class T>
struct Sample {
    int64_t corner[4];  // element index of the corner's first channel
    T weight[4], weight_dy[4], weight_dx[4];
    T mask;
};

// Samples tap `tap` of offset group `group` at output pixel `pixel` of the flattened [N, Ho, Wo]. False where
// the position lies outside -1 < y < H, -1 < x < W or is not a number: value and gradients are then zero.
template <class T>
bool locate(const Params& p, const T* offset, const T* mask, int64_t pixel, int64_t group, int64_t tap,
            Sample<T>& sample) {
    const int64_t column = pixel % p.out_width;
    const int64_t row = pixel / p.out_width % p.out_height;
    const int64_t image = pixel / (p.out_width * p.out_height);
    const int64_t index = (pixel * p.offset_groups + group) * p.kernel_h * p.kernel_w + tap;
    const T y = T(row * p.stride_h - p.pad_h + tap / p.kernel_w * p.dilation_h) + offset[2 * index];
    const T x = T(column * p.stride_w - p.pad_w + tap % p.kernel_w * p.dilation_w) + offset[2 * index + 1];
    if (!(y > -1 && y < T(p.height) && x > -1 && x < T(p.width))) return false;

    const T top = std::floor(y), left = std::floor(x);
    const T wy = y - top, wx = x - left;
    const T weight[4] = {(1 - wy) * (1 - wx), (1 - wy) * wx, wy * (1 - wx), wy * wx};
    const T weight_dy[4] = {wx - 1, -wx, 1 - wx, wx};
    const T weight_dx[4] = {wy - 1, 1 - wy, -wy, wy};
    for (int i = 0; i < 4; ++i) {
        const int64_t corner_y = int64_t(top) + i / 2, corner_x = int64_t(left) + i % 2;
        const bool inside = corner_y >= 0 && corner_y < p.height && corner_x >= 0 && corner_x < p.width;
        sample.corner[i] = inside ? ((image * p.height + corner_y) * p.width + corner_x) * p.channels : -1;
        sample.weight[i] = weight[i];
        sample.weight_dy[i] = weight_dy[i];
        sample.weight_dx[i] = weight_dx[i];
    }
    sample.mask = mask ? mask[index] : T(1);
    return true;
}

// columns[0:count] = mask * bilinear(input)[begin:begin+count], channels of one offset group.
template <class T>
void sample_channels(const Params& p, const T* input, const T* offset, const T* mask, int64_t pixel,
                     int64_t tap, int64_t begin, int64_t count, T* columns) {
    std::fill_n(columns, count, T(0));
    Sample<T> sample;
    if (!locate(p, offset, mask, pixel, begin / (p.channels / p.offset_groups), tap, sample)) return;
    for (int i = 0; i < 4; ++i) {
        if (sample.corner[i] < 0) continue;
        const T* corner = input + sample.corner[i] + begin;
        const T weight = sample.weight[i] * sample.mask;
        for (int64_t c = 0; c < count; ++c) columns[c] += weight * corner[c];
    }
}

// Runs of at most kSlice input channels that lie in one group and one offset group.
struct Slice {
    int64_t begin, count;
};

std::vector<Slice> slices(const Params& p) {
    const int64_t per_group = p.channels / p.groups, per_offset_group = p.channels / p.offset_groups;
    std::vector<Slice> result;
    for (int64_t begin = 0; begin < p.channels; begin += result.back().count) {
        const int64_t to_group_end = per_group - begin % per_group;
        const int64_t to_offset_group_end = per_offset_group - begin % per_offset_group;
        result.push_back({begin, std::min({kSlice, to_group_end, to_offset_group_end})});
    }
    return result;
}

// Output [tile, Co] = bias + sum over taps of columns [tile, C] @ weight; a unit is a tile of output pixels.
template <class T>
void forward_impl(const Params& p, const Forward<T>& t) {
    const int64_t pixels = p.batch * p.out_height * p.out_width, taps = p.kernel_h * p.kernel_w;
    const int64_t in = p.channels / p.groups, out = p.out_channels / p.groups;
    const int64_t per_offset_group = p.channels / p.offset_groups;
    parallel_for<T>(ceil_div(pixels, kTile), kTile * p.channels, [&](int64_t unit, T* columns) {  // [tile, C]
        const int64_t first = unit * kTile, rows = std::min(kTile, pixels - first);
        T* output = t.output + first * p.out_channels;
        for (int64_t i = 0; i < rows; ++i) {
            if (t.bias)
                std::copy_n(t.bias, p.out_channels, output + i * p.out_channels);
            else
                std::fill_n(output + i * p.out_channels, p.out_channels, T(0));
        }
        for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < p.channels; c += per_offset_group)
                    sample_channels(p, t.input, t.offset, t.mask, first + i, tap, c, per_offset_group,
                                    columns + i * p.channels + c);
            for (int64_t group = 0; group < p.groups; ++group)
                gemm(rows, out, in, columns + group * in, p.channels, 1,
                     t.weight + (group * taps + tap) * in * out, out, output + group * out, p.out_channels);
        }
    });
}

// Gradients of input, offset and mask. A unit is one image and one slice of channels: it owns its part of
// grad_input; the sums over channels of grad_offset and grad_mask are completed over the slices at the end.
template <class T>
void backward_data(const Params& p, const Backward<T>& t) {
    const int64_t image_pixels = p.out_height * p.out_width, pixels = p.batch * image_pixels;
    const int64_t taps = p.kernel_h * p.kernel_w, in = p.channels / p.groups, out = p.out_channels / p.groups;
    const int64_t per_offset_group = p.channels / p.offset_groups;
    const std::vector<Slice> parts = slices(p);
    const int64_t count = static_cast<int64_t>(parts.size());
    const bool wants_position = t.grad_offset || t.grad_mask;
    if (t.grad_input) std::fill_n(t.grad_input, p.batch * p.height * p.width * p.channels, T(0));

    // [slices, N * Ho * Wo, K, 3]: gradients by dy, dx and mask summed over the slice
    std::unique_ptr<T[]> partial(new T[static_cast<size_t>(wants_position ? count * pixels * taps * 3 : 0)]);
    parallel_for<T>(p.batch * count, kTile * kSlice, [&](int64_t unit, T* grad_columns) {  // [tile, slice]
        const int64_t part = unit % count, image = unit / count;
        const Slice slice = parts[part];
        const int64_t group = slice.begin / in;
        for (int64_t first = image * image_pixels; first < (image + 1) * image_pixels; first += kTile) {
            const int64_t rows = std::min(kTile, (image + 1) * image_pixels - first);
            for (int64_t tap = 0; tap < taps; ++tap) {
                std::fill_n(grad_columns, rows * kSlice, T(0));
                gemm(rows, slice.count, out, t.grad + first * p.out_channels + group * out, p.out_channels, 1,
                     t.weight + (group * taps + tap) * in * out + slice.begin % in, in, grad_columns, kSlice);
                for (int64_t i = 0; i < rows; ++i) {
                    const T* grad = grad_columns + i * kSlice;
                    T dy = 0, dx = 0, dmask = 0;
                    Sample<T> sample;
                    if (locate(p, t.offset, t.mask, first + i, slice.begin / per_offset_group, tap, sample)) {
                        for (int corner = 0; corner < 4; ++corner) {
                            if (sample.corner[corner] < 0) continue;
                            const int64_t at = sample.corner[corner] + slice.begin;
                            if (t.grad_input) {
                                const T weight = sample.weight[corner] * sample.mask;
                                for (int64_t c = 0; c < slice.count; ++c)
                                    t.grad_input[at + c] += weight * grad[c];
                            }
                            if (wants_position) {
                                T dot = 0;
#pragma omp simd reduction(+ : dot)
                                for (int64_t c = 0; c < slice.count; ++c) dot += grad[c] * t.input[at + c];
                                dy += sample.weight_dy[corner] * dot;
                                dx += sample.weight_dx[corner] * dot;
                                dmask += sample.weight[corner] * dot;
                            }
                        }
                        dy *= sample.mask;
                        dx *= sample.mask;
                    }
                    if (wants_position) {
                        T* sums = partial.get() + ((part * pixels + first + i) * taps + tap) * 3;
                        sums[0] = dy, sums[1] = dx, sums[2] = dmask;
                    }
                }
            }
        }
    });
    if (!wants_position) return;

    parallel_for<T>(ceil_div(pixels, kTile), 0, [&](int64_t unit, T*) {
        const int64_t per_pixel = p.offset_groups * taps, first = unit * kTile;
        for (int64_t at = first * per_pixel; at < std::min(first + kTile, pixels) * per_pixel; ++at) {
            const int64_t pixel = at / per_pixel, group = at % per_pixel / taps, tap = at % taps;
            T dy = 0, dx = 0, dmask = 0;
            for (int64_t part = 0; part < count; ++part) {
                if (parts[part].begin / per_offset_group != group) continue;
                const T* sums = partial.get() + ((part * pixels + pixel) * taps + tap) * 3;
                dy += sums[0], dx += sums[1], dmask += sums[2];
            }
            if (t.grad_offset) t.grad_offset[2 * at] = dy, t.grad_offset[2 * at + 1] = dx;
            if (t.grad_mask) t.grad_mask[at] = dmask;
        }
    });
}

// Weight gradient. A unit is one tap and one slice of channels, that is, rows of the weight matrix.
template <class T>
void backward_weight(const Params& p, const Backward<T>& t) {
    const int64_t pixels = p.batch * p.out_height * p.out_width, taps = p.kernel_h * p.kernel_w;
    const int64_t in = p.channels / p.groups, out = p.out_channels / p.groups;
    const std::vector<Slice> parts = slices(p);
    const int64_t count = static_cast<int64_t>(parts.size());
    parallel_for<T>(taps * count, kTile * kSlice, [&](int64_t unit, T* columns) {  // [tile, slice]
        const int64_t tap = unit % taps;
        const Slice slice = parts[unit / taps];
        const int64_t group = slice.begin / in;
        T* grad_weight = t.grad_weight + ((group * taps + tap) * in + slice.begin % in) * out;
        std::fill_n(grad_weight, slice.count * out, T(0));
        for (int64_t first = 0; first < pixels; first += kTile) {
            const int64_t rows = std::min(kTile, pixels - first);
            for (int64_t i = 0; i < rows; ++i)
                sample_channels(p, t.input, t.offset, t.mask, first + i, tap, slice.begin, slice.count,
                                columns + i * kSlice);
            gemm(slice.count, out, rows, columns, 1, kSlice, t.grad + first * p.out_channels + group * out,
                 p.out_channels, grad_weight, out);
        }
    });
}

// Bias gradient. A unit is a run of output channels; sums in double, as they run over all pixels.
template <class T>
void backward_bias(const Params& p, const Backward<T>& t) {
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    parallel_for<double>(ceil_div(p.out_channels, kSlice), kSlice, [&](int64_t unit, double* sums) {
        const int64_t begin = unit * kSlice, count = std::min(kSlice, p.out_channels - begin);
        std::fill_n(sums, count, 0.0);
        for (int64_t pixel = 0; pixel < pixels; ++pixel)
            for (int64_t c = 0; c < count; ++c) sums[c] += t.grad[pixel * p.out_channels + begin + c];
        std::copy_n(sums, count, t.grad_bias + begin);
    });
}

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    if (t.grad_input || t.grad_offset || t.grad_mask) backward_data(p, t);
    if (t.grad_weight) backward_weight(p, t);
    if (t.grad_bias) backward_bias(p, t);
}

}  // namespace

void forward(const Params& p, const Forward<float>& t) { forward_impl(p, t); }
void forward(const Params& p, const Forward<double>& t) { forward_impl(p, t); }
void backward(const Params& p, const Backward<float>& t) { backward_impl(p, t); }
void backward(const Params& p, const Backward<double>& t) { backward_impl(p, t); }

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
