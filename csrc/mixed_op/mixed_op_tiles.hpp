// What the passes of the mixed operation on the CPU share. Included by per-ISA sources.
//
// A pass walks over tiles of one image, as deform_conv2d does. Rows of pixels are treated as flat vectors of
// columns * C elements, with what belongs to a channel repeated for each column (a pattern): then any number
// of channels fills whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "deform_conv2d/deform_conv2d_sample.hpp"
#include "mixed_op/mixed_op.h"

namespace nasfast::mixed_op::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;
namespace dc = deform_conv2d::NASFAST_ISA;

constexpr int64_t kTile = 96;   // pixels: a multiple of the rows of every block of sums
constexpr int64_t kRadius = 2;  // of the 3x3 taps with dilation 2
constexpr int64_t kSpill = 64;  // elements behind a buffer that whole vectors may touch

// The deformable branch as deform_conv2d sees it, on a map of `channels`.
inline deform_conv2d::Params deform_params(const Params& p, int64_t channels) {
    deform_conv2d::Params d = {};
    d.batch = p.batch, d.channels = channels, d.out_channels = p.channels;
    d.height = d.out_height = p.height, d.width = d.out_width = p.width;
    d.kernel_h = d.kernel_w = 3;
    d.stride_h = d.stride_w = d.pad_h = d.pad_w = d.dilation_h = d.dilation_w = 1;
    d.groups = 1, d.offset_groups = p.offset_groups;
    d.offset_step = d.mask_step = p.offset_groups * 3 * kTaps;
    d.weight_channels_last = 1;
    return d;
}

// Sizes of a call that every pass needs.
struct Geometry {
    const Params& p;
    deform_conv2d::Params deform;
    dc::Tiling tiling;
    int64_t columns;                               // of a tile, at most
    int64_t channels, pixels, positions, offsets;  // pixels of the batch; 18 D and 27 D

    explicit Geometry(const Params& p)
        : p(p),
          deform(deform_params(p, p.channels)),
          tiling(deform, kTile),
          columns(ceil_div(p.width, tiling.across)),
          channels(p.channels),
          pixels(p.batch * p.height * p.width),
          positions(p.offset_groups * 2 * kTaps),
          offsets(p.offset_groups * 3 * kTaps) {}
    int64_t tiles() const { return p.batch * tiling.per_image(); }
    // First element of a row of a tile in a map of `channels`.
    int64_t row(const dc::Tile& tile, int64_t row, int64_t channels) const {
        return ((tile.image * p.height + tile.row + row) * p.width + tile.column) * channels;
    }
};

template <class T>
bool has(const Branches<T>& b, int map) {
    return (map == kConv ? b.conv : map == kDil ? b.dil : map == kDef ? b.def : b.depthwise1) != nullptr;
}

// Copies `count` elements, and leaves what follows them within the last vector undefined.
template <class From, class To>
NASFAST_INLINE void copy_run(const From* from, int64_t count, To* to) {
    constexpr int w = kWidth<Accumulate<From>>;
    for (int64_t i = 0; i < count; i += w) store_as<To, w>(to + i, load_as<Accumulate<From>, w>(from + i));
}

// Repeats [C] for `columns` columns.
template <class S, class A>
void repeat(const S* values, int64_t channels, int64_t columns, A* pattern) {
    for (int64_t i = 0; i < columns * channels; ++i) pattern[i] = widen(values[i % channels]);
}

// The weights [C, 3, 3] of a depthwise convolution as one pattern for each tap.
template <class S, class A>
void repeat_taps(const S* weight, int64_t channels, int64_t columns, A* patterns) {
    for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t i = 0; i < columns * channels; ++i)
            patterns[tap * columns * channels + i] = widen(weight[i % channels * kTaps + tap]);
}

// A tile with a border of `radius` pixels, zero outside the image: [rows + 2 radius, columns + 2 radius, C].
struct Window {
    int64_t radius, channels, row_size;  // elements of a row

    Window(const dc::Tile& tile, int64_t radius, int64_t channels)
        : radius(radius), channels(channels), row_size((tile.columns + 2 * radius) * channels) {}
    // Elements of the largest window.
    static int64_t most(const Geometry& g, int64_t radius) {
        const int64_t rows = ceil_div(g.p.height, g.tiling.down);
        return (rows + 2 * radius) * (g.columns + 2 * radius) * g.channels + kSpill;
    }
    // Element of the pixel (row, column) of the tile; both from -radius on.
    int64_t at(int64_t row, int64_t column) const {
        return (row + radius) * row_size + (column + radius) * channels;
    }
};

// Fills a window with transform(vector, index in the row's pattern, element of the map) of a map [N, H, W,
// C].
template <class T, class A, class Transform>
void fill(const Geometry& g, const dc::Tile& tile, const Window& window, const T* map, A* to,
          const Transform& transform) {
    const int64_t c = window.channels, radius = window.radius;
    const int64_t left = std::max<int64_t>(0, radius - tile.column);
    const int64_t right = std::min(tile.columns + 2 * radius, g.p.width + radius - tile.column);
    for (int64_t i = -radius; i < tile.rows + radius; ++i, to += window.row_size) {
        const int64_t y = tile.row + i;
        if (y < 0 || y >= g.p.height) {
            std::fill_n(to, window.row_size, A(0));
            continue;
        }
        const int64_t first = ((tile.image * g.p.height + y) * g.p.width + tile.column + left - radius) * c;
        std::fill_n(to, left * c, A(0));
        by_vectors<kWidth<A>>((right - left) * c, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            store<w>(to + left * c + j, transform(load_as<A, w>(map + first + j), j, first + j));
        });
        std::fill_n(to + right * c, window.row_size - right * c, A(0));
    }
}

template <class V>
NASFAST_INLINE V relu(V value) {
    return value < 0 ? V{} : value;  // a NaN stays one
}

// ReLU of a map.
template <class T, class A>
void fill_relu(const Geometry& g, const dc::Tile& tile, const Window& window, const T* map, A* to) {
    fill(g, tile, window, map, to,
         [](auto value, int64_t, int64_t) NASFAST_INLINE_LAMBDA { return relu(value); });
}

// ReLU(map * scale + shift), both patterns.
template <class T, class A>
void fill_normalised(const Geometry& g, const dc::Tile& tile, const Window& window, const T* map,
                     const A* scale, const A* shift, A* to) {
    fill(g, tile, window, map, to, [=](auto value, int64_t j, int64_t) NASFAST_INLINE_LAMBDA {
        constexpr int w = sizeof(value) / sizeof(A);
        return relu(value * load<w>(scale + j) + load<w>(shift + j));
    });
}

// columns [pixel, 9C] (rows of `row` elements): the taps of a 3x3 convolution of a window.
template <class A, class To>
void gather(const dc::Tile& tile, const Window& window, const A* from, int64_t dilation, To* columns,
            int64_t row) {
    const int64_t c = window.channels;
    for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t x = 0; x < tile.columns; ++x, columns += row) {
            To* to = columns;
            for (int64_t ky = -dilation; ky <= dilation; ky += dilation)
                if (dilation == 1)
                    copy_run(from + window.at(y + ky, x - 1), 3 * c, to), to += 3 * c;
                else
                    for (int64_t kx = -dilation; kx <= dilation; kx += dilation, to += c)
                        copy_run(from + window.at(y + ky, x + kx), c, to);
            std::fill(to, columns + row, To());
        }
}

// Adds columns [pixel, 9C] to the pixels of a window that they came from.
template <class A>
void scatter(const dc::Tile& tile, const Window& window, const A* columns, int64_t row, int64_t dilation,
             A* to) {
    const int64_t c = window.channels, run = dilation == 1 ? 3 * c : c;
    for (int64_t y = 0; y < tile.rows; ++y)
        for (int64_t x = 0; x < tile.columns; ++x, columns += row) {
            const A* from = columns;
            for (int64_t ky = -dilation; ky <= dilation; ky += dilation)
                for (int64_t kx = -dilation; kx <= (dilation == 1 ? -1 : dilation);
                     kx += dilation, from += run) {
                    A* const at = to + window.at(y + ky, x + kx);
                    by_vectors<kWidth<A>>(run, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                        constexpr int w = decltype(width)::value;
                        store<w>(at + j, load<w>(at + j) + load<w>(from + j));
                    });
                }
        }
}

// to [pixel, C] = 3x3 depthwise convolution of a window.
template <class A>
void depthwise(const dc::Tile& tile, const Window& window, const A* from, const A* patterns,
               int64_t pattern_size, A* to) {
    const int64_t flat = tile.columns * window.channels;
    for (int64_t y = 0; y < tile.rows; ++y, to += flat) {
        const A* const first = from + window.at(y - 1, -1);
        by_vectors<kWidth<A>>(flat, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            Vector<A, w> sum = {};
#pragma GCC unroll 9
            for (int64_t tap = 0; tap < kTaps; ++tap)
                sum += load<w>(first + tap / 3 * window.row_size + tap % 3 * window.channels + j) *
                       load<w>(patterns + tap * pattern_size + j);
            store<w>(to + j, sum);
        });
    }
}

// A packed right-hand side.
template <class Product>
struct Packed {
    using Operand = typename Product::Operand;
    typename Product::Panels panels;
    int64_t rows, depth;  // depth: rows rounded up
    Array<Operand> memory;

    // Element (k, j) of [rows, columns] is b[k * b_row + j * b_column].
    template <class S>
    Packed(int64_t rows, int64_t columns, const S* b, int64_t b_row, int64_t b_column)
        : panels(columns),
          rows(rows),
          depth(round_up(rows, Product::kDepthMultiple)),
          memory(depth * panels.padded()) {
        if (!b || !rows || !columns) return;
        Product::pack(panels, depth, 0, rows, b, b_row, b_column, memory.get());
        Product::clear(panels, depth, rows, depth, memory.get());
    }
    int64_t padded() const { return panels.padded(); }
    // c [pixels, padded()] = or += a [pixels, depth].
    template <class A>
    void multiply(int64_t pixels, const Operand* a, int64_t a_row, Into into, A* c, int64_t c_row) const {
        for (int64_t k = 0; k < depth; k += Product::kDepth)
            Product::multiply(pixels, std::min(Product::kDepth, depth - k), a + k, a_row, panels,
                              memory.get(), depth, k, k ? Into::add : into, c, c_row);
    }
};

// [pixel, count] as a left operand with rows of `row` elements; in place where it is one already.
template <class Product, class A>
const typename Product::Operand* as_operand(int64_t pixels, int64_t count, const A* from, int64_t from_row,
                                            typename Product::Operand* to, int64_t& row) {
    using Operand = typename Product::Operand;
    if constexpr (std::is_same_v<Operand, A>) {
        row = from_row;
        return from;
    } else {
        row = round_up(count, Product::kDepthMultiple);
        for (int64_t i = 0; i < pixels; ++i) {
            copy_run(from + i * from_row, count, to + i * row);
            std::fill(to + i * row + count, to + (i + 1) * row, Operand());
        }
        return to;
    }
}

// Mean and sum of squared deviations of a map, by tiles; merged in the order of the tiles (Chan et al.).
template <class A>
class Moments {
public:
    Moments(const Geometry& g) : g_(g), tiles_(g.tiles() * kMaps * 2 * g.channels) {}

    void add(int64_t tile, int map, int64_t pixels, const A* values, int64_t row) {
        A* const mean = at(tile, map);
        by_vectors<kWidth<A>>(g_.channels, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            Vector<A, w> sum = {}, squares = {};
            for (int64_t i = 0; i < pixels; ++i) sum += load<w>(values + i * row + j);
            const auto average = sum / A(pixels);
            for (int64_t i = 0; i < pixels; ++i) {
                const auto deviation = load<w>(values + i * row + j) - average;
                squares += deviation * deviation;
            }
            store<w>(mean + j, average), store<w>(mean + g_.channels + j, squares);
        });
    }
    // Mean and biased variance: [2, C].
    void finish(int map, A* statistics) const {
        const int64_t c = g_.channels;
        std::vector<double> mean(c, 0.0), squares(c, 0.0);
        for (int64_t tile = 0; tile < g_.tiles(); ++tile) {
            const double pixels = g_.tiling[tile].pixels();
            for (int64_t i = 0; i < c; ++i) mean[i] += pixels * at(tile, map)[i];
        }
        for (int64_t i = 0; i < c; ++i) mean[i] /= g_.pixels;
        for (int64_t tile = 0; tile < g_.tiles(); ++tile) {
            const double pixels = g_.tiling[tile].pixels();
            for (int64_t i = 0; i < c; ++i) {
                const double deviation = at(tile, map)[i] - mean[i];
                squares[i] += at(tile, map)[c + i] + pixels * deviation * deviation;
            }
        }
        for (int64_t i = 0; i < c; ++i)
            statistics[i] = A(mean[i]), statistics[c + i] = A(squares[i] / g_.pixels);
    }

private:
    A* at(int64_t tile, int map) const { return tiles_.get() + (tile * kMaps + map) * 2 * g_.channels; }

    const Geometry& g_;
    Array<A> tiles_;
};

// norm(raw) = raw * scale + shift of every map, [kMaps, C] each, in double.
template <class T>
struct Normalisation {
    int64_t channels;
    Array<double> scale, shift;

    Normalisation(const Params& p, const Branches<T>& b)
        : channels(p.channels), scale(kMaps * p.channels), shift(kMaps * p.channels) {
        for (int64_t i = 0; i < kMaps * p.channels; ++i)
            scale.get()[i] = b.scale ? b.scale[i] : 1, shift.get()[i] = b.shift ? b.shift[i] : 0;
    }
    // Folds mean and variance in, [2, C].
    template <class A>
    void fold(int map, const A* statistics, double eps) {
        for (int64_t c = 0; c < channels; ++c) {
            double& factor = scale.get()[map * channels + c];
            factor /= std::sqrt(statistics[channels + c] + eps);
            shift.get()[map * channels + c] -= statistics[c] * factor;
        }
    }
};

// exp by 2^i * 2^f, f by a polynomial; to 2 units in the last place for float.
template <class V>
NASFAST_INLINE V exponential(V x) {
    using A = std::remove_reference_t<decltype(V{}[0])>;
    V result;
    if constexpr (std::is_same_v<A, float>) {
        constexpr int w = sizeof(V) / sizeof(float);
        using I = Vector<int32_t, w>;
        x = x > 88.0f ? V{} + 88.0f : x < -87.0f ? V{} - 87.0f : x;
        const V shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
        const V n = shifted - 12582912.0f;
        const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
        V y = V{} + 1.9875691500e-4f;
        y = y * r + 1.3981999507e-3f;
        y = y * r + 8.3334519073e-3f;
        y = y * r + 4.1665795894e-2f;
        y = y * r + 1.6666665459e-1f;
        y = y * r + 5.0000001201e-1f;
        y = y * r * r + r + 1.0f;
        const I exponent = ((I)shifted - 0x4b400000) << 23;
        result = (V)((I)y + exponent);
    } else {
        for (size_t i = 0; i < sizeof(V) / sizeof(A); ++i) result[i] = std::exp(x[i]);
    }
    return result;
}

template <class V>
NASFAST_INLINE V sigmoid(V x) {
    const V y = V{} + 1 / (exponential(-x) + 1);
    return x == x ? y : x;  // a NaN stays one
}

}  // namespace nasfast::mixed_op::NASFAST_ISA
