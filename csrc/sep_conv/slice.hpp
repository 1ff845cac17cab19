// Rows of a map as a depthwise convolution of sep_conv reads them. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "depthwise_conv2d/depthwise_conv2d.hpp"
#include "sep_conv/bands.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;
namespace dw = depthwise_conv2d::NASFAST_ISA;

// The first `real` of Width elements, zeros behind them.
template <class A, int Width, class T>
NASFAST_INLINE Vector<A, Width> load_part(const T* from, int64_t real) {
    if (real == Width) return load_as<A, Width>(from);
    alignas(64) T part[Width] = {};
    for (int64_t i = 0; i < real; ++i) part[i] = from[i];
    return load_as<A, Width>(part);
}
template <int Width, class T, class V>
NASFAST_INLINE void store_part(T* to, V value, int64_t real) {
    if (real == Width) return store_as<T, Width>(to, value);
    alignas(64) T part[Width];
    store_as<T, Width>(part, value);
    for (int64_t i = 0; i < real; ++i) to[i] = part[i];
}

// A vector of channels of the rows that a band of a depthwise convolution reads, in the type of the sums,
// with the columns around the image: each element is converted once for all taps, and no tap needs a check.
// Channels beyond the last are zero.
template <class A>
class Slice {
public:
    static constexpr int kVector = kWidth<A>;

    Slice() = default;
    Slice(Arena& arena, const depthwise_conv2d::Params& d, int64_t rows)
        : length_(d.width + 2 * d.pad_w),
          taps_(d.kernel_h * d.kernel_w),
          values_(
              arena.take<A>(std::min(d.height, rows + (d.kernel_h - 1) * d.dilation_h) * length_ * kVector)),
          weights_(arena.take<A>(taps_ * kVector)),
          sums_(arena.take<A>(taps_ * kVector)) {}

    // A band of the depthwise convolution.
    template <class T>
    void convolve(const depthwise_conv2d::Params& d, const Band& band, const T* input, const A* weights,
                  T* output) {
        constexpr int w = kVector;
        for (int64_t c = 0; c < d.channels; c += w) {
            const int64_t real = std::min<int64_t>(w, d.channels - c);
            read(d, band, input + band.image * d.height * d.width * d.channels, weights, c);
            for (int64_t y = 0; y < band.rows; ++y) {
                T* const row = output + (band.first + y * d.out_width) * d.channels + c;
                by_tiles(d, [&](auto taps, auto pixels, auto step, int64_t x) NASFAST_INLINE_LAMBDA {
                    constexpr int count = decltype(pixels)::value;
                    Vector<A, w> sum[count] = {};
                    convolve_tile<decltype(taps)::value>(d, band.row + y, x, step, sum);
#pragma GCC unroll 8
                    for (int j = 0; j < count; ++j)
                        store_part<w>(row + (x + j * step) * d.channels, sum[j], real);
                });
            }
        }
    }

    // A band of the gradient of the input, of that of an image of outputs through the convolution `d`,
    // turned; and of the band the gradient of the weights, [taps, C], in reverse order.
    template <class T>
    void differentiate(const depthwise_conv2d::Params& d, const Band& band, const T* grad, const A* weights,
                       const T* input, T* grad_input, A* grad_weight) {
        constexpr int w = kVector;
        const int64_t taps = d.kernel_h * d.kernel_w;
        for (int64_t c = 0; c < d.channels; c += w) {
            const int64_t real = std::min<int64_t>(w, d.channels - c);
            read(d, band, grad, weights, c);
            std::fill_n(sums_, taps * w, A(0));
            for (int64_t y = 0; y < band.rows; ++y) {
                const int64_t first = (band.first + y * d.out_width) * d.channels + c;
                by_tiles(d, [&](auto at_once, auto pixels, auto step, int64_t x) NASFAST_INLINE_LAMBDA {
                    constexpr int count = decltype(pixels)::value;
                    const int64_t at = first + x * d.channels;
                    Vector<A, w> sum[count] = {}, own[count];
#pragma GCC unroll 8
                    for (int j = 0; j < count; ++j)
                        own[j] = load_part<A, w>(input + at + j * step * d.channels, real);
                    differentiate_tile<decltype(at_once)::value>(d, band.row + y, x, step, own, sum);
                    if (grad_input)
#pragma GCC unroll 8
                        for (int j = 0; j < count; ++j)
                            store_part<w>(grad_input + at + j * step * d.channels, sum[j], real);
                });
            }
            for (int64_t tap = 0; tap < taps; ++tap)
                std::copy_n(sums_ + tap * w, real, grad_weight + tap * d.channels + c);
        }
    }

private:
    // Calls body(taps, pixels, step, x) for the tiles of a row, with taps, pixels and a step of 1 at compile
    // time.
    template <class Body>
    NASFAST_INLINE static void by_tiles(const depthwise_conv2d::Params& d, const Body& body) {
        constexpr int most = dw::kPixels;
        dw::by_taps(d.kernel_w, [&](auto taps) NASFAST_INLINE_LAMBDA {
            if (d.dilation_w == 1)
                dw::by_tiles<most>(d.out_width, 1, [&](auto pixels, int64_t x) NASFAST_INLINE_LAMBDA {
                    body(taps, pixels, std::integral_constant<int64_t, 1>(), x);
                });
            else
                dw::by_tiles<most>(d.out_width, d.dilation_w,
                                   [&](auto pixels, int64_t x)
                                       NASFAST_INLINE_LAMBDA { body(taps, pixels, d.dilation_w, x); });
        });
    }

    // For a band of outputs, the channels from c on.
    template <class T>
    void read(const depthwise_conv2d::Params& d, const Band& band, const T* image, const A* weights,
              int64_t c) {
        const int64_t real = std::min<int64_t>(kVector, d.channels - c);
        begin_ = std::max<int64_t>(0, band.row - d.pad_h);
        end_ = std::min(d.height, band.row + band.rows + (d.kernel_h - 1) * d.dilation_h - d.pad_h);
        A* to = values_;
        for (int64_t row = begin_; row < end_; ++row) {
            const T* from = image + row * d.width * d.channels + c;
            std::fill_n(to, d.pad_w * kVector, A(0)), to += d.pad_w * kVector;
            for (int64_t x = 0; x < d.width; ++x, from += d.channels, to += kVector)
                store<kVector>(to, load_part<A, kVector>(from, real));
            std::fill_n(to, d.pad_w * kVector, A(0)), to += d.pad_w * kVector;
        }
        for (int64_t tap = 0; tap < taps_; ++tap)
            store<kVector>(weights_ + tap * kVector,
                           load_part<A, kVector>(weights + tap * d.channels + c, real));
    }

    // Calls body(x, sums) with the outputs of row y, `step` pixels apart from x on.
    template <int Taps, int Pixels, class Step>
    NASFAST_INLINE void convolve_tile(const depthwise_conv2d::Params& d, int64_t y, int64_t x, Step step,
                                      Vector<A, kVector> (&sum)[Pixels]) const {
        by_rows<Taps>(d, y, x, [&](const A* row, int64_t tap) NASFAST_INLINE_LAMBDA {
            Vector<A, kVector> factor[Taps];
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) factor[t] = load<kVector>(weights_ + (tap + t) * kVector);
#pragma GCC unroll 16
            for (int i = 0; i < Pixels + Taps - 1; ++i) {
                const auto value = load<kVector>(row + i * step * kVector);
#pragma GCC unroll 5
                for (int t = 0; t < Taps; ++t)
                    if (i - t >= 0 && i - t < Pixels) sum[i - t] += factor[t] * value;
            }
        });
    }
    // The same, and adds to the sums of the taps the products with what `own` has in the outputs' places.
    template <int Taps, int Pixels, class Step>
    NASFAST_INLINE void differentiate_tile(const depthwise_conv2d::Params& d, int64_t y, int64_t x, Step step,
                                           const Vector<A, kVector> (&own)[Pixels],
                                           Vector<A, kVector> (&sum)[Pixels]) const {
        by_rows<Taps>(d, y, x, [&](const A* row, int64_t tap) NASFAST_INLINE_LAMBDA {
            Vector<A, kVector> factor[Taps], product[Taps];
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) {
                factor[t] = load<kVector>(weights_ + (tap + t) * kVector);
                product[t] = load<kVector>(sums_ + (tap + t) * kVector);
            }
#pragma GCC unroll 16
            for (int i = 0; i < Pixels + Taps - 1; ++i) {
                const auto value = load<kVector>(row + i * step * kVector);
#pragma GCC unroll 5
                for (int t = 0; t < Taps; ++t)
                    if (i - t >= 0 && i - t < Pixels) {
                        sum[i - t] += factor[t] * value;
                        product[t] += own[i - t] * value;
                    }
            }
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) store<kVector>(sums_ + (tap + t) * kVector, product[t]);
        });
    }
    // Calls body(inputs, tap) for each run of taps of output (y, x) whose inputs are in the image's rows.
    template <int Taps, class Body>
    NASFAST_INLINE void by_rows(const depthwise_conv2d::Params& d, int64_t y, int64_t x,
                                const Body& body) const {
        for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
            const int64_t row = y - d.pad_h + ky * d.dilation_h;
            if (row < begin_ || row >= end_) continue;
            for (int64_t kx = 0; kx < d.kernel_w; kx += Taps)
                body(values_ + ((row - begin_) * length_ + x + kx * d.dilation_w) * kVector,
                     ky * d.kernel_w + kx);
        }
    }

    int64_t length_ = 0, taps_ = 0, begin_ = 0, end_ = 0;  // rows [begin, end)
    A *values_ = nullptr, *weights_ = nullptr, *sums_ = nullptr;
};

// Whether slices are worth their memory: not where most of a row would be padding, nor where padding that no
// output needs turns negative.
inline bool is_sliced(const depthwise_conv2d::Params& d) {
    return d.pad_w >= 0 && d.pad_w <= 2 * d.width + 32;
}

}  // namespace nasfast::sep_conv::NASFAST_ISA
