// Both passes of sep_conv on the CPU. Included by per-ISA sources.
//
// Forward: a tile of pixels of the depthwise convolution is multiplied by the pointwise weights while it is
// in the cache, and the sums of the batch normalisation are taken of the product before it leaves; then
// batch_norm_relu's second pass. Backward: batch_norm_relu's sums; then the gradient of the product is made a
// tile at a time and multiplied at once by the weights and by the tile of the depthwise convolution; then
// both gradients of the depthwise convolution in one pass. The order of every sum is fixed by the sizes:
// results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "batch_norm_relu/batch_norm_relu.hpp"
#include "common/parallel.hpp"
#include "depthwise_conv2d/depthwise_conv2d.hpp"
#include "sep_conv/bands.hpp"
#include "sep_conv/outer.hpp"
#include "sep_conv/pairs.hpp"
#include "sep_conv/pointwise.hpp"
#include "sep_conv/sep_conv.h"
#include "sep_conv/slice.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;
namespace bn = batch_norm_relu::NASFAST_ISA;
namespace dw = depthwise_conv2d::NASFAST_ISA;

constexpr int64_t kPart = 2048;  // pixels that one partial sum of the pointwise weights' gradient covers

#ifdef NASFAST_PAIRS
template <class T>
using SliceOf = PairSlice;
#else
template <class T>
using SliceOf = Slice<Accumulate<T>>;
#endif

inline batch_norm_relu::Params norm_params(const Params& p) {
    return {p.batch * p.out_height * p.out_width, p.out_channels, p.eps};
}

inline depthwise_conv2d::Params depthwise_params(const Params& p) {
    return {p.batch,    p.channels, p.height, p.width, p.out_height, p.out_width,
            p.kernel_h, p.kernel_w, p.pad_h,  p.pad_w, p.dilation_h, p.dilation_w};
}

// The same with input and output in each other's place: that whose output is the gradient of the input.
inline depthwise_conv2d::Params turned(depthwise_conv2d::Params d) {
    std::swap(d.height, d.out_height), std::swap(d.width, d.out_width);
    d.pad_h = d.dilation_h * (d.kernel_h - 1) - d.pad_h;
    d.pad_w = d.dilation_w * (d.kernel_w - 1) - d.pad_w;
    return d;
}

template <class T, class Product = ProductOf<T>>
void forward_impl(const Params& p, const Forward<T>& t) {
    using A = Accumulate<T>;
    const auto d = depthwise_params(p);
    const auto n = norm_params(p);
    const auto taps = dw::arrange(d, t.depthwise, false);
    const Weights<Product, A> weights(t.pointwise, p.channels, p.out_channels, 1, p.channels);
    const Bands bands(p.batch, p.out_height, p.out_width);
    const Array<A> sums(bands.tiles * 2 * p.out_channels);
    struct Scratch {
        SliceOf<T> slice;
        typename Product::Operand* rows;
        A* product;
    };
    const bool sliced = is_sliced(d);
    if (!sliced) dw::convolve(d, t.input, taps.get(), t.middle);
    const auto layout = [&](Arena& arena) {
        return Scratch{sliced ? SliceOf<T>(arena, d, bands.most_rows()) : SliceOf<T>(),
                       take_rows<Product>(arena, weights.depth()), arena.take<A>(weights.scratch())};
    };
    const int64_t input_size = p.batch * p.height * p.width * p.channels;
    const int64_t input_ahead = (bands.most_rows() + (p.kernel_h - 1) * p.dilation_h - p.pad_h) * p.width;
    parallel_for(bands.count, layout, [&](int64_t unit, Scratch& s) {
        const Band band = bands[unit];
        if (sliced) s.slice.convolve(d, band, t.input, taps.get(), t.middle);
        for (int64_t at = 0; at < band.pixels; at += kTile) {
            const int64_t pixels = std::min(kTile, band.pixels - at), first = band.first + at;
            Ahead ahead;
            ahead.add(t.input, input_size, (first + input_ahead) * p.channels, pixels * p.channels);
            ahead.add(t.raw, n.pixels * p.out_channels, first * p.out_channels, pixels * p.out_channels);
            ahead.add(t.middle, n.pixels * p.channels, (first + band.pixels) * p.channels,
                      pixels * p.channels);
            weights.multiply(pixels,
                             operand(pixels, p.channels, t.middle + first * p.channels, weights, s.rows),
                             s.product, t.raw + first * p.out_channels,
                             sums.get() + (band.tile + at / kTile) * 2 * p.out_channels, ahead);
        }
    });
    bn::combine(n, bands.tiles, [&](int64_t tile) { return bands.pixels(tile); }, sums.get(), t.statistics);
    bn::normalise(n, t.raw, t.weight, t.bias, t.statistics, t.output);
}

// to [size] = the partial sums [parts, size], added up in order.
template <class A, class To>
void add_up(int64_t parts, int64_t size, const A* partial, const To& to) {
    constexpr int64_t run = 256;
    parallel_for(ceil_div(size, run), [&](int64_t unit) {
        const int64_t begin = unit * run, count = std::min(run, size - begin);
        A sum[run] = {};
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t i = 0; i < count; ++i) sum[i] += partial[part * size + begin + i];
        for (int64_t i = 0; i < count; ++i) to(begin + i, sum[i]);
    });
}

// Pixels of the pointwise convolution in parts, and of some images together in a group.
struct Groups {
    int64_t images, pixels, parts, count;  // of a group; parts of a group; groups

    Groups(int64_t batch, int64_t per_image)
        : images(std::max<int64_t>(1, kPart / per_image)),
          pixels(images * per_image),
          parts(ceil_div(pixels, kPart)),
          count(ceil_div(batch, images)) {}
};

template <class T, class Product = ProductOf<T>>
void backward_impl(const Params& p, const Backward<T>& t) {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    const auto n = norm_params(p);
    const bn::Sums<A> norm(n, t.grad, t.raw, t.weight, t.bias, t.statistics, t.grad_weight, t.grad_bias);
    const Weights<Product, A> weights(t.pointwise, p.out_channels, p.channels, p.channels, 1);
    const Groups groups(p.batch, p.out_height * p.out_width);
    const int64_t padded = weights.panels.padded(), parts = groups.count * groups.parts;
    const int64_t size = round_up(p.out_channels, Product::kRowMultiple) * padded;
    const Array<A> partial(parts * size);

    const auto d = depthwise_params(p), back = turned(d);
    const auto taps_weights = dw::arrange(d, t.depthwise, true);
    const int64_t taps = p.kernel_h * p.kernel_w, taps_size = taps * p.channels;
    const Bands bands(p.batch, p.height, p.width);
    const Array<A> taps_partial(bands.count * taps_size);

    const bool sliced = is_sliced(back);
    struct Scratch {
        SliceOf<T> slice;
        Outer<Product> outer;
        Operand* rows;
        A* product;
        T* grad_middle;
    };
    const auto layout = [&](Arena& arena, int64_t pixels) {
        return Scratch{sliced ? SliceOf<T>(arena, back, bands.most_rows()) : SliceOf<T>(),
                       {arena, p.out_channels, p.channels},
                       take_rows<Product>(arena, weights.depth()),
                       arena.take<A>(weights.scratch()),
                       arena.take<T>(pixels * p.channels)};
    };
    // grad_middle, that of the depthwise convolution, of a part; and its share of grad_pointwise
    const auto pointwise = [&](int64_t part, Scratch& s, T* grad_middle) {
        A* const sums = partial.get() + part * size;
        std::fill_n(sums, size, A(0));
        const int64_t group = part / groups.parts * groups.pixels, begin = part % groups.parts * kPart;
        const int64_t end = std::min({begin + kPart, groups.pixels, n.pixels - group});
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t pixels = std::min(kTile, end - at), first = group + at;
            by_vectors<kWidth<A>>(p.out_channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                const auto slopes = norm.template slopes<w>(c);
                for (int64_t i = 0; i < pixels; ++i) {
                    const int64_t from = (first + i) * p.out_channels + c;
                    store_as<Operand, w>(s.rows + i * weights.depth() + c,
                                         slopes(t.grad + from, t.raw + from));
                }
            });
            Ahead ahead;
            ahead.add(t.middle, n.pixels * p.channels, first * p.channels, pixels * p.channels);
            ahead.add(t.grad, n.pixels * p.out_channels, (first + pixels) * p.out_channels,
                      kTile * p.out_channels);
            ahead.add(t.raw, n.pixels * p.out_channels, (first + pixels) * p.out_channels,
                      kTile * p.out_channels);
            clear_columns(pixels, p.out_channels, weights.depth(), s.rows);
            weights.multiply(pixels, s.rows, s.product, grad_middle + at * p.channels, ahead);
            s.outer.add(pixels, p.out_channels, s.rows, weights.depth(), p.channels,
                        t.middle + first * p.channels, sums);
        }
    };
    // grad_input of a band, and its share of grad_depthwise; grad_middle begins with the band's image
    const auto depthwise = [&](int64_t band, Scratch& s, const T* grad_middle) {
        s.slice.differentiate(back, bands[band], grad_middle, taps_weights.get(), t.input, t.grad_input,
                              taps_partial.get() + band * taps_size);
    };
    const int64_t image_size = p.out_height * p.out_width * p.channels;
    const int64_t bands_of_image = bands.count / std::max<int64_t>(1, p.batch);
    if (sliced && (groups.count >= 2 * omp_get_max_threads() || omp_get_max_threads() == 1)) {
        // what lies between the two stays in the cache
        parallel_for(
            groups.count, [&](Arena& arena) { return layout(arena, groups.pixels); },
            [&](int64_t group, Scratch& s) {
                const int64_t end = std::min(p.batch, (group + 1) * groups.images);
                int64_t band = group * groups.images * bands_of_image;
                for (int64_t part = 0; part < groups.parts; ++part) {
                    pointwise(group * groups.parts + part, s, s.grad_middle);
                    // while they are in the cache: the bands whose rows are there
                    const bool last = part + 1 == groups.parts;
                    const int64_t rows = last ? p.out_height : (part + 1) * kPart / p.out_width;
                    for (; band < end * bands_of_image; ++band) {
                        const Band next = bands[band];
                        const int64_t below =
                            next.row + next.rows + p.dilation_h * (p.kernel_h - 1) - back.pad_h;
                        if (std::min(p.out_height, below) > rows) break;
                        depthwise(band, s, s.grad_middle + next.image % groups.images * image_size);
                    }
                }
            });
    } else {
        const Array<T> grad_middle(n.pixels * p.channels);
        const auto alone = [&](Arena& arena) { return layout(arena, 0); };
        parallel_for(parts, alone, [&](int64_t part, Scratch& s) {
            pointwise(part, s, grad_middle.get() + part / groups.parts * groups.pixels * p.channels);
        });
        if (!sliced) {
            if (t.grad_input) dw::convolve(back, grad_middle.get(), taps_weights.get(), t.grad_input);
            dw::correlate(d, grad_middle.get(), t.input, t.grad_depthwise);
        }
        parallel_for(sliced ? bands.count : 0, alone, [&](int64_t band, Scratch& s) {
            depthwise(band, s, grad_middle.get() + band / bands_of_image * image_size);
        });
    }
    add_up(parts, size, partial.get(), [&](int64_t i, A sum) {
        const int64_t row = i / padded, column = i % padded;
        if (row < p.out_channels && column < p.channels) t.grad_pointwise[row * p.channels + column] = sum;
    });
    if (sliced)
        add_up(bands.count, taps_size, taps_partial.get(), [&](int64_t i, A sum) {
            t.grad_depthwise[i % p.channels * taps + taps - 1 - i / p.channels] = sum;
        });
}

}  // namespace nasfast::sep_conv::NASFAST_ISA
