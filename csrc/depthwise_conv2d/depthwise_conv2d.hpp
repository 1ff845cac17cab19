// Both passes of depthwise_conv2d on the CPU. Included by per-ISA sources.
//
// A tile is a few pixels of a row, `dilation` apart: neighbouring taps then read the same inputs, and each
// input is loaded once for all taps of a row of the kernel. The tile's sums stay in registers over the whole
// kernel. The order of every sum is fixed by the sizes: results are the same for any number of threads.
#pragma once

#include <cstdint>

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace nasfast::depthwise_conv2d::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

constexpr int kPixels = 8;     // of a tile, at most
constexpr int64_t kBand = 16;  // output rows that one partial sum of the weight's gradient covers

// Pixels of a tile where channels fill Width lanes: the few channels left over are not worth much code.
template <class A, int Width>
constexpr int kTile = Width == kWidth<A> ? kPixels : 1;

// Calls body(taps) with the number of taps, at compile time, that a tile takes at once: a row of the kernel,
// or one tap.
template <class Body>
void by_taps(int64_t kernel_w, const Body& body) {
    if (kernel_w == 3)
        body(std::integral_constant<int, 3>());
    else if (kernel_w == 5)
        body(std::integral_constant<int, 5>());
    else
        body(std::integral_constant<int, 1>());
}

// Calls body(pixels, x) for the tiles of a row: pixels x, x + dilation, .. of it.
template <int Most, class Body>
NASFAST_INLINE void by_tiles(int64_t width, int64_t dilation, const Body& body) {
    for (int64_t phase = 0; phase < std::min(dilation, width); ++phase)
        by_vectors<Most>(ceil_div(width - phase, dilation),
                         [&](auto pixels, int64_t i)
                             NASFAST_INLINE_LAMBDA { body(pixels, phase + i * dilation); });
}

// Calls body(i, value) with the inputs of a tile: that of pixel j and tap t is i = j + t. Those outside are
// zero, and left out.
template <int Count, class A, int Width, class T, class Body>
NASFAST_INLINE void by_inputs(const Params& p, const T* row, int64_t x, const Body& body) {
    const int64_t step = p.dilation_w * p.channels;
    if (x >= 0 && x + (Count - 1) * p.dilation_w < p.width) {
        const T* const from = row + x * p.channels;
#pragma GCC unroll 16
        for (int i = 0; i < Count; ++i) body(i, load_as<A, Width>(from + i * step));
        return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
        const int64_t at = x + i * p.dilation_w;
        if (static_cast<uint64_t>(at) < static_cast<uint64_t>(p.width))
            body(i, load_as<A, Width>(row + at * p.channels));
    }
}

// Row of the image that a row of the kernel reads for output row y, or null outside.
template <class T>
const T* input_row(const Params& p, const T* image, int64_t y, int64_t tap_y) {
    const int64_t at = y - p.pad_h + tap_y * p.dilation_h;
    return at < 0 || at >= p.height ? nullptr : image + at * p.width * p.channels;
}

// Pixel j of the tile goes to `to + j * dilation * step`.
template <int Taps, int Pixels, int Width, class T, class To>
NASFAST_INLINE void convolve_tile(const Params& p, const T* image, const Accumulate<T>* weight, int64_t y,
                                  int64_t x, To* to, int64_t step) {
    using A = Accumulate<T>;
    Vector<A, Width> sum[Pixels] = {};
    for (int64_t ky = 0; ky < p.kernel_h; ++ky) {
        const T* const row = input_row(p, image, y, ky);
        if (!row) continue;
        for (int64_t kx = 0; kx < p.kernel_w; kx += Taps) {
            Vector<A, Width> factor[Taps];
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t)
                factor[t] = load<Width>(weight + (ky * p.kernel_w + kx + t) * p.channels);
            by_inputs<Pixels + Taps - 1, A, Width>(p, row, x - p.pad_w + kx * p.dilation_w,
                                                   [&](int i, auto value) NASFAST_INLINE_LAMBDA {
#pragma GCC unroll 5
                                                       for (int t = 0; t < Taps; ++t)
                                                           if (i - t >= 0 && i - t < Pixels)
                                                               sum[i - t] += factor[t] * value;
                                                   });
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < Pixels; ++j) store_as<To, Width>(to + j * p.dilation_w * step, sum[j]);
}

// output = input * weights [kh, kw, C]; a unit is a row.
template <class T>
void convolve(const Params& p, const T* input, const Accumulate<T>* weights, T* output) {
    using A = Accumulate<T>;
    by_taps(p.kernel_w, [&](auto taps) {
        parallel_for(p.batch * p.out_height, [&](int64_t unit) {
            const T* const image = input + unit / p.out_height * p.height * p.width * p.channels;
            T* const row = output + unit * p.out_width * p.channels;
            by_vectors<kWidth<A>>(p.channels, [&](auto width, int64_t c) {
                constexpr int w = decltype(width)::value;
                by_tiles<kTile<A, w>>(p.out_width, p.dilation_w,
                                      [&](auto pixels, int64_t x) NASFAST_INLINE_LAMBDA {
                                          convolve_tile<decltype(taps)::value, decltype(pixels)::value, w>(
                                              p, image + c, weights + c, unit % p.out_height, x,
                                              row + x * p.channels + c, p.channels);
                                      });
            });
        });
    });
}

// Adds a row of outputs to the gradients of a row of the kernel; two sums of each, for the sake of latency.
template <int Taps, int Width, class T>
NASFAST_INLINE void correlate_row(const Params& p, const T* grad, const T* input, int64_t kx,
                                  Vector<Accumulate<T>, Width> (&sum)[2][Taps]) {
    using A = Accumulate<T>;
    by_tiles<kTile<A, Width>>(p.out_width, p.dilation_w, [&](auto pixels, int64_t x) NASFAST_INLINE_LAMBDA {
        constexpr int count = decltype(pixels)::value;
        Vector<A, Width> factor[count];
#pragma GCC unroll 8
        for (int j = 0; j < count; ++j)
            factor[j] = load_as<A, Width>(grad + (x + j * p.dilation_w) * p.channels);
        by_inputs<count + Taps - 1, A, Width>(p, input, x - p.pad_w + kx * p.dilation_w,
                                              [&](int i, auto value) NASFAST_INLINE_LAMBDA {
#pragma GCC unroll 5
                                                  for (int t = 0; t < Taps; ++t)
                                                      if (i - t >= 0 && i - t < count)
                                                          sum[i % 2][t] += factor[i - t] * value;
                                              });
    });
}

// grad_weight [C, kh, kw]; a unit is a band of rows of an image, whose sums are added up in order.
template <class T>
void correlate(const Params& p, const T* grad, const T* input, Accumulate<T>* grad_weight) {
    using A = Accumulate<T>;
    const int64_t taps = p.kernel_h * p.kernel_w, bands = ceil_div(p.out_height, kBand);
    const Array<A> partial(p.batch * bands * taps * p.channels);
    by_taps(p.kernel_w, [&](auto at_once) {
        constexpr int count = decltype(at_once)::value;
        parallel_for(p.batch * bands, [&](int64_t unit) {
            const int64_t image = unit / bands, begin = unit % bands * kBand,
                          end = std::min(begin + kBand, p.out_height);
            const T* const x = input + image * p.height * p.width * p.channels;
            const T* const dy = grad + image * p.out_height * p.out_width * p.channels;
            by_vectors<kWidth<A>>(p.channels, [&](auto width, int64_t c) {
                constexpr int w = decltype(width)::value;
                for (int64_t tap = 0; tap < taps; tap += count) {
                    Vector<A, w> sum[2][count] = {};
                    for (int64_t y = begin; y < end; ++y)
                        if (const T* const row = input_row(p, x + c, y, tap / p.kernel_w))
                            correlate_row<count, w>(p, dy + y * p.out_width * p.channels + c, row,
                                                    tap % p.kernel_w, sum);
                    for (int t = 0; t < count; ++t)
                        store<w>(partial.get() + (unit * taps + tap + t) * p.channels + c,
                                 sum[0][t] + sum[1][t]);
                }
            });
        });
    });
    parallel_for(taps, [&](int64_t tap) {
        for (int64_t c = 0; c < p.channels; ++c) {
            A sum = 0;
            for (int64_t unit = 0; unit < p.batch * bands; ++unit)
                sum += partial.get()[(unit * taps + tap) * p.channels + c];
            grad_weight[c * taps + tap] = sum;
        }
    });
}

// [C, taps] to [taps, C], in reverse order of the taps if asked.
template <class T>
Array<Accumulate<T>> arrange(const Params& p, const T* weight, bool reverse) {
    const int64_t taps = p.kernel_h * p.kernel_w;
    Array<Accumulate<T>> arranged(taps * p.channels);
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
            arranged.get()[(reverse ? taps - 1 - tap : tap) * p.channels + c] = widen(weight[c * taps + tap]);
    return arranged;
}

template <class T>
void forward_impl(const Params& p, const Forward<T>& t) {
    convolve(p, t.input, arrange(p, t.weight, false).get(), t.output);
}

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    if (t.grad_input) {
        // that of the input is a convolution of the output's, by the kernel turned around
        Params back = p;
        std::swap(back.height, back.out_height), std::swap(back.width, back.out_width);
        back.pad_h = p.dilation_h * (p.kernel_h - 1) - p.pad_h;
        back.pad_w = p.dilation_w * (p.kernel_w - 1) - p.pad_w;
        convolve(back, t.grad, arrange(p, t.weight, true).get(), t.grad_input);
    }
    if (t.grad_weight) correlate(p, t.grad, t.input, t.grad_weight);
}

}  // namespace nasfast::depthwise_conv2d::NASFAST_ISA
