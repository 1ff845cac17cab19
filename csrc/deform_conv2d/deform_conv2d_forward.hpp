// Forward pass of deform_conv2d on the CPU, for any kind of matrix product. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"
#include "common/product.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "deform_conv2d/deform_conv2d_sample.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {

constexpr int64_t kTile = 64;        // output pixels of a tile
constexpr int64_t kLargeTile = 192;  // where a tile would be done before its weights have come from memory
constexpr int64_t kLargeWeight = 1 << 20;  // bytes
constexpr int64_t kSampleBytes = 1 << 19;  // of the samples of a tile
constexpr int64_t kBlock = 64;             // input channels that are sampled at a time, at most
constexpr int64_t kColumns = 576;          // taps times channels that are sampled at a time

// Element (tap, channel, output) of the weight of a group lies at tap * tap_step + channel * channel_step +
// output * out_step from the group's first.
struct WeightSteps {
    int64_t tap, channel, out;

    explicit WeightSteps(const Params& p) {
        const int64_t taps = p.kernel_h * p.kernel_w, in = p.channels / p.groups;
        tap = p.weight_channels_last ? in : 1, channel = p.weight_channels_last ? 1 : taps, out = in * taps;
    }
};

// Rows of the weight matrix: blocks of channels, taps, channels of the block. One block of channels of a tile
// is sampled at a time, so that what its pixels share stays in the L1 cache.
struct Blocks {
    int64_t channels, taps, size, count;

    explicit Blocks(const Params& p) : channels(p.channels / p.groups), taps(p.kernel_h * p.kernel_w) {
        count = ceil_div(channels, std::clamp<int64_t>(kColumns / taps / 16 * 16, 16, kBlock));
        size = ceil_div(channels, count);
    }
    int64_t begin(int64_t block) const { return std::min(block * size, channels); }
    int64_t depth() const { return channels * taps; }
};

// Output [tile, Co/G] = bias + columns [tile, K * C/G] @ weight [K * C/G, Co/G]; a unit is a tile of pixels.
template <class T, class Product = ProductOf<T>>
void forward_impl(const Params& p, const Forward<T>& t) {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    const int64_t taps = p.kernel_h * p.kernel_w;
    const int64_t in = p.channels / p.groups, out = p.out_channels / p.groups;
    const Blocks blocks(p);
    const typename Product::Panels panels(out);
    const WeightSteps steps(p);
    const int64_t block_rows = round_up(blocks.size * taps, Product::kDepthMultiple);
    const int64_t total = blocks.count * block_rows, size = total * panels.padded();
    const Array<Operand> weights(p.groups * size);
    const Array<A> biases(p.groups * panels.padded());
    parallel_for(p.groups * blocks.count * taps, [&](int64_t unit) {
        const int64_t group = unit / taps / blocks.count, block = unit / taps % blocks.count,
                      tap = unit % taps;
        const int64_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
        const T* const weight = t.weight + group * out * in * taps + begin * steps.channel + tap * steps.tap;
        Operand* const to = weights.get() + group * size;
        Product::pack(panels, total, block * block_rows + tap * count, count, weight, steps.channel,
                      steps.out, to);
        if (tap == taps - 1)
            Product::clear(panels, total, block * block_rows + taps * count, (block + 1) * block_rows, to);
        if (block || tap) return;
        A* const bias = biases.get() + group * panels.padded();
        std::fill_n(bias, panels.padded(), A(0));
        if (t.bias) std::copy_n(t.bias + group * out, out, bias);
    });

    const int64_t per_pixel =
        p.offset_groups * taps * int64_t(sizeof(typename Samples<A, false>::Values)) / kWidth<A>;
    const int64_t tile_pixels = std::clamp<int64_t>(
        kSampleBytes / per_pixel, 1, size * int64_t(sizeof(Operand)) < kLargeWeight ? kTile : kLargeTile);
    struct Scratch {
        Samples<A, false> samples;
        Operand* columns;
        A* output;
    };
    const auto layout = [&](Arena& arena) {
        const int64_t rows = round_up(tile_pixels, Product::kRowMultiple);
        return Scratch{{arena, p, p.offset_groups, tile_pixels},
                       arena.take<Operand>(rows * block_rows),
                       arena.take<A>(rows * panels.padded())};
    };
    const Tiling tiling(p, tile_pixels);
    const int64_t tiles = p.batch * tiling.per_image();
    const bool whole = p.groups * blocks.count == 1;  // else the next tile's would be gone from the L2 cache
    parallel_for(tiles, layout, [&](int64_t unit, Scratch& s) {
        const Tile tile = tiling[unit];
        const int64_t pixels = tile.pixels();
        const T* const image = t.input + tile.image * p.height * p.width * p.channels;
        locate(p, t.offset, t.mask, 0, tile, s.samples);
        for (int64_t group = 0; group < p.groups; ++group) {
            for (int64_t block = 0; block < blocks.count; ++block) {
                const int64_t begin = blocks.begin(block), count = blocks.begin(block + 1) - begin;
                const int64_t rows = round_up(count * taps, Product::kDepthMultiple);
                by_offset_group(p, group * in + begin, count,
                                [&](int64_t offset_group, int64_t channel, int64_t part, int64_t before) {
                                    sample(p, image, s.samples, offset_group * taps, pixels, channel, part,
                                           s.columns + before, rows, count);
                                });
                if (rows > count * taps)
                    for (int64_t i = 0; i < pixels; ++i)
                        std::fill(s.columns + i * rows + count * taps, s.columns + (i + 1) * rows, Operand());
                if (whole && unit + 1 < tiles) {
                    const Tile next = tiling[unit + 1];
                    by_new_pixels(p, tile, next, [&](int64_t pixel, int64_t run) NASFAST_INLINE_LAMBDA {
                        prefetch(t.input + pixel * p.channels, run * p.channels);
                    });
                    prefetch_pixels(p, next, t.offset, p.offset_step, 2 * p.offset_groups * taps);
                    if (t.mask) prefetch_pixels(p, next, t.mask, p.mask_step, p.offset_groups * taps);
                    prefetch_pixels(p, next, t.output, p.out_channels, out);
                }
                for (int64_t k = 0; k < rows; k += Product::kDepth)
                    Product::multiply(pixels, std::min(Product::kDepth, rows - k), s.columns + k, rows,
                                      panels, weights.get() + group * size, total, block * block_rows + k,
                                      block || k ? Into::add : Into::assign, s.output, panels.padded());
            }
            const A* const bias = biases.get() + group * panels.padded();
            for (int64_t i = 0; i < pixels; ++i) {
                const A* const from = s.output + i * panels.padded();
                T* const to = t.output + tile.pixel(p, i) * p.out_channels + group * out;
                by_vectors<kWidth<A>>(out, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    store_as<T, w>(to + j, load<w>(from + j) + load<w>(bias + j));
                });
            }
        }
    });
}

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
