// Both passes of batch_norm_relu on the CPU. Included by per-ISA sources.
//
// Each pass reads its maps twice, once for sums over the batch and once for the result; what lies between
// normalisation and ReLU is computed again in the backward pass. Sums are of chunks of pixels that stay in
// the L1 cache, added up in double in the order of the chunks: results are the same for any number of
// threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "batch_norm_relu/batch_norm_relu.h"
#include "common/gemm.hpp"
#include "common/parallel.hpp"

namespace nasfast::batch_norm_relu::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

constexpr int64_t kChunkBytes = 1 << 14;
constexpr int kLanes = 4;  // sums side by side, for the sake of latency

// Pixels in runs that one thread works on.
struct Chunks {
    int64_t size, count;

    template <class T>
    Chunks(const Params& p, const T*)
        : size(std::max<int64_t>(kLanes, kChunkBytes / sizeof(T) / p.channels)),
          count(ceil_div(p.pixels, size)) {}
};

// Calls body(chunk, begin, end, width, channel) for each chunk of pixels and vector of channels.
template <class T, class Body>
void by_chunks(const Params& p, const Chunks& chunks, const Body& body) {
    parallel_for(chunks.count, [&](int64_t chunk) {
        const int64_t begin = chunk * chunks.size, end = std::min(begin + chunks.size, p.pixels);
        by_vectors<kWidth<Accumulate<T>>>(p.channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
            body(chunk, begin, end, width, c);
        });
    });
}

// Calls body(lane, pixel) for the pixels [begin, end).
template <class Body>
NASFAST_INLINE void by_lanes(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
#pragma GCC unroll 4
        for (int lane = 0; lane < kLanes; ++lane) body(lane, i + lane);
    for (; i < end; ++i) body(0, i);
}

template <class V>
NASFAST_INLINE V total(const V (&sum)[kLanes]) {
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// totals [2, C] of the chunks' sums [count, 2, C].
template <class A>
void add_up(const Params& p, const Chunks& chunks, const A* partial, double* totals) {
    std::fill_n(totals, 2 * p.channels, 0.0);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        for (int64_t i = 0; i < 2 * p.channels; ++i) totals[i] += partial[chunk * 2 * p.channels + i];
}

// The two factors of the normalised map: input * scale + shift.
template <class A>
void affine(const Params& p, const A* statistics, const A* weight, const A* bias, A* scale, A* shift) {
    for (int64_t c = 0; c < p.channels; ++c) {
        scale[c] = weight[c] / std::sqrt(statistics[p.channels + c] + static_cast<A>(p.eps));
        shift[c] = bias[c] - statistics[c] * scale[c];
    }
}

template <class T>
void forward_impl(const Params& p, const Forward<T>& t) {
    using A = Accumulate<T>;
    const Chunks chunks(p, t.input);
    // of each chunk its sum, and the sum of squares around its own mean
    const Array<A> partial(chunks.count * 2 * p.channels);
    by_chunks<T>(
        p, chunks,
        [&](int64_t chunk, int64_t begin, int64_t end, auto width, int64_t c) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            const auto value = [&](int64_t i) { return load_as<A, w>(t.input + i * p.channels + c); };
            Vector<A, w> sum[kLanes] = {}, squares[kLanes] = {};
            by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA { sum[lane] += value(i); });
            const Vector<A, w> mean = total(sum) / static_cast<A>(end - begin);
            by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
                const Vector<A, w> d = value(i) - mean;
                squares[lane] += d * d;
            });
            A* const to = partial.get() + chunk * 2 * p.channels + c;
            store<w>(to, total(sum)), store<w>(to + p.channels, total(squares));
        });
    const Array<double> totals(2 * p.channels);
    add_up(p, chunks, partial.get(), totals.get());
    double* const mean = totals.get();
    double* const squares = mean + p.channels;
    for (int64_t c = 0; c < p.channels; ++c) mean[c] /= static_cast<double>(p.pixels);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        const double size = static_cast<double>(std::min(chunks.size, p.pixels - chunk * chunks.size));
        for (int64_t c = 0; c < p.channels; ++c) {
            const double d = partial.get()[chunk * 2 * p.channels + c] / size - mean[c];
            squares[c] += size * d * d;
        }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
        t.statistics[c] = static_cast<A>(mean[c]);
        t.statistics[p.channels + c] = static_cast<A>(squares[c] / static_cast<double>(p.pixels));
    }

    const Array<A> factors(2 * p.channels);
    A *const scale = factors.get(), *const shift = scale + p.channels;
    affine(p, t.statistics, t.weight, t.bias, scale, shift);
    by_chunks<T>(p, chunks,
                 [&](int64_t, int64_t begin, int64_t end, auto width, int64_t c) NASFAST_INLINE_LAMBDA {
                     constexpr int w = decltype(width)::value;
                     const auto a = load<w>(scale + c), b = load<w>(shift + c);
                     for (int64_t i = begin; i < end; ++i) {
                         const int64_t at = i * p.channels + c;
                         const Vector<A, w> y = load_as<A, w>(t.input + at) * a + b;
                         store_as<T, w>(t.output + at, y < 0 ? Vector<A, w>{} : y);  // a NaN stays one
                     }
                 });
}

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    using A = Accumulate<T>;
    const Chunks chunks(p, t.input);
    const Array<A> factors(4 * p.channels);
    A *const scale = factors.get(), *const shift = scale + p.channels;
    affine(p, t.statistics, t.weight, t.bias, scale, shift);
    // the gradient in front of the ReLU, and the input around its mean
    const auto read = [&](int64_t at, auto width, auto a, auto b, auto mean, auto& g, auto& x)
                          NASFAST_INLINE_LAMBDA {
                              constexpr int w = decltype(width)::value;
                              x = load_as<A, w>(t.input + at);
                              g = load_as<A, w>(t.grad + at);
                              g = x * a + b <= 0 ? Vector<A, w>{} : g;
                              x -= mean;
                          };
    const Array<A> partial(chunks.count * 2 * p.channels);
    by_chunks<T>(p, chunks,
                 [&](int64_t chunk, int64_t begin, int64_t end, auto width, int64_t c) NASFAST_INLINE_LAMBDA {
                     constexpr int w = decltype(width)::value;
                     const auto a = load<w>(scale + c), b = load<w>(shift + c),
                                mean = load<w>(t.statistics + c);
                     Vector<A, w> sum[kLanes] = {}, product[kLanes] = {}, g, x;
                     by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
                         read(i * p.channels + c, width, a, b, mean, g, x);
                         sum[lane] += g, product[lane] += g * x;
                     });
                     A* const to = partial.get() + chunk * 2 * p.channels + c;
                     store<w>(to, total(sum)), store<w>(to + p.channels, total(product));
                 });
    const Array<double> totals(2 * p.channels);
    add_up(p, chunks, partial.get(), totals.get());
    // grad_input = scale * (g - mean of g - x * slope)
    A *const mean_grad = scale + 2 * p.channels, *const slope = scale + 3 * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
        const double sum = totals.get()[c], product = totals.get()[p.channels + c];
        const double variance = static_cast<double>(t.statistics[p.channels + c]) + p.eps;
        t.grad_bias[c] = static_cast<A>(sum);
        t.grad_weight[c] = static_cast<A>(product / std::sqrt(variance));
        mean_grad[c] = static_cast<A>(sum / static_cast<double>(p.pixels));
        slope[c] = static_cast<A>(product / variance / static_cast<double>(p.pixels));
    }
    by_chunks<T>(
        p, chunks, [&](int64_t, int64_t begin, int64_t end, auto width, int64_t c) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            const auto a = load<w>(scale + c), b = load<w>(shift + c), mean = load<w>(t.statistics + c);
            const auto offset = load<w>(mean_grad + c), factor = load<w>(slope + c);
            Vector<A, w> g, x;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t at = i * p.channels + c;
                read(at, width, a, b, mean, g, x);
                store_as<T, w>(t.grad_input + at, a * (g - offset - x * factor));
            }
        });
}

}  // namespace nasfast::batch_norm_relu::NASFAST_ISA
