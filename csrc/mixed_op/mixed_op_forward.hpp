// Forward pass of the mixed operation on the CPU, for any kind of matrix product. Included by per-ISA
// sources.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mixed_op/mixed_op_tiles.hpp"

namespace nasfast::mixed_op::NASFAST_ISA {

// ReLU(input) as a map of its own, which the deformable branch samples: [N, H, W, D, slice], the channels of
// each offset group filled up with zeros to `slice`. Whole vectors may be read behind its end.
template <class T>
Array<T> rectified(const Geometry& g, const T* input, bool wanted, int64_t slice) {
    using A = Accumulate<T>;
    const int64_t groups = g.p.offset_groups, real = g.channels / groups, runs = g.p.width * groups;
    const int64_t run = slice == real ? runs * slice : slice;  // without gaps a row is one run
    Array<T> map(wanted ? g.pixels * groups * slice + kSpill : 0);
    if (!wanted) return map;
    parallel_for(g.p.batch * g.p.height, [&](int64_t unit) {
        const T* from = input + unit * runs * real;
        T* to = map.get() + unit * runs * slice;
        for (int64_t i = 0; i < runs * slice; i += run, from += slice == real ? run : real, to += run) {
            by_vectors<kWidth<A>>(slice == real ? run : real,
                                  [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                                      constexpr int w = decltype(width)::value;
                                      store_as<T, w>(to + j, relu(load_as<A, w>(from + j)));
                                  });
            std::fill(to + (slice == real ? run : real), to + run, T());
        }
    });
    return map;
}

// The convolution and that of the offsets read the same taps: one product [9C, C + 27D].
template <class T>
std::vector<T> conv_and_offset(const Geometry& g, const Branches<T>& b) {
    std::vector<T> both;
    if (b.conv) both.insert(both.end(), b.conv, b.conv + g.channels * g.channels * kTaps);
    if (b.def) both.insert(both.end(), b.offset_weight, b.offset_weight + g.offsets * g.channels * kTaps);
    return both;
}

// from [pixel, offsets] + bias to a tile of the map of offsets; logits become masks.
template <class A>
void store_offsets(const Geometry& g, const dc::Tile& tile, const A* from, int64_t from_row, const A* bias,
                   A* map) {
    for (int64_t y = 0; y < tile.rows; ++y) {
        A* to = map + g.row(tile, y, g.offsets);
        for (int64_t x = 0; x < tile.columns; ++x, to += g.offsets, from += from_row) {
            by_vectors<kWidth<A>>(g.positions, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store<w>(to + j, load<w>(from + j) + load<w>(bias + j));
            });
            by_vectors<kWidth<A>>(g.offsets - g.positions, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store<w>(to + g.positions + j,
                         sigmoid(load<w>(from + g.positions + j) + load<w>(bias + g.positions + j)));
            });
        }
    }
}

// columns [pixel, (tap, channel)] = samples of the deformable branch, rows of `row` elements.
template <class T, class A, class To>
void sample(const Geometry& g, const dc::Tile& tile, const T* rectified, const A* offset,
            const dc::Samples<A, false>& samples, To* columns, int64_t row) {
    const int64_t c = g.channels / g.p.offset_groups, pixels = tile.pixels();
    dc::locate(g.deform, offset, offset + g.positions, 0, tile, samples);
    const T* const image = rectified + tile.image * g.p.height * g.p.width * g.channels;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t tap = 0; tap < kTaps; ++tap)
            for (int64_t group = 0; group < g.p.offset_groups; ++group) {
                const auto at = samples[pixel * samples.per_pixel + group * kTaps + tap];
                To* const to = columns + pixel * row + tap * g.channels + group * c;
                if (!at.inside()) {
                    std::fill_n(to, c, To());
                    continue;
                }
                const T* const from = image + group * c;
                const T *p0 = from + at.corner(0), *p1 = from + at.corner(1);
                const T *p2 = from + at.corner(2), *p3 = from + at.corner(3);
                const A w0 = at.weight(0), w1 = at.weight(1), w2 = at.weight(2), w3 = at.weight(3);
                // what a last vector writes too much is overwritten by the next sample
                const auto mix = [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    store_as<To, w>(to + j, w0 * load_as<A, w>(p0 + j) + w1 * load_as<A, w>(p1 + j) +
                                                w2 * load_as<A, w>(p2 + j) + w3 * load_as<A, w>(p3 + j));
                };
                constexpr int full = kWidth<A>;
                int64_t j = 0;
                for (; j + full / 2 < c; j += full) mix(std::integral_constant<int, full>(), j);
                if (j < c) mix(std::integral_constant<int, full / 2>(), j);
            }
        std::fill(columns + pixel * row + kTaps * g.channels, columns + (pixel + 1) * row, To());
    }
}

// Adds a bias [C] to [pixel, C].
template <class A>
void add_bias(int64_t pixels, int64_t channels, const A* bias, A* values, int64_t row) {
    for (int64_t i = 0; i < pixels; ++i, values += row)
        by_vectors<kWidth<A>>(channels, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            store<w>(values + j, load<w>(values + j) + load<w>(bias + j));
        });
}

template <class T, class A>
void store_tile(const Geometry& g, const dc::Tile& tile, const A* from, int64_t from_row, T* map) {
    for (int64_t y = 0; y < tile.rows; ++y) {
        T* to = map + g.row(tile, y, g.channels);
        for (int64_t x = 0; x < tile.columns; ++x, to += g.channels, from += from_row)
            by_vectors<kWidth<A>>(g.channels, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                store_as<T, w>(to + j, load<w>(from + j));
            });
    }
}

template <class Product, class T>
class ForwardPass {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    using Packed = NASFAST_ISA::Packed<Product>;

public:
    ForwardPass(const Params& p, const Forward<T>& t)
        : g(p), t(t), b(t.branches), c(p.channels), conv_columns(b.conv ? c : 0), norm(p, b) {}

    void run() {
        if (!g.pixels) return;
        const Array<T> map = rectified(g, t.input, b.def, c / g.p.offset_groups);
        if (static_cast<Norm>(g.p.norm) == Norm::fixed) return merged(map.get());
        const bool given = static_cast<Norm>(g.p.norm) == Norm::given;
        Moments<A> moments(g);
        raw_maps(map.get(), given ? nullptr : &moments);
        for (int map : {kConv, kDil, kDef, kInner})
            if (has(b, map)) {
                if (!given) moments.finish(map, statistics(map));
                norm.fold(map, statistics(map), g.p.eps);
            }
        if (has(b, kSep)) {
            separable(given ? nullptr : &moments);
            if (!given) moments.finish(kSep, statistics(kSep));
            norm.fold(kSep, statistics(kSep), g.p.eps);
        }
        if (!given) combine();
    }

    // What a backward pass with Norm::fixed reads: the offsets, and the inner map to `inner`.
    void prepare(T* inner) {
        const int64_t taps = kTaps * c;
        const Packed offsets(taps, b.def ? g.offsets : 0, b.offset_weight, 1, taps);
        const Packed pointwise(c, b.depthwise1 ? c : 0, b.pointwise1, 1, c);
        const Array<A> patterns(kTaps * g.columns * c);
        if (b.depthwise1) repeat_taps(b.depthwise1, c, g.columns, patterns.get());
        const int64_t widest = std::max(offsets.padded(), pointwise.padded());
        parallel_for(
            g.tiles(), [&](Arena& arena) { return Scratch(arena, g, widest, false); },
            [&](int64_t unit, Scratch& s) {
                const dc::Tile tile = g.tiling[unit];
                const Window window(tile, kRadius, c);
                fill_relu(g, tile, window, t.input, s.window);
                if (b.def) {
                    gather(tile, window, s.window, 1, s.columns, offsets.depth);
                    offsets.multiply(tile.pixels(), s.columns, offsets.depth, Into::assign, s.sums,
                                     offsets.padded());
                    store_offsets(g, tile, s.sums, offsets.padded(), b.offset_bias, t.offset);
                }
                if (b.depthwise1) {
                    inner_tile(tile, window, s, pointwise, patterns.get());
                    store_tile(g, tile, s.sums, pointwise.padded(), inner);
                }
            });
    }

private:
    A* statistics(int map) const { return t.statistics + map * 2 * c; }
    T* raw(int map) const { return t.raw + map * g.pixels * c; }

    struct Scratch {
        dc::Samples<A, false> samples;
        A *window, *inner_window, *flat, *sums, *total;
        Operand *columns, *operand;

        Scratch(Arena& arena, const Geometry& g, int64_t sums_row, bool def)
            : samples(arena, g.deform, g.p.offset_groups, def ? kTile : 0) {
            const int64_t rows = round_up(kTile, Product::kRowMultiple);
            const int64_t border = Window::most(g, 1);
            window = arena.take<A>(Window::most(g, kRadius));
            inner_window = arena.take<A>(border);
            flat = arena.take<A>(border);
            const int64_t ring_rows = round_up(border / g.channels + 1, Product::kRowMultiple);
            sums = arena.take<A>(std::max(rows * sums_row, ring_rows * (g.channels + kSpill)));
            total = arena.take<A>(rows * (g.channels + kSpill));
            columns = arena.take<Operand>(
                rows * round_up((2 * kTaps - 1) * g.channels, Product::kDepthMultiple) + kSpill);
            operand = arena.take<Operand>(ring_rows * round_up(g.channels, Product::kDepthMultiple) + kSpill);
        }
    };

    // conv, dil, def and inner, and the offsets, in one walk over the input.
    void raw_maps(const T* rectified, Moments<A>* moments) {
        const std::vector<T> both = conv_and_offset(g, b);
        const int64_t taps = kTaps * c, offsets = b.def ? g.offsets : 0;
        const Packed near(taps, conv_columns + offsets, both.data(), 1, taps);
        const Packed dil(taps, b.dil ? c : 0, b.dil, 1, taps), def(taps, b.def ? c : 0, b.def, 1, taps);
        const Packed pointwise(c, b.depthwise1 ? c : 0, b.pointwise1, 1, c);
        const Array<A> patterns(kTaps * g.columns * c);
        if (b.depthwise1) repeat_taps(b.depthwise1, c, g.columns, patterns.get());
        const int64_t widest = std::max({near.padded(), dil.padded(), def.padded(), pointwise.padded()});
        parallel_for(
            g.tiles(), [&](Arena& arena) { return Scratch(arena, g, widest, b.def); },
            [&](int64_t unit, Scratch& s) {
                const dc::Tile tile = g.tiling[unit];
                const int64_t pixels = tile.pixels();
                const Window window(tile, kRadius, c);
                const auto finish = [&](int map, const Packed& by) {
                    store_tile(g, tile, s.sums, by.padded(), raw(map));
                    if (moments) moments->add(unit, map, pixels, s.sums, by.padded());
                };
                const auto multiply = [&](const Packed& by) {
                    by.multiply(pixels, s.columns, by.depth, Into::assign, s.sums, by.padded());
                };
                fill_relu(g, tile, window, t.input, s.window);
                if (b.conv || b.def) {
                    gather(tile, window, s.window, 1, s.columns, near.depth);
                    multiply(near);
                    if (b.def)
                        store_offsets(g, tile, s.sums + conv_columns, near.padded(), b.offset_bias, t.offset);
                    if (b.conv) finish(kConv, near);
                }
                if (b.def) {
                    sample(g, tile, rectified, t.offset, s.samples, s.columns, def.depth);
                    multiply(def);
                    add_bias(pixels, c, b.def_bias, s.sums, def.padded());
                    finish(kDef, def);
                }
                if (b.dil) {
                    gather(tile, window, s.window, 2, s.columns, dil.depth);
                    multiply(dil);
                    finish(kDil, dil);
                }
                if (b.depthwise1) {
                    inner_tile(tile, window, s, pointwise, patterns.get());
                    finish(kInner, pointwise);
                }
            });
    }

    // s.sums = one half of the separable branch, of the window.
    void inner_tile(const dc::Tile& tile, const Window& window, Scratch& s, const Packed& pointwise,
                    const A* patterns) const {
        depthwise(tile, window, s.window, patterns, g.columns * c, s.flat);
        int64_t row;
        const Operand* const left = as_operand<Product>(tile.pixels(), c, s.flat, c, s.operand, row);
        pointwise.multiply(tile.pixels(), left, row, Into::assign, s.sums, pointwise.padded());
    }

    // The second half of the separable branch.
    void separable(Moments<A>* moments) {
        const Packed pointwise(c, c, b.pointwise2, 1, c);
        const Array<A> patterns(kTaps * g.columns * c);
        repeat_taps(b.depthwise2, c, g.columns, patterns.get());
        const int64_t across = (g.columns + 2) * c;
        const Array<A> scale(across), shift(across);
        inner_patterns(scale.get(), shift.get());
        parallel_for(
            g.tiles(), [&](Arena& arena) { return Scratch(arena, g, pointwise.padded(), false); },
            [&](int64_t unit, Scratch& s) {
                const dc::Tile tile = g.tiling[unit];
                const Window window(tile, 1, c);
                fill_normalised(g, tile, window, raw(kInner), scale.get(), shift.get(), s.window);
                inner_tile(tile, window, s, pointwise, patterns.get());
                store_tile(g, tile, s.sums, pointwise.padded(), raw(kSep));
                if (moments) moments->add(unit, kSep, tile.pixels(), s.sums, pointwise.padded());
            });
    }

    void inner_patterns(A* scale, A* shift) const {
        repeat(norm.scale.get() + kInner * c, c, g.columns + 2, scale);
        repeat(norm.shift.get() + kInner * c, c, g.columns + 2, shift);
    }

    // output (+)= sum of factor * norm(raw) + factor * input, `kGroup` pixels in a pattern.
    void combine() {
        constexpr int64_t kGroup = 16;
        const int64_t flat = kGroup * c, size = g.pixels * c;
        const Array<A> patterns(kFactors * flat), constants(flat);
        std::vector<const T*> maps;
        std::vector<double> constant(c, 0.0);
        for (int map : {kConv, kSep, kDil, kDef})
            if (has(b, map)) {
                std::vector<A> scale(c);
                for (int64_t i = 0; i < c; ++i) {
                    scale[i] = A(b.factors[map] * norm.scale.get()[map * c + i]);
                    constant[i] += b.factors[map] * norm.shift.get()[map * c + i];
                }
                repeat(scale.data(), c, kGroup, patterns.get() + maps.size() * flat);
                maps.push_back(raw(map));
            }
        if (b.factors[kSkip] != 0) {
            std::fill_n(patterns.get() + maps.size() * flat, flat, b.factors[kSkip]);
            maps.push_back(t.input);
        }
        for (int64_t i = 0; i < flat; ++i) constants.get()[i] = A(constant[i % c]);
        parallel_for(ceil_div(g.pixels, kGroup), [&](int64_t unit) {
            const int64_t begin = unit * flat;
            by_vectors<kWidth<A>>(
                std::min(flat, size - begin), [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    auto sum = load<w>(constants.get() + j);
                    for (size_t i = 0; i < maps.size(); ++i)
                        sum += load<w>(patterns.get() + i * flat + j) * load_as<A, w>(maps[i] + begin + j);
                    if (g.p.add) sum += load_as<A, w>(t.output + begin + j);
                    store_as<T, w>(t.output + begin + j, sum);
                });
        });
    }

    // Without statistics the branches are one sum of products of the 9 taps of conv and 8 of dil (the middle
    // one is shared), the 9 samples of def and the last depthwise map.
    void merged(const T* rectified) {
        const int64_t taps = kTaps * c, far = 2 * kTaps - 1;
        const auto weight = [&](int map, int64_t out) {
            return b.factors[map] * norm.scale.get()[map * c + out];
        };
        std::vector<A> linear(far * c * c, A(0)), last(c * c), deformable(b.def ? taps * c : 0);
        std::vector<A> constant(c, A(0));  // matrices are [out, tap, channel]
        for (int64_t out = 0; out < c; ++out) {
            for (int map : {kConv, kSep, kDil, kDef})
                if (has(b, map)) constant[out] += A(b.factors[map] * norm.shift.get()[map * c + out]);
            for (int64_t tap = 0; tap < kTaps; ++tap)
                for (int64_t in = 0; in < c; ++in) {
                    const int64_t from = (out * kTaps + tap) * c + in;
                    A* const row = linear.data() + out * far * c + in;
                    const int64_t other = tap == 4 ? 4 : kTaps + tap - (tap > 4);
                    if (b.conv) row[tap * c] += A(weight(kConv, out) * widen(b.conv[from]));
                    if (b.dil) row[other * c] += A(weight(kDil, out) * widen(b.dil[from]));
                    if (b.def) deformable[from] = A(weight(kDef, out) * widen(b.def[from]));
                }
            if (b.def) constant[out] += A(weight(kDef, out) * b.def_bias[out]);
            if (b.depthwise1)
                for (int64_t in = 0; in < c; ++in)
                    last[out * c + in] = A(weight(kSep, out) * widen(b.pointwise2[out * c + in]));
        }
        const auto as = [](const std::vector<A>& values) {  // in the type of the operands
            std::vector<T> result(values.size() + kSpill);
            std::vector<A> padded(values);
            padded.resize(values.size() + kSpill);
            copy_run(padded.data(), static_cast<int64_t>(values.size()), result.data());
            return result;
        };
        const std::vector<T> linear_t = as(linear), last_t = as(last), deformable_t = as(deformable);
        const bool convolves = b.conv || b.dil;
        const Packed all(far * c, convolves ? c : 0, linear_t.data(), 1, far * c);
        const Packed offsets(taps, b.def ? g.offsets : 0, b.offset_weight, 1, taps);
        const Packed def(taps, b.def ? c : 0, deformable_t.data(), 1, taps);
        const Packed first(c, b.depthwise1 ? c : 0, b.pointwise1, 1, c);
        const Packed second(c, b.depthwise1 ? c : 0, last_t.data(), 1, c);
        const int64_t across = (g.columns + 2) * c;
        const Array<A> patterns1(kTaps * across), patterns2(kTaps * g.columns * c);
        const Array<A> scale(across), shift(across);
        if (b.depthwise1) {
            repeat_taps(b.depthwise1, c, g.columns + 2, patterns1.get());
            repeat_taps(b.depthwise2, c, g.columns, patterns2.get());
            inner_patterns(scale.get(), shift.get());
        }
        const int64_t widest = std::max({all.padded(), offsets.padded(), def.padded(), c + kSpill});
        const int64_t total_row = Packed(c, c, static_cast<const T*>(nullptr), 1, 1).padded();
        parallel_for(
            g.tiles(), [&](Arena& arena) { return Scratch(arena, g, widest, b.def); },
            [&](int64_t unit, Scratch& s) {
                const dc::Tile tile = g.tiling[unit];
                const int64_t pixels = tile.pixels();
                const Window window(tile, kRadius, c);
                fill_relu(g, tile, window, t.input, s.window);
                for (int64_t i = 0; i < pixels; ++i) std::copy_n(constant.data(), c, s.total + i * total_row);
                if (b.def) {
                    gather(tile, window, s.window, 1, s.columns, offsets.depth);
                    offsets.multiply(pixels, s.columns, offsets.depth, Into::assign, s.sums,
                                     offsets.padded());
                    store_offsets(g, tile, s.sums, offsets.padded(), b.offset_bias, t.offset);
                    sample(g, tile, rectified, t.offset, s.samples, s.columns, def.depth);
                    def.multiply(pixels, s.columns, def.depth, Into::add, s.total, total_row);
                }
                if (convolves) {
                    gather_all(tile, window, s.window, s.columns, all.depth);
                    all.multiply(pixels, s.columns, all.depth, Into::add, s.total, total_row);
                }
                if (b.depthwise1)
                    separable_tile(tile, s, first, second, patterns1.get(), across, patterns2.get(),
                                   scale.get(), shift.get(), total_row);
                finish_merged(tile, s.total, total_row);
            });
    }

    // columns [pixel, 17C]: the taps of conv, then those of dil without the middle one.
    void gather_all(const dc::Tile& tile, const Window& window, const A* from, Operand* columns,
                    int64_t row) const {
        for (int64_t y = 0; y < tile.rows; ++y)
            for (int64_t x = 0; x < tile.columns; ++x, columns += row) {
                Operand* to = columns;
                for (int64_t ky = -1; ky <= 1; ++ky, to += 3 * c)
                    copy_run(from + window.at(y + ky, x - 1), 3 * c, to);
                for (int64_t tap = 0; tap < kTaps; ++tap) {
                    if (tap == 4) continue;
                    copy_run(from + window.at(y + (tap / 3 - 1) * 2, x + (tap % 3 - 1) * 2), c, to);
                    to += c;
                }
                std::fill(to, columns + row, Operand());
            }
    }

    // Both halves of the separable branch, the first on the tile and its border.
    void separable_tile(const dc::Tile& tile, Scratch& s, const Packed& first, const Packed& second,
                        const A* patterns1, int64_t across, const A* patterns2, const A* scale,
                        const A* shift, int64_t total_row) const {
        dc::Tile ring = tile;
        ring.row -= 1, ring.column -= 1, ring.rows += 2, ring.columns += 2;
        const Window ring_window(ring, 1, c), inner(tile, 1, c);
        depthwise(ring, ring_window, s.window, patterns1, across, s.flat);
        int64_t row;
        const Operand* left = as_operand<Product>(ring.pixels(), c, s.flat, c, s.operand, row);
        first.multiply(ring.pixels(), left, row, Into::assign, s.sums, first.padded());
        for (int64_t y = 0; y < ring.rows; ++y)
            for (int64_t x = 0; x < ring.columns; ++x) {
                const A* const from = s.sums + (y * ring.columns + x) * first.padded();
                A* const to = s.inner_window + (y * ring.columns + x) * c;
                const bool inside = ring.row + y >= 0 && ring.row + y < g.p.height && ring.column + x >= 0 &&
                                    ring.column + x < g.p.width;
                if (!inside) {
                    std::fill_n(to, c, A(0));
                    continue;
                }
                by_vectors<kWidth<A>>(c, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    store<w>(to + j, relu(load<w>(from + j) * load<w>(scale + j) + load<w>(shift + j)));
                });
            }
        depthwise(tile, inner, s.inner_window, patterns2, g.columns * c, s.flat);
        left = as_operand<Product>(tile.pixels(), c, s.flat, c, s.operand, row);
        second.multiply(tile.pixels(), left, row, Into::add, s.total, total_row);
    }

    void finish_merged(const dc::Tile& tile, const A* from, int64_t from_row) const {
        const A skip = b.factors[kSkip];
        for (int64_t y = 0; y < tile.rows; ++y) {
            const int64_t first = g.row(tile, y, c);
            for (int64_t x = 0; x < tile.columns; ++x, from += from_row)
                by_vectors<kWidth<A>>(c, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
                    constexpr int w = decltype(width)::value;
                    const int64_t at = first + x * c + j;
                    auto sum = load<w>(from + j);
                    if (skip != 0) sum += skip * load_as<A, w>(t.input + at);
                    if (g.p.add) sum += load_as<A, w>(t.output + at);
                    store_as<T, w>(t.output + at, sum);
                });
        }
    }

    const Geometry g;
    const Forward<T>& t;
    const Branches<T>& b;
    const int64_t c, conv_columns;
    Normalisation<T> norm;
};

template <class T>
void forward_impl(const Params& p, const Forward<T>& t) {
    ForwardPass<ProductOf<T>, T>(p, t).run();
}

}  // namespace nasfast::mixed_op::NASFAST_ISA
