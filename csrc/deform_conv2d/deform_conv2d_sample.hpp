// Bilinear samples of deform_conv2d on the CPU. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/gemm.hpp"
#include "deform_conv2d/deform_conv2d.h"

namespace nasfast::deform_conv2d::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

// A rectangle of output pixels of one image. Neighbours share the input that they sample: a compact rectangle
// keeps it in the L1 cache where a row of as many pixels would not.
struct Tile {
    int64_t image, row, column, rows, columns;

    int64_t pixels() const { return rows * columns; }
    // Index of pixel i of the tile in [N, Ho, Wo].
    int64_t pixel(const Params& p, int64_t i) const {
        return (image * p.out_height + row + i / columns) * p.out_width + column + i % columns;
    }
};

// Divides each image into tiles of at most `pixels` pixels and nearly equal sizes.
struct Tiling {
    int64_t down, across, height, width;  // tiles of an image; an image

    Tiling(const Params& p, int64_t pixels) : height(p.out_height), width(p.out_width) {
        int64_t columns = std::min(width, kColumns);
        const int64_t rows = std::min(height, pixels / columns);
        columns = std::min(width, pixels / rows);
        down = ceil_div(height, rows), across = ceil_div(width, columns);
    }
    int64_t per_image() const { return down * across; }
    Tile operator[](int64_t index) const {
        const int64_t at = index % per_image(), i = at / across, j = at % across;
        const int64_t row = i * height / down, column = j * width / across;
        return {index / per_image(), row, column, (i + 1) * height / down - row,
                (j + 1) * width / across - column};
    }

private:
    static constexpr int64_t kColumns = 8;
};

// Where the samples of a tile lie, a vector of them at a time. The corners are top left, top right, bottom
// left, bottom right; one outside the image has weight 0 and is moved to the nearest of the others.
// Gradients: with what the derivatives by the position need.
template <class A, bool Gradients>
struct Samples {
    static constexpr int kLanes = kWidth<A>;
    using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

    struct Values {
        Index corner[4][kLanes];  // element of the image; the first is negative for a sample outside
        A weight[4][kLanes];      // bilinear, times mask
    };
    struct Derivatives : Values {
        A mask[kLanes];    // 0 for a sample outside
        A row[2][kLanes];  // weights of the upper and lower corners, of the left and right ones
        A column[2][kLanes];
        A row_slope[2][kLanes];  // their derivatives by the position
        A column_slope[2][kLanes];
    };
    using Block = std::conditional_t<Gradients, Derivatives, Values>;
    // One sample: field[0] of the members is its own.
    struct Sample {
        const Values* at;

        Index corner(int i) const { return at->corner[i][0]; }
        A weight(int i) const { return at->weight[i][0]; }
        bool inside() const { return corner(0) >= 0; }
    };

    int64_t per_pixel;  // taps of one or all offset groups, ordered by group
    A* taps;            // (y, x) of each sample of a pixel against that of the first tap
    A* position;        // (y, x) of each sample
    A* mask;
    Block* blocks;

    Samples(Arena& arena, const Params& p, int64_t groups, int64_t pixels)
        : per_pixel(groups * p.kernel_h * p.kernel_w) {
        const int64_t count = round_up(pixels * per_pixel, kLanes);  // whole vectors are located
        taps = arena.take<A>(2 * per_pixel), position = arena.take<A>(2 * count);
        mask = arena.take<A>(count), blocks = arena.take<Block>(count / kLanes);
    }
    Sample operator[](int64_t s) const {
        const Block* const block = blocks + s / kLanes;
        return {reinterpret_cast<const Values*>(reinterpret_cast<const A*>(block) + s % kLanes)};
    }
};

// Asks for the lines of [from, from + count) in the L2 cache. Inlined, as are its callers: GCC 12 takes a
// function that does nothing else for one without effect.
template <class T>
NASFAST_INLINE void prefetch(const T* from, int64_t count) {
    const char* const begin = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += Arena::kLine)
        __builtin_prefetch(begin + i, 0, 2);
}

// Calls body(pixel, count) for the runs of input pixels in [N, H, W] that the tile `next` reads if its
// offsets are small, without the columns that the tile before it has read. They are to be fetched before a
// matrix product, which leaves the memory idle: the runs are too short for the prefetchers of processors.
template <class Body>
NASFAST_INLINE void by_new_pixels(const Params& p, const Tile& tile, const Tile& next, const Body& body) {
    struct Range {  // of the image, along one dimension: below the taps, and a pixel on each side
        int64_t begin, end;

        Range(int64_t first, int64_t outputs, int64_t stride, int64_t pad, int64_t reach, int64_t size)
            : begin(std::clamp<int64_t>(first * stride - pad - 1, 0, size)),
              end(std::min(size, (first + outputs - 1) * stride - pad + reach + 3)) {}
    };
    const auto across = [&](const Tile& of) {
        return Range(of.column, of.columns, p.stride_w, p.pad_w, (p.kernel_w - 1) * p.dilation_w, p.width);
    };
    const Range down(next.row, next.rows, p.stride_h, p.pad_h, (p.kernel_h - 1) * p.dilation_h, p.height);
    Range row = across(next);
    if (tile.image == next.image && tile.row == next.row) row.begin = std::max(row.begin, across(tile).end);
    for (int64_t y = down.begin; y < down.end; ++y)
        body((next.image * p.height + y) * p.width + row.begin, row.end - row.begin);
}

// Asks for `count` elements at each pixel of a tile, of a map [N, Ho, Wo, step].
template <class T>
NASFAST_INLINE void prefetch_pixels(const Params& p, const Tile& tile, const T* map, int64_t step,
                                    int64_t count) {
    for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t first = tile.pixel(p, row * tile.columns);
        for (int64_t pixel = first; pixel < first + tile.columns; ++pixel)
            prefetch(map + pixel * step, count);
    }
}

// Elements First, First + 2, ... of two vectors.
template <int First, class V, size_t... I>
NASFAST_INLINE V every_second(V a, V b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, First + 2 * I...);
}

template <int Width, class T, size_t... I>
NASFAST_INLINE Vector<T, Width> every_other(T even, T odd, std::index_sequence<I...>) {
    return Vector<T, Width>{(I % 2 ? odd : even)...};
}

template <int Width, class T, int All>
NASFAST_INLINE Vector<T, Width> first_lanes(const Vector<T, All>& vector) {
    Vector<T, Width> result;
    __builtin_memcpy(&result, &vector, sizeof(result));
    return result;
}

// Locates the samples of a tile, of the offset groups from `group` on. An image has fewer than 2^31 elements.
template <class A, bool Gradients>
void locate(const Params& p, const A* offset, const A* mask, int64_t group, const Tile& tile,
            const Samples<A, Gradients>& samples) {
    using Index = typename Samples<A, Gradients>::Index;
    constexpr int w = kWidth<A>;
    using V = Vector<A, w>;
    using I = Vector<Index, w>;
    const int64_t per_pixel = samples.per_pixel, count = tile.pixels() * per_pixel;
    const int64_t skip = group * p.kernel_h * p.kernel_w;
    A* tap = samples.taps;
    while (tap != samples.taps + 2 * per_pixel)
        for (int64_t i = 0; i < p.kernel_h; ++i)
            for (int64_t j = 0; j < p.kernel_w; ++j)
                *tap++ = A(i * p.dilation_h), *tap++ = A(j * p.dilation_w);
    A *position = samples.position, *factor = samples.mask;
    const V odd = every_other<w>(A(0), A(1), std::make_index_sequence<w>());
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
        const A y = A(row * p.stride_h - p.pad_h);
        const int64_t first = (tile.image * p.out_height + row) * p.out_width;
        for (int64_t column = tile.column; column < tile.column + tile.columns; ++column) {
            const V origin = odd > 0 ? V{} + A(column * p.stride_w - p.pad_w) : V{} + y;
            const A* const from = offset + (first + column) * p.offset_step + 2 * skip;
            by_vectors<w>(2 * per_pixel, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int n = decltype(width)::value;
                const auto start = load<n>(samples.taps + j) + first_lanes<n, A, w>(origin);
                store<n>(position + j, start + load<n>(from + j));
            });
            position += 2 * per_pixel;
            if (!mask) continue;
            by_vectors<w>(per_pixel, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int n = decltype(width)::value;
                store<n>(factor + j, load<n>(mask + (first + column) * p.mask_step + skip + j));
            });
            factor += per_pixel;
        }
    }
    if (!mask) std::fill_n(samples.mask, count, A(1));

    const A height = A(p.height), width = A(p.width);
    const Index rows = Index(p.height), columns = Index(p.width);
    const Index step = Index(p.channels), down = step * columns;
    const V zero = V{}, one = zero + 1;
    for (int64_t s = 0; s < count; s += w) {
        auto& block = samples.blocks[s / w];
        const auto lanes = std::make_index_sequence<w>();
        const V a = load<w>(samples.position + 2 * s), b = load<w>(samples.position + 2 * s + w);
        const V sy = every_second<0>(a, b, lanes), sx = every_second<1>(a, b, lanes);
        const I inside = (sy > -1) & (sy < height) & (sx > -1) & (sx < width);  // false for a NaN
        const V y = inside ? sy : zero, x = inside ? sx : zero;
        const auto floor = [](V value) NASFAST_INLINE_LAMBDA {
            const I truncated = __builtin_convertvector(value, I);
            return truncated + (__builtin_convertvector(truncated, V) > value);  // true is -1
        };
        const I top = floor(y), left = floor(x);
        const V wy = y - __builtin_convertvector(top, V), wx = x - __builtin_convertvector(left, V);
        const V factor = inside ? load<w>(samples.mask + s) : zero;
        const I is_top = top >= 0, is_bottom = top < rows - 1, is_left = left >= 0,
                is_right = left < columns - 1;
        const V row[2] = {is_top ? one - wy : zero, is_bottom ? wy : zero};
        const V column[2] = {is_left ? one - wx : zero, is_right ? wx : zero};
        const I corner = top * down + left * step;  // may lie outside
        const I upper = is_top ? corner : corner + down, lower = is_bottom ? corner + down : corner;
        const I to_left = is_left ? I{} : I{} + step, to_right = is_right ? I{} + step : I{};
        store<w>(block.corner[0], inside ? upper + to_left : I{} - 1);
        store<w>(block.corner[1], upper + to_right);
        store<w>(block.corner[2], lower + to_left);
        store<w>(block.corner[3], lower + to_right);
        for (int i = 0; i < 4; ++i) store<w>(block.weight[i], row[i / 2] * column[i % 2] * factor);
        if constexpr (Gradients) {
            store<w>(block.mask, factor);
            store<w>(block.row_slope[0], is_top ? -one : zero);
            store<w>(block.row_slope[1], is_bottom ? one : zero);
            store<w>(block.column_slope[0], is_left ? -one : zero);
            store<w>(block.column_slope[1], is_right ? one : zero);
            for (int i = 0; i < 2; ++i) store<w>(block.row[i], row[i]), store<w>(block.column[i], column[i]);
        }
    }
}

// Calls body(group, begin, count, before) for the parts of the channels [begin, begin + count) that lie in
// one offset group; `before` counts the channels of earlier parts.
template <class Body>
NASFAST_INLINE void by_offset_group(const Params& p, int64_t begin, int64_t count, const Body& body) {
    const int64_t per_group = p.channels / p.offset_groups;
    for (int64_t before = 0; before < count;) {
        const int64_t group = (begin + before) / per_group;
        const int64_t part = std::min(count - before, (group + 1) * per_group - begin - before);
        body(group, begin + before, part, before);
        before += part;
    }
}

// Calls body(vectors) with the number of full vectors that `count` common channels are, or 0 for any count.
template <class A, class Body>
NASFAST_INLINE void with_vectors(int64_t count, const Body& body) {
    if (count == 4 * kWidth<A>) return body(std::integral_constant<int, 4>());
    if (count == 3 * kWidth<A>) return body(std::integral_constant<int, 3>());
    if (count == 2 * kWidth<A>) return body(std::integral_constant<int, 2>());
    body(std::integral_constant<int, 0>());
}

// to[i, tap * to_tap + (0:count)] = mask * bilinear(image)[channel:channel + count] of every pixel i of a
// tile and every tap; sample `first` is the first one. Vectors: count is that many full vectors; 0 for any
// count.
template <int Vectors, class T, class A, class To>
void sample_tile(const Params& p, const T* image, const Samples<A, false>& samples, int64_t first,
                 int64_t pixels, int64_t channel, int64_t count, To* to, int64_t to_row, int64_t to_tap) {
    if constexpr (Vectors > 0) count = Vectors * kWidth<A>;
    const int64_t taps = p.kernel_h * p.kernel_w;
    for (int64_t i = 0; i < pixels; ++i)
        for (int64_t tap = 0; tap < taps; ++tap) {
            const auto sample = samples[first + i * samples.per_pixel + tap];
            To* const column = to + i * to_row + tap * to_tap;
            if (!sample.inside()) {
                std::fill_n(column, count, To());
                continue;
            }
            const T* const from = image + channel;
            const T *a = from + sample.corner(0), *b = from + sample.corner(1);
            const T *c = from + sample.corner(2), *d = from + sample.corner(3);
            const A wa = sample.weight(0), wb = sample.weight(1), wc = sample.weight(2),
                    wd = sample.weight(3);
            by_vectors<kWidth<A>>(count, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store_as<To, w>(column + j, wa * load_as<A, w>(a + j) + wb * load_as<A, w>(b + j) +
                                                wc * load_as<A, w>(c + j) + wd * load_as<A, w>(d + j));
            });
        }
}

template <class T, class A, class To>
void sample(const Params& p, const T* image, const Samples<A, false>& samples, int64_t first, int64_t pixels,
            int64_t channel, int64_t count, To* to, int64_t to_row, int64_t to_tap) {
    with_vectors<A>(count, [&](auto vectors) {
        sample_tile<decltype(vectors)::value>(p, image, samples, first, pixels, channel, count, to, to_row,
                                              to_tap);
    });
}

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
