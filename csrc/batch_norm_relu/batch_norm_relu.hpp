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
constexpr int64_t kCachedBytes = 1 << 21;  // of a map that is found in a cache, about
constexpr int kLanes = 4;                  // sums side by side, for the sake of latency

// Pixels in runs that one thread works on.
struct Chunks {
    int64_t size, count;

    template <class T>
    Chunks(const Params& p, const T*)
        : size(std::max<int64_t>(kLanes, kChunkBytes / sizeof(T) / p.channels)),
          count(ceil_div(p.pixels, size)) {}
    int64_t pixels(const Params& p, int64_t chunk) const { return std::min(size, p.pixels - chunk * size); }
};

// Asks for the memory in the same places of the next chunk. The processor does so by itself, but stops at the
// end of each page.
struct Ask {
    template <class... T>
    NASFAST_INLINE void operator()(const T*... at) const {
        (__builtin_prefetch(reinterpret_cast<const char*>(at) + kChunkBytes, 0, 2), ...);
    }
};
struct AskNothing {
    template <class... T>
    NASFAST_INLINE void operator()(const T*...) const {}
};

// Calls body(chunk, begin, end, width, channel, ask) for each chunk of pixels and vector of channels. `ask`
// is Ask where maps leave the caches.
template <class T, class Body>
void by_chunks(const Params& p, const Chunks& chunks, const Body& body) {
    const auto run = [&](auto ask) {
        parallel_for(chunks.count, [&](int64_t chunk) {
            const int64_t begin = chunk * chunks.size, end = std::min(begin + chunks.size, p.pixels);
            by_vectors<kWidth<Accumulate<T>>>(p.channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
                body(chunk, begin, end, width, c, ask);
            });
        });
    };
    if (p.pixels * p.channels * static_cast<int64_t>(sizeof(T)) > kCachedBytes)
        run(Ask());
    else
        run(AskNothing());
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
void add_up(const Params& p, int64_t chunks, const A* partial, double* totals) {
    std::fill_n(totals, 2 * p.channels, 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
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

// statistics [2, C] of the parts of a map: of each part its sum and the sum of squares around its own mean,
// partial [parts, 2, C]. pixels(part) says how many it has.
template <class A, class Pixels>
void combine(const Params& p, int64_t parts, const Pixels& pixels, const A* partial, A* statistics) {
    const Array<double> totals(2 * p.channels);
    add_up(p, parts, partial, totals.get());
    double* const mean = totals.get();
    double* const squares = mean + p.channels;
    for (int64_t c = 0; c < p.channels; ++c) mean[c] /= static_cast<double>(p.pixels);
    for (int64_t part = 0; part < parts; ++part) {
        const double size = static_cast<double>(pixels(part));
        for (int64_t c = 0; c < p.channels; ++c) {
            const double d = partial[part * 2 * p.channels + c] / size - mean[c];
            squares[c] += size * d * d;
        }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
        statistics[c] = static_cast<A>(mean[c]);
        statistics[p.channels + c] = static_cast<A>(squares[c] / static_cast<double>(p.pixels));
    }
}

// output = ReLU of the input normalised by the statistics.
template <class T, class A>
void normalise(const Params& p, const T* input, const A* weight, const A* bias, const A* statistics,
               T* output) {
    const Array<A> factors(2 * p.channels);
    A *const scale = factors.get(), *const shift = scale + p.channels;
    affine(p, statistics, weight, bias, scale, shift);
    by_chunks<T>(p, Chunks(p, input),
                 [&](int64_t, int64_t begin, int64_t end, auto width, int64_t c, auto ask)
                     NASFAST_INLINE_LAMBDA {
                         constexpr int w = decltype(width)::value;
                         const auto a = load<w>(scale + c), b = load<w>(shift + c);
                         for (int64_t i = begin; i < end; ++i) {
                             const int64_t at = i * p.channels + c;
                             ask(input + at, output + at);
                             const Vector<A, w> y = load_as<A, w>(input + at) * a + b;
                             store_as<T, w>(output + at, y < 0 ? Vector<A, w>{} : y);  // a NaN stays one
                         }
                     });
}

template <class T>
void forward_impl(const Params& p, const Forward<T>& t) {
    using A = Accumulate<T>;
    const Chunks chunks(p, t.input);
    // of each chunk its sum, and the sum of squares around its own mean
    const Array<A> partial(chunks.count * 2 * p.channels);
    by_chunks<T>(p, chunks,
                 [&](int64_t chunk, int64_t begin, int64_t end, auto width, int64_t c, auto ask)
                     NASFAST_INLINE_LAMBDA {
                         constexpr int w = decltype(width)::value;
                         const auto value = [&](int64_t i) {
                             return load_as<A, w>(t.input + i * p.channels + c);
                         };
                         Vector<A, w> sum[kLanes] = {}, squares[kLanes] = {};
                         by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
                             ask(t.input + i * p.channels + c);
                             sum[lane] += value(i);
                         });
                         const Vector<A, w> mean = total(sum) / static_cast<A>(end - begin);
                         by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
                             const Vector<A, w> d = value(i) - mean;
                             squares[lane] += d * d;
                         });
                         A* const to = partial.get() + chunk * 2 * p.channels + c;
                         store<w>(to, total(sum)), store<w>(to + p.channels, total(squares));
                     });
    combine(
        p, chunks.count, [&](int64_t chunk) { return chunks.pixels(p, chunk); }, partial.get(), t.statistics);
    normalise(p, t.input, t.weight, t.bias, t.statistics, t.output);
}

// What the gradient of the input is made of.
template <class A, int Width>
struct Slopes {
    Vector<A, Width> scale, shift, mean, mean_grad, slope;

    // The gradient in front of the ReLU, and the input around its mean.
    template <class T>
    NASFAST_INLINE void read(const T* grad, const T* input, Vector<A, Width>& g, Vector<A, Width>& x) const {
        x = load_as<A, Width>(input);
        g = load_as<A, Width>(grad);
        g = x * scale + shift <= 0 ? Vector<A, Width>{} : g;
        x -= mean;
    }
    // That of the input.
    template <class T>
    NASFAST_INLINE Vector<A, Width> operator()(const T* grad, const T* input) const {
        Vector<A, Width> g, x;
        read(grad, input, g, x);
        return scale * (g - mean_grad - x * slope);
    }
};

// The sums of a backward pass: gradients of weight and bias, and what that of the input needs.
template <class A>
class Sums {
public:
    template <class T>
    Sums(const Params& p, const T* grad, const T* input, const A* weight, const A* bias, const A* statistics,
         A* grad_weight, A* grad_bias)
        : channels_(p.channels), statistics_(statistics), factors_(4 * p.channels) {
        A* const scale = factors_.get();
        affine(p, statistics, weight, bias, scale, scale + p.channels);
        const Chunks chunks(p, input);
        const Array<A> partial(chunks.count * 2 * p.channels);
        by_chunks<T>(
            p, chunks,
            [&](int64_t chunk, int64_t begin, int64_t end, auto width, int64_t c, auto ask)
                NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    const Slopes<A, w> slopes = {
                        load<w>(scale + c), load<w>(scale + p.channels + c), load<w>(statistics + c), {}, {}};
                    Vector<A, w> sum[kLanes] = {}, product[kLanes] = {}, g, x;
                    by_lanes(begin, end, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
                        ask(grad + i * p.channels + c, input + i * p.channels + c);
                        slopes.read(grad + i * p.channels + c, input + i * p.channels + c, g, x);
                        sum[lane] += g, product[lane] += g * x;
                    });
                    A* const to = partial.get() + chunk * 2 * p.channels + c;
                    store<w>(to, total(sum)), store<w>(to + p.channels, total(product));
                });
        const Array<double> totals(2 * p.channels);
        add_up(p, chunks.count, partial.get(), totals.get());
        A *const mean_grad = scale + 2 * p.channels, *const slope = scale + 3 * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) {
            const double sum = totals.get()[c], product = totals.get()[p.channels + c];
            const double variance = static_cast<double>(statistics[p.channels + c]) + p.eps;
            grad_bias[c] = static_cast<A>(sum);
            grad_weight[c] = static_cast<A>(product / std::sqrt(variance));
            mean_grad[c] = static_cast<A>(sum / static_cast<double>(p.pixels));
            slope[c] = static_cast<A>(product / variance / static_cast<double>(p.pixels));
        }
    }
    // Of the channels from c on.
    template <int Width>
    NASFAST_INLINE Slopes<A, Width> slopes(int64_t c) const {
        const A* const from = factors_.get() + c;
        return {load<Width>(from), load<Width>(from + channels_), load<Width>(statistics_ + c),
                load<Width>(from + 2 * channels_), load<Width>(from + 3 * channels_)};
    }

private:
    int64_t channels_;
    const A* statistics_;
    Array<A> factors_;
};

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    using A = Accumulate<T>;
    const Sums<A> sums(p, t.grad, t.input, t.weight, t.bias, t.statistics, t.grad_weight, t.grad_bias);
    by_chunks<T>(p, Chunks(p, t.input),
                 [&](int64_t, int64_t begin, int64_t end, auto width, int64_t c, auto ask)
                     NASFAST_INLINE_LAMBDA {
                         constexpr int w = decltype(width)::value;
                         const auto slopes = sums.template slopes<w>(c);
                         for (int64_t i = begin; i < end; ++i) {
                             const int64_t at = i * p.channels + c;
                             ask(t.grad + at, t.input + at, t.grad_input + at);
                             store_as<T, w>(t.grad_input + at, slopes(t.grad + at, t.input + at));
                         }
                     });
}

}  // namespace nasfast::batch_norm_relu::NASFAST_ISA
