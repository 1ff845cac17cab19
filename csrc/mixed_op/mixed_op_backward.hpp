// Backward pass of the mixed operation on the CPU, for any kind of matrix product. Included by per-ISA
// sources.
//
// The gradient of a raw map is a * grad + b + c * raw with constants of its channels, which come out of sums
// over the batch; the first pass makes these sums, and the gradients of the factors with them. It is formed
// where it is used, a tile at a time. With Norm::fixed it is grad itself (a = 1), and what factor and scale
// contribute is folded into the weights.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "deform_conv2d/deform_conv2d_backward.hpp"
#include "mixed_op/mixed_op_forward.hpp"
#include "mixed_op/mixed_op_tiles.hpp"

namespace nasfast::mixed_op::NASFAST_ISA {

// Adds the gradient of a depthwise weight: sums [9, pattern] += window at the taps * grad [pixel, C].
template <class A>
void depthwise_outer(const dc::Tile& tile, const Window& window, const A* from, const A* grad, A* sums,
                     int64_t pattern_size) {
    const int64_t flat = tile.columns * window.channels;
    for (int64_t y = 0; y < tile.rows; ++y, grad += flat) {
        const A* const first = from + window.at(y - 1, -1);
        by_vectors<kWidth<A>>(flat, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            const auto value = load<w>(grad + j);
#pragma GCC unroll 9
            for (int64_t tap = 0; tap < kTaps; ++tap) {
                A* const sum = sums + tap * pattern_size + j;
                store<w>(sum, load<w>(sum) + value * load<w>(first + tap / 3 * window.row_size +
                                                             tap % 3 * window.channels + j));
            }
        });
    }
}

// Adds the gradient of a depthwise convolution's input, [pixel, C] times the taps, to a window.
template <class A>
void depthwise_scatter(const dc::Tile& tile, const Window& window, const A* grad, const A* patterns,
                       int64_t pattern_size, A* to) {
    const int64_t flat = tile.columns * window.channels;
    for (int64_t y = 0; y < tile.rows; ++y, grad += flat)
        for (int64_t tap = 0; tap < kTaps; ++tap) {
            A* const row = to + window.at(y + tap / 3 - 1, tap % 3 - 1);
            const A* const pattern = patterns + tap * pattern_size;
            by_vectors<kWidth<A>>(flat, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store<w>(row + j, load<w>(row + j) + load<w>(grad + j) * load<w>(pattern + j));
            });
        }
}

// [pixel, C] with rows of `row` elements -> without gaps.
template <class A>
void compact(int64_t pixels, int64_t channels, const A* from, int64_t row, A* to) {
    for (int64_t i = 0; i < pixels; ++i) copy_run(from + i * row, channels, to + i * channels);
}

template <class Product, class T>
class BackwardPass {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    using Outer = typename Product::Outer;
    using Packed = NASFAST_ISA::Packed<Product>;

public:
    BackwardPass(const Params& p, const Backward<T>& t)
        : g(p),
          t(t),
          b(t.branches),
          c(p.channels),
          fixed(static_cast<Norm>(p.norm) == Norm::fixed),
          conv_columns(b.conv ? c : 0),
          near_columns(conv_columns + (b.def ? g.offsets : 0)),
          bands(p.batch >= kUnits || !p.batch ? 1 : ceil_div(kUnits, p.batch)),
          units(bands > 1 ? p.batch * bands : std::min(p.batch, 2 * kUnits)),
          slice(padded_slice(c / p.offset_groups)),
          wide(deform_params(p, p.offset_groups * slice)),
          map(rectified(g, t.input, b.def, slice)),
          norm(p, b),
          across(g.columns + 2),
          pattern(g.columns * c),
          slope(kMaps * 3 * across * c),
          dots(kMaps * c),
          grad_sums(c) {}

    void run() {
        for (int map = 0; map < kMaps; ++map)
            if (!fixed && has(b, map)) norm.fold(map, t.statistics + map * 2 * c, g.p.eps);
        const Array<T> fixed_inner(fixed && b.depthwise1 ? g.pixels * c : 0);
        if (fixed)
            ForwardPass<Product, T>(g.p, {t.input, b, nullptr, t.offset, nullptr, nullptr})
                .prepare(fixed_inner.get());
        raw_inner = fixed ? fixed_inner.get() : t.raw + kInner * g.pixels * c;
        std::fill_n(dots.get(), kMaps * c, 0.0);
        reduce();
        const Array<A> inner(b.depthwise1 ? g.pixels * c : 0);
        if (b.depthwise1) separable(inner.get());
        const Array<A> sums(bands * g.pixels * c), deform_sums(b.def ? bands * g.pixels * wide.channels : 0);
        for (const Array<A>* map : {&sums, &deform_sums}) {
            const int64_t row = map->size() / std::max<int64_t>(1, bands * g.p.batch * g.p.height);
            parallel_for(bands * g.p.batch * g.p.height,
                         [&](int64_t i) { std::fill_n(map->get() + i * row, row, A(0)); });
        }
        branches(inner.get(), sums.get(), deform_sums.get());
        if (t.grad_input) finish_input(sums.get(), deform_sums.get());
        finish_scalars();
    }

private:
    static constexpr int64_t kUnits = 8;     // at least, where there are so many tiles
    static constexpr int64_t kStreams = 16;  // of tiles in the other passes
    static constexpr int64_t kGroup = 16;    // pixels of a flat group
    // of the derivatives of a tile's samples, one kind after another
    static constexpr int64_t kStride = round_up(kTile * kTaps, kWidth<A>);

    // Narrow slices as halves of vectors, so that no two stores overlap: a load that meets a part of an
    // earlier store waits until that is in the cache.
    static int64_t padded_slice(int64_t channels) {
        const int64_t half = std::max(1, kWidth<A> / 2);
        return round_up(channels, channels > 3 * half ? 2 * half : half);
    }
    double factor(int map, int64_t out) const { return b.factors[map] * norm.scale.get()[map * c + out]; }
    const T* raw(int map) const { return map == kInner ? raw_inner : t.raw + map * g.pixels * c; }
    const A* slopes(int map, int which) const { return slope.get() + (map * 3 + which) * across * c; }

    // Sums over the batch: of grad, of grad * input for skip, and with statistics of grad * (raw - mean).
    void reduce() {
        std::vector<int> maps;
        for (int map : {kConv, kSep, kDil, kDef})
            if (!fixed && has(b, map)) maps.push_back(map);
        const int64_t flat = kGroup * c, groups = ceil_div(g.pixels, kGroup), size = g.pixels * c;
        const int64_t rows = 2 + static_cast<int64_t>(maps.size());
        const Array<A> means(rows * flat);
        for (size_t i = 0; i < maps.size(); ++i)
            repeat(t.statistics + maps[i] * 2 * c, c, kGroup, means.get() + i * flat);
        const int64_t streams = std::min(kStreams * 4, groups);
        const Array<A> partial(std::max<int64_t>(streams, 1) * rows * flat);
        parallel_for(streams, [&](int64_t unit) {
            A* const sums = partial.get() + unit * rows * flat;
            std::fill_n(sums, rows * flat, A(0));
            for (int64_t i = unit * groups / streams; i < (unit + 1) * groups / streams; ++i) {
                const int64_t begin = i * flat;
                by_vectors<kWidth<A>>(
                    std::min(flat, size - begin), [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                        constexpr int w = decltype(width)::value;
                        const auto grad = load_as<A, w>(t.grad + begin + j);
                        const auto add = [&](int64_t row, Vector<A, w> value) NASFAST_INLINE_LAMBDA {
                            A* const sum = sums + row * flat + j;
                            store<w>(sum, load<w>(sum) + value);
                        };
                        add(0, grad);
                        add(1, grad * load_as<A, w>(t.input + begin + j));
                        for (size_t k = 0; k < maps.size(); ++k)
                            add(2 + k, grad * (load_as<A, w>(raw(maps[k]) + begin + j) -
                                               load<w>(means.get() + k * flat + j)));
                    });
            }
        });
        const auto total = [&](int64_t row, int64_t channel) {
            double sum = 0;
            for (int64_t unit = 0; unit < streams; ++unit)
                for (int64_t i = channel; i < flat; i += c)
                    sum += partial.get()[(unit * rows + row) * flat + i];
            return sum;
        };
        for (int64_t i = 0; i < c; ++i) {
            grad_sums.get()[i] = total(0, i), skip_dot += total(1, i);
            for (size_t k = 0; k < maps.size(); ++k) dots.get()[maps[k] * c + i] = total(2 + k, i);
        }
        for (int map : {kConv, kSep, kDil, kDef})
            if (has(b, map)) {
                if (fixed)
                    set_slopes(map, [](int64_t) { return std::array<double, 3>{1, 0, 0}; });
                else
                    set_slopes(map, [&](int64_t i) {
                        return through_norm(map, i, factor(map, i), grad_sums.get()[i],
                                            dots.get()[map * c + i]);
                    });
            }
    }

    template <class Slopes>
    void set_slopes(int map, const Slopes& of) {
        for (int64_t i = 0; i < c; ++i) {
            const auto values = of(i);
            for (int which = 0; which < 3; ++which)
                for (int64_t column = 0; column < across; ++column)
                    slope.get()[((map * 3 + which) * across + column) * c + i] = A(values[which]);
        }
    }

    // Gradient of raw, where that of norm(raw) / (raw's own scale) is grad: a * grad + b + c * raw, from the
    // sums of grad and of grad * (raw - mean).
    std::array<double, 3> through_norm(int map, int64_t i, double scale, double sum, double dot) const {
        const A* const statistics = t.statistics + map * 2 * c;
        const double n = double(g.pixels), mean = statistics[i];
        const double slope = -dot / n / (statistics[c + i] + g.p.eps);
        return {scale, scale * (-sum / n - slope * mean), scale * slope};
    }

    // The gradient of a raw map on a tile, [pixel, C].
    void difference(int map, const dc::Tile& tile, const A* grad_map, A* to) const {
        const int64_t flat = tile.columns * c;
        for (int64_t y = 0; y < tile.rows; ++y, to += flat) {
            const int64_t first = g.row(tile, y, c);
            by_vectors<kWidth<A>>(flat, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                const auto grad =
                    grad_map ? load<w>(grad_map + first + j) : load_as<A, w>(t.grad + first + j);
                store<w>(to + j, gradient<w>(map, grad, j, first + j));
            });
        }
    }
    template <int w>
    NASFAST_INLINE Vector<A, w> gradient(int map, Vector<A, w> grad, int64_t j, int64_t at) const {
        const auto scaled = load<w>(slopes(map, 0) + j) * grad;
        if (fixed) return scaled;
        return scaled + load<w>(slopes(map, 1) + j) +
               load<w>(slopes(map, 2) + j) * load_as<A, w>(raw(map) + at);
    }

    // Weight [C, inner] times factor and scale of its output channel with Norm::fixed.
    std::vector<T> folded(int map, const T* weight, int64_t inner) const {
        std::vector<A> values(c * inner + kSpill);
        std::vector<T> result(c * inner + kSpill);
        for (int64_t i = 0; i < c * inner; ++i)
            values[i] = widen(weight[i]) * (fixed ? A(factor(map, i / inner)) : A(1));
        copy_run(values.data(), c * inner, result.data());
        return result;
    }

    // Of the second half of the separable branch; all but the product for one row of pixels of a tile.
    struct SeparableWeights {
        const Packed transposed;           // pointwise2
        const Array<A> patterns, flipped;  // depthwise2, and with its taps in reverse
        const Array<A> scale, shift;       // that normalise inner
        std::vector<A> means;              // of inner

        explicit SeparableWeights(const BackwardPass& pass)
            : transposed(pass.c, pass.c, pass.folded(kSep, pass.b.pointwise2, pass.c).data(), pass.c, 1),
              patterns(kTaps * pass.pattern),
              flipped(kTaps * pass.pattern),
              scale(pass.across * pass.c),
              shift(pass.across * pass.c),
              means(pass.across * pass.c, A(0)) {
            const int64_t c = pass.c, pattern = pass.pattern;
            repeat_taps(pass.b.depthwise2, c, pass.g.columns, patterns.get());
            for (int64_t tap = 0; tap < kTaps; ++tap)
                std::copy_n(patterns.get() + tap * pattern, pattern,
                            flipped.get() + (kTaps - 1 - tap) * pattern);
            repeat(pass.norm.scale.get() + kInner * c, c, pass.across, scale.get());
            repeat(pass.norm.shift.get() + kInner * c, c, pass.across, shift.get());
            if (!pass.fixed) repeat(pass.t.statistics + kInner * 2 * c, c, pass.across, means.data());
        }
    };

    struct SeparableScratch {
        A *window, *flat, *ring, *q_window, *tile_grad, *sums;
        Operand* operand;
        Outer outer;

        SeparableScratch(Arena& arena, const BackwardPass& pass, int64_t padded) {
            const int64_t c = pass.c, in_window = Window::most(pass.g, 1);
            const int64_t rows = round_up(in_window / c + 1, Product::kRowMultiple);
            window = arena.take<A>(in_window);
            flat = arena.take<A>(kTile * c + 2 * kSpill);
            ring = arena.take<A>(in_window);
            q_window = arena.take<A>(in_window);
            tile_grad = arena.take<A>(kTile * c + kSpill);
            sums = arena.take<A>(rows * padded);
            operand = arena.take<Operand>(rows * round_up(c, Product::kDepthMultiple) + kSpill);
            outer = Outer(arena, c, c, kTile);
        }
    };

    // Back through the second half of the separable branch. inner = gradient of norm(inner map) / its scale.
    void separable(A* inner) {
        const SeparableWeights weights(*this);
        const int64_t tiles = g.tiles(), streams = std::min(kStreams, tiles);
        // of a stream: the sums of inner and inner * (raw - mean), gradients of depthwise2 and pointwise2
        const int64_t part = (2 + kTaps) * pattern + c * c;
        const Array<A> partial(std::max<int64_t>(streams, 1) * part);
        const auto layout = [&](Arena& arena) {
            return SeparableScratch(arena, *this, weights.transposed.padded());
        };
        parallel_for(streams, layout, [&](int64_t unit, SeparableScratch& s) {
            A* const sums = partial.get() + unit * part;
            std::fill_n(sums, part, A(0));
            s.outer.start(c, c);
            for (int64_t index = unit * tiles / streams; index < (unit + 1) * tiles / streams; ++index)
                separable_tile(g.tiling[index], weights, s, inner, sums);
            for (int64_t in = 0; in < c; ++in)
                for (int64_t out = 0; out < c; ++out)
                    sums[(2 + kTaps) * pattern + out * c + in] = s.outer.sum(in, out);
        });
        finish_separable(partial.get(), part, streams);
    }

    void separable_tile(const dc::Tile& tile, const SeparableWeights& weights, SeparableScratch& s, A* inner,
                        A* sums) const {
        const Packed& transposed = weights.transposed;
        const int64_t pixels = tile.pixels(), flat = tile.columns * c;
        const int64_t ring_pixels = (tile.rows + 2) * (tile.columns + 2);
        const Window window(tile, 1, c);
        fill_normalised(g, tile, window, raw_inner, weights.scale.get(), weights.shift.get(), s.window);
        depthwise(tile, window, s.window, weights.patterns.get(), pattern, s.flat);
        fill(g, tile, window, t.grad, s.ring, [&](auto value, int64_t j, int64_t at) NASFAST_INLINE_LAMBDA {
            return gradient<sizeof(value) / sizeof(A)>(kSep, value, j, at);
        });
        int64_t row;
        const Operand* left = as_operand<Product>(ring_pixels, c, s.ring, c, s.operand, row);
        transposed.multiply(ring_pixels, left, row, Into::assign, s.sums, transposed.padded());
        compact(ring_pixels, c, s.sums, transposed.padded(), s.q_window);
        for (int64_t y = 0; y < tile.rows; ++y)
            std::copy_n(s.ring + window.at(y, 0), flat, s.tile_grad + y * flat);
        left = as_operand<Product>(pixels, c, s.tile_grad, c, s.operand, row);
        s.outer.add(pixels, s.flat, c, left, row);
        for (int64_t y = 0; y < tile.rows; ++y)
            std::copy_n(s.q_window + window.at(y, 0), flat, s.tile_grad + y * flat);
        depthwise_outer(tile, window, s.window, s.tile_grad, sums + 2 * pattern, pattern);
        depthwise(tile, window, s.q_window, weights.flipped.get(), pattern, s.flat);
        for (int64_t y = 0; y < tile.rows; ++y) {
            const int64_t first = g.row(tile, y, c);
            const A* const passes = s.window + window.at(y, 0);
            by_vectors<kWidth<A>>(flat, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                const auto value = load<w>(passes + j) > 0 ? load<w>(s.flat + y * flat + j) : Vector<A, w>{};
                store<w>(inner + first + j, value);
                A *const sum = sums + j, *const product = sums + pattern + j;
                store<w>(sum, load<w>(sum) + value);
                store<w>(product, load<w>(product) + value * (load_as<A, w>(raw_inner + first + j) -
                                                              load<w>(weights.means.data() + j)));
            });
        }
    }

    void finish_separable(const A* partial, int64_t part, int64_t streams) {
        const auto total = [&](int64_t row, int64_t channel) {
            double sum = 0;
            for (int64_t unit = 0; unit < streams; ++unit)
                for (int64_t i = channel; i < pattern; i += c)
                    sum += partial[unit * part + row * pattern + i];
            return sum;
        };
        for (int64_t i = 0; i < c; ++i) {
            inner_sums.push_back(total(0, i));
            dots.get()[kInner * c + i] = total(1, i);
            for (int64_t tap = 0; t.grad_depthwise2 && tap < kTaps; ++tap)
                t.grad_depthwise2[i * kTaps + tap] = A(total(2 + tap, i));
        }
        finish_weight(partial + (2 + kTaps) * pattern, part, streams, kSep, b.pointwise2, c,
                      t.grad_pointwise2);
        set_slopes(kInner, [&](int64_t i) {
            const double own = norm.scale.get()[kInner * c + i];
            if (fixed) return std::array<double, 3>{own, 0, 0};
            return through_norm(kInner, i, own, inner_sums[i], dots.get()[kInner * c + i]);
        });
    }

    // Sums the parts of the units to the gradient of a weight [C, size]. With Norm::fixed they are of the sum
    // of products alone: factor and scale are multiplied in, and the products with the weight are the dots.
    void finish_weight(const A* partial, int64_t stride, int64_t count, int map, const T* weight,
                       int64_t size, A* grad) {
        parallel_for(c, [&](int64_t out) {
            double dot = 0;
            sum_parts(partial, stride, count, out * size, size, [&](int64_t i, double sum) {
                dot += sum * widen(weight[i]);
                if (grad) grad[i] = A(fixed && map != kInner ? sum * factor(map, out) : sum);
            });
            if (fixed && map != kInner) dots.get()[map * c + out] += dot;
        });
    }

    // Calls each(i, sum of the parts of the units) for elements [begin, begin + size).
    template <class Each>
    static void sum_parts(const A* partial, int64_t stride, int64_t count, int64_t begin, int64_t size,
                          const Each& each) {
        constexpr int64_t block = 64;
        for (int64_t first = begin; first < begin + size; first += block) {
            const int64_t some = std::min(block, begin + size - first);
            double sums[block] = {};
            for (int64_t unit = 0; unit < count; ++unit)
                for (int64_t i = 0; i < some; ++i) sums[i] += partial[unit * stride + first + i];
            for (int64_t i = 0; i < some; ++i) each(first + i, sums[i]);
        }
    }

    // What a unit of the last pass sums: gradients of the weights, in this order.
    struct Part {
        int64_t near, dil, def, depthwise, pointwise, bias, size;

        Part(int64_t c, int64_t near_columns, int64_t offsets, int64_t pattern) {
            const int64_t square = kTaps * c * c;
            near = 0, dil = near_columns * kTaps * c, def = dil + square, depthwise = def + square;
            pointwise = depthwise + kTaps * pattern, bias = pointwise + c * c, size = bias + offsets;
        }
    };

    // What the last pass multiplies the gradients of the raw maps by.
    struct BranchWeights {
        const Packed near, dil, pointwise;  // near: conv's and the offsets'
        const std::vector<Packed> def;      // of each offset group
        const Array<A> patterns;            // depthwise1, for one row of pixels of a tile

        explicit BranchWeights(const BackwardPass& pass)
            : near(pass.near_weight()),
              dil(pass.dil_weight()),
              pointwise(pass.b.depthwise1 ? pass.c : 0, pass.c, pass.b.pointwise1, pass.c, 1),
              def(pass.def_weights()),
              patterns(kTaps * pass.pattern) {
            if (pass.b.depthwise1) repeat_taps(pass.b.depthwise1, pass.c, pass.g.columns, patterns.get());
        }
    };

    Packed near_weight() const {
        const int64_t taps = kTaps * c;
        std::vector<T> weight;
        if (b.conv) {
            weight = folded(kConv, b.conv, taps);
            weight.resize(c * taps);
        }
        if (b.def) weight.insert(weight.end(), b.offset_weight, b.offset_weight + g.offsets * taps);
        return Packed(near_columns, taps, weight.data(), taps, 1);
    }

    Packed dil_weight() const {
        const std::vector<T> weight = b.dil ? folded(kDil, b.dil, kTaps * c) : std::vector<T>();
        return Packed(b.dil ? c : 0, kTaps * c, weight.data(), kTaps * c, 1);
    }

    std::vector<Packed> def_weights() const {
        std::vector<Packed> packed;
        if (!b.def) return packed;
        const int64_t groups = g.p.offset_groups, real = c / groups;
        const std::vector<T> weight = folded(kDef, b.def, kTaps * c);
        std::vector<T> part(c * kTaps * slice, T());
        for (int64_t group = 0; group < groups; ++group) {
            for (int64_t i = 0; i < c * kTaps; ++i)
                std::copy_n(weight.data() + i * c + group * real, real, part.data() + i * slice);
            packed.emplace_back(c, kTaps * slice, part.data(), kTaps * slice, 1);
        }
        return packed;
    }

    struct Scratch {
        int64_t columns_row;  // of columns
        dc::Samples<A, true> samples;
        A *window, *grad_window, *flat, *columns, *near, *sums, *derivatives;
        Operand* operand;
        Outer near_outer, dil_outer, pointwise_outer;
        std::vector<Outer> def_outers;

        Scratch(Arena& arena, const BackwardPass& pass)
            : columns_row(std::max({typename Product::Panels(kTaps * pass.c).padded(), pass.c + kSpill,
                                    typename Product::Panels(kTaps * pass.slice).padded()})),
              samples(arena, pass.wide, 1, pass.b.def ? kTile : 0) {
            const int64_t c = pass.c, rows = round_up(kTile, Product::kRowMultiple);
            window = arena.take<A>(Window::most(pass.g, kRadius));
            grad_window = arena.take<A>(Window::most(pass.g, kRadius));
            flat = arena.take<A>(kTile * c + kSpill);
            columns = arena.take<A>(rows * columns_row + kSpill);
            near = arena.take<A>(kTile * pass.near_columns + kSpill);
            sums = arena.take<A>(4 * kStride), derivatives = arena.take<A>(3 * kStride);
            const int64_t depth = round_up(std::max(pass.near_columns, c), Product::kDepthMultiple);
            operand = arena.take<Operand>(rows * depth + kSpill);
            if (pass.near_columns) near_outer = Outer(arena, kTaps * c, pass.near_columns, kTile);
            if (pass.b.dil) dil_outer = Outer(arena, kTaps * c, c, kTile);
            if (pass.b.depthwise1) pointwise_outer = Outer(arena, c, c, kTile);
            const int64_t groups = pass.g.p.offset_groups;
            for (int64_t group = 0; pass.b.def && group < groups; ++group)
                def_outers.emplace_back(arena, kTaps * pass.slice, c, kTile);
        }

        void start(const BackwardPass& pass) {
            const int64_t c = pass.c;
            if (pass.near_columns) near_outer.start(kTaps * c, pass.near_columns);
            if (pass.b.dil) dil_outer.start(kTaps * c, c);
            if (pass.b.depthwise1) pointwise_outer.start(c, c);
            for (Outer& outer : def_outers) outer.start(kTaps * pass.slice, c);
        }
    };

    // The gradients of the weights that read ReLU(input), and of ReLU(input).
    void branches(const A* inner, A* all_sums, A* deform_sums) {
        const BranchWeights weights(*this);
        const Part part(c, near_columns, g.offsets, pattern);
        const Array<A> partial(std::max<int64_t>(units, 1) * part.size);
        const int64_t per_image = g.tiling.per_image();
        const auto layout = [&](Arena& arena) { return Scratch(arena, *this); };
        parallel_for(units, layout, [&](int64_t unit, Scratch& s) {
            A* const mine = partial.get() + unit * part.size;
            std::fill_n(mine, part.size, A(0));
            s.start(*this);
            const int64_t band = bands > 1 ? unit % bands : 0;
            A* const sums = all_sums + band * g.pixels * c;
            for (int64_t image = bands > 1 ? unit / bands : unit; image < g.p.batch;
                 image += bands > 1 ? g.p.batch : units) {
                A* const image_sums =
                    deform_sums + (band * g.p.batch + image) * g.p.height * g.p.width * wide.channels;
                for (int64_t i = band * per_image / bands; i < (band + 1) * per_image / bands; ++i)
                    branches_tile(g.tiling[image * per_image + i], weights, part, inner, s, mine, sums,
                                  image_sums);
            }
            keep_outer(s, part, mine);
        });
        finish_branches(partial.get(), part);
    }

    // A tile's gradients: of the weights to the unit's part and the outer products, of ReLU(input) to the
    // sums; image_sums: those of the deformable branch.
    void branches_tile(const dc::Tile& tile, const BranchWeights& weights, const Part& part, const A* inner,
                       Scratch& s, A* mine, A* sums, A* image_sums) const {
        const Window window(tile, kRadius, c);
        const int64_t pixels = tile.pixels();
        fill_relu(g, tile, window, t.input, s.window);
        std::fill_n(s.grad_window, (tile.rows + 2 * kRadius) * window.row_size, A(0));
        if (b.def) {
            difference(kDef, tile, nullptr, s.flat);
            deformable(tile, weights.def, s, image_sums);
        }
        if (near_columns) {
            if (b.conv) {
                difference(kConv, tile, nullptr, s.flat);
                for (int64_t pixel = 0; pixel < pixels; ++pixel)
                    std::copy_n(s.flat + pixel * c, c, s.near + pixel * near_columns);
            }
            for (int64_t pixel = 0; pixel < pixels; ++pixel)
                for (int64_t j = 0; j < near_columns - conv_columns; ++j)
                    mine[part.bias + j] += s.near[pixel * near_columns + conv_columns + j];
            convolution(tile, window, weights.near, near_columns, s.near, 1, s, s.near_outer);
        }
        if (b.dil) {
            difference(kDil, tile, nullptr, s.flat);
            convolution(tile, window, weights.dil, c, s.flat, 2, s, s.dil_outer);
        }
        if (b.depthwise1) {
            difference(kInner, tile, inner, s.flat);
            int64_t row;
            const Operand* const left = as_operand<Product>(pixels, c, s.flat, c, s.operand, row);
            const int64_t padded = weights.pointwise.padded();
            depthwise(tile, window, s.window, weights.patterns.get(), pattern, s.columns);
            s.pointwise_outer.add(pixels, s.columns, c, left, row);
            weights.pointwise.multiply(pixels, left, row, Into::assign, s.columns, padded);
            compact(pixels, c, s.columns, padded, s.flat);
            depthwise_outer(tile, window, s.window, s.flat, mine + part.depthwise, pattern);
            depthwise_scatter(tile, window, s.flat, weights.patterns.get(), pattern, s.grad_window);
        }
        add_window(tile, window, s.grad_window, sums);
    }

    // Back through a 3x3 convolution whose gradient is [pixel, columns].
    void convolution(const dc::Tile& tile, const Window& window, const Packed& weight, int64_t columns,
                     const A* grad, int64_t dilation, Scratch& s, Outer& outer) const {
        const int64_t pixels = tile.pixels();
        int64_t row;
        const Operand* const left = as_operand<Product>(pixels, columns, grad, columns, s.operand, row);
        gather(tile, window, s.window, dilation, s.columns, s.columns_row);
        outer.add(pixels, s.columns, s.columns_row, left, row);
        weight.multiply(pixels, left, row, Into::assign, s.columns, s.columns_row);
        scatter(tile, window, s.columns, s.columns_row, dilation, s.grad_window);
    }

    // The outer products of a unit's tiles as gradients of weights.
    void keep_outer(const Scratch& s, const Part& part, A* mine) const {
        const int64_t taps = kTaps * c, real = c / g.p.offset_groups;
        const auto keep = [&](const Outer& outer, int64_t rows, int64_t columns, A* to) {
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t i = 0; i < rows; ++i) to[j * rows + i] = outer.sum(i, j);
        };
        if (near_columns) keep(s.near_outer, taps, near_columns, mine + part.near);
        if (b.dil) keep(s.dil_outer, taps, c, mine + part.dil);
        if (b.depthwise1) keep(s.pointwise_outer, c, c, mine + part.pointwise);
        for (size_t group = 0; group < s.def_outers.size(); ++group)
            for (int64_t j = 0; j < c; ++j)
                for (int64_t tap = 0; tap < kTaps; ++tap)
                    for (int64_t i = 0; i < real; ++i)
                        mine[part.def + j * taps + tap * c + group * real + i] =
                            s.def_outers[group].sum(tap * slice + i, j);
    }

    // Adds the units' parts up, in order.
    void finish_branches(const A* first, const Part& part) {
        const int64_t taps = kTaps * c;
        if (b.conv) finish_weight(first + part.near, part.size, units, kConv, b.conv, taps, t.grad_conv);
        if (b.dil) finish_weight(first + part.dil, part.size, units, kDil, b.dil, taps, t.grad_dil);
        if (b.depthwise1)
            finish_weight(first + part.pointwise, part.size, units, kInner, b.pointwise1, c,
                          t.grad_pointwise1);
        const auto total = [&](int64_t at) {
            double sum = 0;
            for (int64_t unit = 0; unit < units; ++unit) sum += first[unit * part.size + at];
            return sum;
        };
        if (b.def) {
            finish_weight(first + part.def, part.size, units, kDef, b.def, taps, t.grad_def);
            if (t.grad_offset_weight)
                parallel_for(g.offsets, [&](int64_t out) {
                    const A* const from = first + part.near + conv_columns * taps;
                    sum_parts(from, part.size, units, out * taps, taps,
                              [&](int64_t i, double sum) { t.grad_offset_weight[i] = A(sum); });
                });
            for (int64_t i = 0; t.grad_offset_bias && i < g.offsets; ++i)
                t.grad_offset_bias[i] = A(total(part.bias + i));
            for (int64_t i = 0; i < c; ++i) {
                if (fixed) dots.get()[kDef * c + i] += grad_sums.get()[i] * b.def_bias[i];
                if (t.grad_def_bias)
                    t.grad_def_bias[i] = fixed ? A(factor(kDef, i) * grad_sums.get()[i]) : A(0);
            }
        }
        for (int64_t i = 0; b.depthwise1 && t.grad_depthwise1 && i < c; ++i)
            for (int64_t tap = 0; tap < kTaps; ++tap) {
                double sum = 0;
                for (int64_t column = 0; column < g.columns; ++column)
                    sum += total(part.depthwise + tap * pattern + column * c + i);
                t.grad_depthwise1[i * kTaps + tap] = A(sum);
            }
    }

    // Back through the deformable branch, whose raw gradient is in s.flat: adds to the image's sums, and
    // leaves the gradients of offsets and logits in s.near.
    void deformable(const dc::Tile& tile, const std::vector<Packed>& weights, Scratch& s,
                    A* image_sums) const {
        const int64_t groups = g.p.offset_groups, pixels = tile.pixels();
        const T* const image = map.get() + tile.image * g.p.height * g.p.width * wide.channels;
        int64_t row;
        const Operand* const left = as_operand<Product>(pixels, c, s.flat, c, s.operand, row);
        for (int64_t group = 0; group < groups; ++group) {
            const Packed& weight = weights[group];
            weight.multiply(pixels, left, row, Into::assign, s.columns, weight.padded());
            dc::locate(wide, t.offset, t.offset + g.positions, group, tile, s.samples);
            dc::scatter(image, image_sums, s.samples, pixels, dc::Slice{group * slice, slice},
                        dc::Wanted{true, true, true}, s.columns, weight.padded(), s.sums);
            dc::differentiate(s.samples, pixels * kTaps, s.sums, s.derivatives, kStride);
            s.def_outers[group].add(pixels, s.columns, weight.padded(), left, row);
            for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                const A* const mask = t.offset + tile.pixel(g.deform, pixel) * g.offsets + g.positions;
                A* const to = s.near + pixel * near_columns + conv_columns;
                for (int64_t tap = 0; tap < kTaps; ++tap) {
                    const int64_t at = group * kTaps + tap;
                    const A* const from = s.derivatives + pixel * kTaps + tap;
                    to[2 * at] = from[0], to[2 * at + 1] = from[kStride];
                    to[g.positions + at] = from[2 * kStride] * mask[at] * (1 - mask[at]);
                }
            }
        }
    }

    void add_window(const dc::Tile& tile, const Window& window, const A* from, A* map) const {
        const int64_t left = std::max<int64_t>(-kRadius, -tile.column);
        const int64_t right = std::min(tile.columns + kRadius, g.p.width - tile.column);
        for (int64_t y = std::max<int64_t>(-kRadius, -tile.row);
             y < std::min(tile.rows + kRadius, g.p.height - tile.row); ++y) {
            A* const to = map + g.row(tile, y, c) + left * c;
            const A* const row = from + window.at(y, left);
            by_vectors<kWidth<A>>((right - left) * c, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store<w>(to + j, load<w>(to + j) + load<w>(row + j));
            });
        }
    }

    // grad_input (+)= the bands' sums where input > 0, + factor * grad of skip.
    void finish_input(A* sums, const A* deform_sums) const {
        const A skip = b.factors[kSkip];
        const int64_t row = g.p.width * c, size = g.pixels * c;
        const int64_t slices = g.p.width * g.p.offset_groups, real = c / g.p.offset_groups;
        parallel_for(g.p.batch * g.p.height, [&](int64_t unit) {
            for (int64_t i = 0; b.def && i < bands * slices; ++i) {
                const int64_t at = (i / slices * g.p.batch * g.p.height + unit) * slices + i % slices;
                const A* const from = deform_sums + at * slice;
                A* const to = sums + at * real;
                by_vectors<kWidth<A>>(real, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    store<w>(to + j, load<w>(to + j) + load<w>(from + j));
                });
            }
            by_vectors<kWidth<A>>(row, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                const int64_t at = unit * row + j;
                auto sum = load<w>(sums + at);
                for (int64_t band = 1; band < bands; ++band) sum += load<w>(sums + band * size + at);
                sum = load_as<A, w>(t.input + at) > 0 ? sum : Vector<A, w>{};
                if (skip != 0) sum += skip * load_as<A, w>(t.grad + at);
                if (g.p.add) sum += load_as<A, w>(t.grad_input + at);
                store_as<T, w>(t.grad_input + at, sum);
            });
        });
    }

    // Gradients of factors, scale and shift from the sums. `dots` are of grad * (raw - mean), or of grad *
    // raw with Norm::fixed.
    void finish_scalars() const {
        for (int map = 0; map < kMaps; ++map) {
            if (!has(b, map)) {
                if (map < kSkip && t.grad_factors) t.grad_factors[map] = A(0);
                for (int64_t i = 0; i < c; ++i) {
                    if (t.grad_scale) t.grad_scale[map * c + i] = A(0);
                    if (t.grad_shift) t.grad_shift[map * c + i] = A(0);
                }
                continue;
            }
            double total = 0;
            for (int64_t i = 0; i < c; ++i) {
                const A* const statistics = t.statistics + map * 2 * c;
                const double deviation = fixed ? 1 : std::sqrt(statistics[c + i] + g.p.eps);
                const double normalised = dots.get()[map * c + i] / deviation;  // grad times raw or x^
                const double scale = b.scale ? b.scale[map * c + i] : 1;
                const double shift = b.shift ? b.shift[map * c + i] : 0;
                const double sum = map == kInner ? inner_sums[i] : grad_sums.get()[i];
                total += scale * normalised + shift * sum;
                const double factor = map == kInner ? 1 : b.factors[map];
                if (t.grad_scale) t.grad_scale[map * c + i] = A(factor * normalised);
                if (t.grad_shift) t.grad_shift[map * c + i] = A(factor * sum);
            }
            if (map != kInner && t.grad_factors) t.grad_factors[map] = A(total);
        }
        if (t.grad_factors) t.grad_factors[kSkip] = A(skip_dot);
    }

    const Geometry g;
    const Backward<T>& t;
    const Branches<T>& b;
    const int64_t c;
    const bool fixed;
    const int64_t conv_columns, near_columns;  // conv's and the offsets' share one product
    const int64_t bands, units;        // bands of an image with sums of their own; units of the last pass
    const int64_t slice;               // channels of an offset group, filled up to whole vectors
    const deform_conv2d::Params wide;  // of the deformable branch on maps of such slices
    const Array<T> map;                // ReLU(input) in them
    const T* raw_inner = nullptr;
    Normalisation<T> norm;
    const int64_t across;            // columns of a window of radius 1
    const int64_t pattern;           // elements of a row of pixels of a tile
    const Array<A> slope;            // [kMaps, 3, across, C]
    const Array<double> dots;        // [kMaps, C]
    const Array<double> grad_sums;   // [C]
    std::vector<double> inner_sums;  // [C]
    double skip_dot = 0;
};

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    BackwardPass<ProductOf<T>, T>(p, t).run();
}

}  // namespace nasfast::mixed_op::NASFAST_ISA
