// Backward pass of deform_conv2d on the CPU, for any kind of matrix product. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "deform_conv2d/deform_conv2d_forward.hpp"
#include "deform_conv2d/deform_conv2d_sample.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {

constexpr int64_t kBackwardTile = 96;  // output pixels of a tile

// Runs of input channels that lie in one group and one offset group. A unit of the backward pass owns such a
// slice of grad_input, so that no two units add to the same place.
struct Slice {
    int64_t begin, count;
};

inline std::vector<Slice> slices(const Params& p, int64_t most) {
    const int64_t per_group = p.channels / p.groups, per_offset_group = p.channels / p.offset_groups;
    std::vector<Slice> result;
    for (int64_t begin = 0; begin < p.channels;) {
        const int64_t end = std::min(begin - begin % per_group + per_group,
                                     begin - begin % per_offset_group + per_offset_group);
        const int64_t parts = ceil_div(end - begin, most);
        const int64_t size = round_up(ceil_div(end - begin, parts), 16);
        for (; begin < end; begin += result.back().count)
            result.push_back({begin, std::min(size, end - begin)});
    }
    return result;
}

// How the backward pass is divided. A unit is a slice of channels of every `streams`-th image; a round is
// some tiles of some images, after which the slices' parts of grad_offset and grad_mask are summed. Where
// each slice is alone in its offset group, there is nothing to sum, and one round. Streams sum grad_weight
// each for itself; a single one adds every round's to what is there. The sizes alone decide it, so that every
// sum has one order.
struct Plan {
    static constexpr int64_t kWeightBytes = 1 << 20;   // of all streams' sums beyond the first's
    static constexpr int64_t kPartialBytes = 2 << 20;  // of a round's parts, unless one tile needs more
    static constexpr int64_t kUnits = 8;

    Tiling tiling;
    int64_t pixels;  // of a tile, at most
    std::vector<Slice> parts;
    int64_t streams, stream_size;  // sums of a stream for grad_weight
    bool alone;
    int64_t images, tiles;  // of a round

    // size(slice): the sums of a slice for grad_weight, of so many bytes each.
    template <class Size>
    Plan(const Params& p, int64_t element, const Size& size)
        : tiling(p, kBackwardTile), pixels(std::min(kBackwardTile, p.out_height * p.out_width)) {
        const int64_t taps = p.kernel_h * p.kernel_w;
        const auto divide = [&](int64_t most) {
            parts = slices(p, most), stream_size = 0;
            for (const Slice& slice : parts) stream_size += size(slice);
            streams = std::clamp<int64_t>(1 + kWeightBytes / (stream_size * element), 1,
                                          std::max<int64_t>(p.batch, 1));
        };
        divide(64);
        if (streams * count() < kUnits) divide(32);
        alone = count() == p.offset_groups;
        images = p.batch, tiles = tiling.per_image();
        if (alone) return;
        const int64_t most = std::max<int64_t>(1, kPartialBytes / (count() * pixels * taps * 3 * element));
        streams = std::min(streams, most);
        images = std::min(most / streams * streams, round_up(std::max<int64_t>(p.batch, 1), streams));
        tiles = std::clamp<int64_t>(most / images, 1, tiling.per_image());
    }
    int64_t count() const { return static_cast<int64_t>(parts.size()); }
};

// The sums over channels that the derivatives by the position are made of: of the gradient of the columns
// times each of the four corners.
template <class V>
NASFAST_INLINE void store_sums(const V (&products)[4], std::remove_reference_t<decltype(V{}[0])>* to) {
    using T = std::remove_reference_t<decltype(V{}[0])>;
    constexpr int w = sizeof(V) / sizeof(T);
    if constexpr (w >= 4) {
        const auto halves = [](V a, V b) NASFAST_INLINE_LAMBDA {  // half of the lanes for each
            return low_halves(a, b, std::make_index_sequence<w>()) +
                   high_halves(a, b, std::make_index_sequence<w>());
        };
        const V ab = halves(products[0], products[1]), cd = halves(products[2], products[3]);
        V sum = even_quarters(ab, cd, std::make_index_sequence<w>()) +
                odd_quarters(ab, cd, std::make_index_sequence<w>());
        if constexpr (w >= 16) sum += rotated<w / 8>(sum, std::make_index_sequence<w>());
        if constexpr (w >= 8) sum += rotated<1>(sum, std::make_index_sequence<w>());
        for (int i = 0; i < 4; ++i) to[i] = sum[i * w / 4];
    } else {
        for (int i = 0; i < 4; ++i) {
            to[i] = products[i][0];
            for (int j = 1; j < w; ++j) to[i] += products[i][j];
        }
    }
}

// Which gradients a unit computes.
struct Wanted {
    bool input, position, weight;
};

// Takes the gradient of the columns of a tile, [pixel, tap, channel of the slice], apart: adds it to
// grad_image at the corners, sums its products with the corners to sums[pixel, tap, 4], and puts the columns
// in its place. Vectors: the slice is that many vectors of Width, and everything is wanted; 0 for any slice
// and any wish.
template <int Width, int Vectors, class T, class A>
void scatter_tile(const T* image, A* grad_image, const Samples<A, true>& samples, int64_t pixels,
                  const Slice& slice, Wanted wanted, A* columns, int64_t row, A* sums) {
    constexpr int full = Width;
    const int64_t channels = Vectors > 0 ? Vectors * full : slice.count;
    if constexpr (Vectors > 0) wanted = {true, true, true};
    const auto one = [&](const auto& sample, A* column, A* sum) NASFAST_INLINE_LAMBDA {
        if (!sample.inside()) {
            std::fill_n(column, channels, A(0));
            std::fill_n(sum, 4, A(0));
            return;
        }
        int64_t corner[4];
        A weight[4];
        for (int i = 0; i < 4; ++i) corner[i] = sample.corner(i) + slice.begin, weight[i] = sample.weight(i);
        Vector<A, full> products[4] = {};
        by_vectors<full>(channels, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            const auto grad = load<w>(column + j);  // left over where neither input nor position is wanted
            Vector<A, w> mixed = {};
            for (int i = 0; i < 4; ++i) {
                const auto value = load_as<A, w>(image + corner[i] + j);
                if (wanted.position) {
                    if constexpr (w == full)
                        products[i] += grad * value;
                    else
                        for (int k = 0; k < w; ++k) products[i][k] += grad[k] * value[k];
                }
                mixed += weight[i] * value;
            }
            if (wanted.input)
                for (int i = 0; i < 4; ++i) {
                    A* const to = grad_image + corner[i] + j;  // corners may coincide
                    store<w>(to, load<w>(to) + weight[i] * grad);
                }
            if (wanted.weight) store<w>(column + j, mixed);
        });
        if (wanted.position) store_sums(products, sum);
    };
    for (int64_t i = 0; i < pixels; ++i)
        for (int64_t tap = 0; tap < samples.per_pixel; ++tap, sums += 4)
            one(samples[i * samples.per_pixel + tap], columns + i * row + tap * channels, sums);
}

template <class T, class A>
void scatter(const T* image, A* grad_image, const Samples<A, true>& samples, int64_t pixels,
             const Slice& slice, Wanted wanted, A* columns, int64_t row, A* sums) {
    constexpr int full = kWidth<A>, half = std::max(1, full / 2);
    const auto run = [&](auto width, auto vectors) {
        scatter_tile<decltype(width)::value, decltype(vectors)::value>(image, grad_image, samples, pixels,
                                                                       slice, wanted, columns, row, sums);
    };
    const bool all = wanted.input && wanted.position && wanted.weight;
    constexpr std::integral_constant<int, full> whole = {};
    constexpr std::integral_constant<int, half> part = {};
    if (all && slice.count == half) return run(part, std::integral_constant<int, 1>());
    if (all && slice.count == full) return run(whole, std::integral_constant<int, 1>());
    if (all && slice.count == 3 * half) return run(part, std::integral_constant<int, 3>());
    with_vectors<A>(all ? slice.count : 0, [&](auto vectors) { run(whole, vectors); });
}

// derivatives[0, 1, 2] = gradients by y, x and mask of the samples of a tile, from the sums of scatter.
template <class T>
void differentiate(const Samples<T, true>& samples, int64_t count, const T* sums, T* derivatives,
                   int64_t stride) {
    constexpr int w = kWidth<T>;
    using V = Vector<T, w>;
    const auto lanes = std::make_index_sequence<w>();
    for (int64_t s = 0; s < count; s += w, sums += 4 * w) {
        const auto& block = samples.blocks[s / w];
        const V a = load<w>(sums), b = load<w>(sums + w), c = load<w>(sums + 2 * w),
                d = load<w>(sums + 3 * w);
        const V even[2] = {every_second<0>(a, b, lanes), every_second<0>(c, d, lanes)};
        const V odd[2] = {every_second<1>(a, b, lanes), every_second<1>(c, d, lanes)};
        const V corner[4] = {every_second<0>(even[0], even[1], lanes), every_second<0>(odd[0], odd[1], lanes),
                             every_second<1>(even[0], even[1], lanes),
                             every_second<1>(odd[0], odd[1], lanes)};
        const auto get = [](const T* from) { return load<w>(from); };
        const V row[2] = {get(block.row[0]), get(block.row[1])};
        const V column[2] = {get(block.column[0]), get(block.column[1])};
        const V upper = column[0] * corner[0] + column[1] * corner[1];
        const V lower = column[0] * corner[2] + column[1] * corner[3];
        const V left = row[0] * corner[0] + row[1] * corner[2],
                right = row[0] * corner[1] + row[1] * corner[3];
        const V mask = get(block.mask);
        store<w>(derivatives + s, mask * (get(block.row_slope[0]) * upper + get(block.row_slope[1]) * lower));
        store<w>(derivatives + stride + s,
                 mask * (get(block.column_slope[0]) * left + get(block.column_slope[1]) * right));
        store<w>(derivatives + 2 * stride + s, row[0] * upper + row[1] * lower);
    }
}

// Gradients of input, offset, mask and weight, in one pass over the samples.
template <class Product, class T>
class BackwardPass {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    using Outer = typename Product::Outer;

public:
    BackwardPass(const Params& p, const Backward<T>& t)
        : p(p),
          t(t),
          taps(p.kernel_h * p.kernel_w),
          in(p.channels / p.groups),
          out(p.out_channels / p.groups),
          weight_size(p.out_channels * in * taps),
          wanted{t.grad_input != nullptr, t.grad_offset || t.grad_mask, t.grad_weight != nullptr},
          plan(p, sizeof(A), [this](const Slice& slice) { return size_of(slice); }),
          steps(p),
          stride(round_up(plan.pixels * taps, kWidth<A>)),
          apart(wanted.weight && plan.streams > 1),
          streams(apart ? plan.streams * plan.stream_size : 0),
          derivatives(wanted.position && !plan.alone ? plan.images * plan.tiles * plan.count() * 3 * stride
                                                     : 0),
          widened(wanted.input && !std::is_same_v<T, A> ? input_size() : 0) {}

    void run() {
        if (wanted.weight && !apart) std::fill_n(t.grad_weight, weight_size, A(0));
        const int64_t tiles = plan.tiling.per_image();
        for (int64_t image = 0; image < p.batch; image += plan.images)
            for (int64_t tile = 0; tile < tiles; tile += plan.tiles) {
                const Round round{image, std::min(plan.images, p.batch - image), tile,
                                  std::min(plan.tiles, tiles - tile)};
                parallel_for(
                    std::min(plan.streams, round.images) * plan.count(),
                    [&](Arena& arena) { return Scratch(arena, *this); },
                    [&](int64_t unit, Scratch& s) { slice_of_stream(round, unit, s); });
                if (wanted.position && !plan.alone)
                    parallel_for(round.images * round.tiles,
                                 [&](int64_t unit) { sum_positions(round, unit); });
            }
        if (apart) {
            const int64_t blocks = ceil_div(out, kOutputs);
            parallel_for(plan.count() * blocks,
                         [&](int64_t unit) { sum_streams(unit / blocks, unit % blocks * kOutputs); });
        }
        if constexpr (!std::is_same_v<T, A>)
            if (wanted.input)
                by_pieces(input_size(), [&](int64_t begin, int64_t count) {
                    convert(widened.get() + begin, count, t.grad_input + begin);
                });
    }

private:
    struct Round {
        int64_t image, images, tile, tiles;
    };

    struct Scratch {
        Samples<A, true> samples;
        A *sums, *derivatives, *columns;
        Operand *grad, *weight;
        T* row;
        Outer outer;

        Scratch(Arena& arena, const BackwardPass& pass) : samples(arena, pass.p, 1, pass.plan.pixels) {
            int64_t widest = 0;
            for (const Slice& slice : pass.plan.parts) widest = std::max(widest, slice.count);
            const typename Product::Panels panels(pass.taps * widest);
            const int64_t rows = round_up(pass.plan.pixels, Product::kRowMultiple);
            const int64_t depth = round_up(pass.out, Product::kDepthMultiple);
            sums = arena.take<A>(4 * pass.stride), derivatives = arena.take<A>(3 * pass.stride);
            columns = arena.take<A>(rows * panels.padded());
            grad = arena.take<Operand>(rows * depth), weight = arena.take<Operand>(depth * panels.padded());
            row = arena.take<T>(pass.taps * widest);
            if (pass.wanted.weight) outer = Outer(arena, pass.taps * widest, pass.out, pass.plan.pixels);
        }
    };

    int64_t input_size() const { return p.batch * p.height * p.width * p.channels; }
    A* input_sums() const {
        if constexpr (std::is_same_v<T, A>)
            return t.grad_input;
        else
            return wanted.input ? widened.get() : nullptr;
    }
    int64_t offset_group_of(const Slice& slice) const { return slice.begin / (p.channels / p.offset_groups); }
    Tile tile_of(const Round& round, int64_t image, int64_t tile) const {
        return plan.tiling[(round.image + image) * plan.tiling.per_image() + round.tile + tile];
    }
    // Gradients of a tile and a slice of a round by y, x and mask: [3, stride].
    A* part_of(const Round& round, int64_t image, int64_t tile, int64_t part) const {
        return derivatives.get() + ((image * round.tiles + tile) * plan.count() + part) * 3 * stride;
    }

    int64_t size_of(const Slice& slice) const { return Outer::size(taps * slice.count, out); }
    // Sums of a stream and a slice for grad_weight.
    A* sums_of(int64_t stream, int64_t part) const {
        int64_t before = 0;
        for (int64_t i = 0; i < part; ++i) before += size_of(plan.parts[i]);
        return streams.get() + stream * plan.stream_size + before;
    }

    template <class Body>
    static void by_pieces(int64_t count, const Body& body) {
        constexpr int64_t piece = 1 << 14;
        parallel_for(ceil_div(count, piece),
                     [&](int64_t unit) { body(unit * piece, std::min(piece, count - unit * piece)); });
    }
    // The slice of grad_input of an image, by the thread that adds to it next and then has it in its cache.
    void clear(A* image, const Slice& slice) {
        const int64_t pixels = p.height * p.width;
        if (slice.count == p.channels)
            std::fill_n(image, pixels * p.channels, A(0));
        else
            for (int64_t i = 0; i < pixels; ++i)
                std::fill_n(image + i * p.channels + slice.begin, slice.count, A(0));
    }
    // Asks for what a slice of the tile `next` reads, and its part of grad_input.
    NASFAST_INLINE void prefetch_tile(const Slice& slice, const Tile& tile, const Tile& next) const {
        by_new_pixels(p, tile, next, [&](int64_t pixel, int64_t run) NASFAST_INLINE_LAMBDA {
            for (int64_t i = pixel; i < pixel + run; ++i) {
                prefetch(t.input + i * p.channels + slice.begin, slice.count);
                if (wanted.input) prefetch(input_sums() + i * p.channels + slice.begin, slice.count);
            }
        });
        const int64_t skip = offset_group_of(slice) * taps;
        prefetch_pixels(p, next, t.offset + 2 * skip, p.offset_step, 2 * taps);
        if (t.mask) prefetch_pixels(p, next, t.mask + skip, p.mask_step, taps);
        prefetch_pixels(p, next, t.grad + slice.begin / in * out, p.out_channels, out);
    }

    void slice_of_stream(const Round& round, int64_t unit, Scratch& s) {
        const int64_t part = unit % plan.count(), stream = unit / plan.count();
        const Slice slice = plan.parts[part];
        const int64_t group = slice.begin / in;
        const int64_t width = taps * slice.count, depth = round_up(out, Product::kDepthMultiple);
        const int64_t corner = group * out * steps.out + slice.begin % in * steps.channel;
        const typename Product::Panels panels(width);
        for (int64_t k = 0; k < out; ++k) {  // the weight of the slice, [Co/G, (tap, channel)]
            const T* const from = t.weight + corner + k * steps.out;
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t c = 0; c < slice.count; ++c)
                    s.row[tap * slice.count + c] = from[tap * steps.tap + c * steps.channel];
            Product::pack(panels, depth, k, 1, s.row, 0, 1, s.weight);
        }
        Product::clear(panels, depth, out, depth, s.weight);
        if (apart) {
            A* const sums = sums_of(stream, part);
            s.outer.resume(width, out, sums);
            if (!round.image && !round.tile) std::fill_n(sums, size_of(slice), A(0));
        } else if (wanted.weight) {
            s.outer.start(width, out);
        }
        for (int64_t n = stream; n < round.images; n += plan.streams) {
            const int64_t image = (round.image + n) * p.height * p.width * p.channels;
            A* const grad_image = wanted.input ? input_sums() + image : nullptr;
            if (wanted.input && !round.tile) clear(grad_image, slice);
            for (int64_t i = 0; i < round.tiles; ++i) {
                const Tile tile = tile_of(round, n, i);
                const int64_t pixels = tile.pixels();
                locate(p, t.offset, t.mask, offset_group_of(slice), tile, s.samples);
                for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                    Operand* const row = s.grad + pixel * depth;
                    convert(t.grad + tile.pixel(p, pixel) * p.out_channels + group * out, out, row);
                    std::fill(row + out, row + depth, Operand());
                }
                if (i + 1 < round.tiles) prefetch_tile(slice, tile, tile_of(round, n, i + 1));
                // where only the weight's gradient is wanted, the columns have none
                for (int64_t k = 0; k < (wanted.input || wanted.position ? depth : 0); k += Product::kDepth)
                    Product::multiply(pixels, std::min(Product::kDepth, depth - k), s.grad + k, depth, panels,
                                      s.weight, depth, k, k ? Into::add : Into::assign, s.columns,
                                      panels.padded());
                scatter(t.input + image, grad_image, s.samples, pixels, slice, wanted, s.columns,
                        panels.padded(), s.sums);
                if (wanted.position) {
                    A* const to = plan.alone ? s.derivatives : part_of(round, n, i, part);
                    differentiate(s.samples, pixels * taps, s.sums, to, stride);
                    if (plan.alone) store_positions(tile, part, to);
                }
                if (wanted.weight) s.outer.add(pixels, s.columns, panels.padded(), s.grad, depth);
            }
        }
        if (!wanted.weight || apart) return;
        for (int64_t k = 0; k < out; k += kOutputs)
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t c = 0; c < slice.count; ++c)
                    for (int64_t j = k; j < std::min(k + kOutputs, out); ++j)
                        t.grad_weight[corner + j * steps.out + tap * steps.tap + c * steps.channel] +=
                            s.outer.sum(tap * slice.count + c, j);
    }

    // grad_weight of a slice, of the outputs of its group from k on: sums over the streams, in order.
    void sum_streams(int64_t part, int64_t k) {
        const Slice slice = plan.parts[part];
        const int64_t count = std::min(kOutputs, out - k), width = taps * slice.count;
        A* const to =
            t.grad_weight + (slice.begin / in * out + k) * steps.out + slice.begin % in * steps.channel;
        A* const first = sums_of(0, part);
        Outer outer;
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t c = 0; c < slice.count; ++c) {
                A sums[kOutputs] = {};
                for (int64_t stream = 0; stream < plan.streams; ++stream) {
                    outer.resume(width, out, first + stream * plan.stream_size);
                    for (int64_t j = 0; j < count; ++j) sums[j] += outer.sum(tap * slice.count + c, k + j);
                }
                for (int64_t j = 0; j < count; ++j)
                    to[j * steps.out + tap * steps.tap + c * steps.channel] = sums[j];
            }
    }

    // Sums the parts of the slices, in order.
    void sum_positions(const Round& round, int64_t unit) {
        const int64_t n = unit / round.tiles, i = unit % round.tiles;
        const Tile tile = tile_of(round, n, i);
        for (int64_t part = 0; part < plan.count();) {
            A* const sum = part_of(round, n, i, part);
            const int64_t group = offset_group_of(plan.parts[part]);
            for (++part; part < plan.count() && offset_group_of(plan.parts[part]) == group; ++part) {
                const A* const other = part_of(round, n, i, part);
                for (int64_t j = 0; j < 3 * stride; ++j) sum[j] += other[j];
            }
            store_positions(tile, group, sum);
        }
    }

    // grad_offset and grad_mask of a tile and an offset group, from [3, stride] gradients.
    void store_positions(const Tile& tile, int64_t group, const A* gradients) {
        for (int64_t pixel = 0; pixel < tile.pixels(); ++pixel) {
            const int64_t at = (tile.pixel(p, pixel) * p.offset_groups + group) * taps;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const A* const from = gradients + pixel * taps + tap;
                if (t.grad_offset) {
                    t.grad_offset[2 * (at + tap)] = from[0];
                    t.grad_offset[2 * (at + tap) + 1] = from[stride];
                }
                if (t.grad_mask) t.grad_mask[at + tap] = from[2 * stride];
            }
        }
    }

    static constexpr int64_t kOutputs = 16;  // output channels of grad_weight at a time, for the caches

    const Params& p;
    const Backward<T>& t;
    const int64_t taps, in, out, weight_size;
    const Wanted wanted;
    const Plan plan;
    const WeightSteps steps;
    const int64_t stride;  // of the derivatives of a tile
    const bool apart;      // whether each stream has sums of its own
    const Array<A> streams;
    const Array<A> derivatives;
    const Array<A> widened;  // grad_input, where its own type cannot hold sums
};

// Bias gradient: sums over pieces of the pixels, then over the pieces, in double.
template <class T>
void backward_bias(const Params& p, const Backward<T>& t) {
    using A = Accumulate<T>;
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    const int64_t pieces = std::clamp<int64_t>(pixels / 256, 1, 64);
    const Array<double> partial(pieces * p.out_channels);
    parallel_for(pieces, [&](int64_t unit) {
        double* const sums = partial.get() + unit * p.out_channels;
        std::fill_n(sums, p.out_channels, 0.0);
        for (int64_t pixel = unit * pixels / pieces; pixel < (unit + 1) * pixels / pieces; ++pixel)
            for (int64_t c = 0; c < p.out_channels; ++c) sums[c] += widen(t.grad[pixel * p.out_channels + c]);
    });
    for (int64_t c = 0; c < p.out_channels; ++c) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += partial.get()[piece * p.out_channels + c];
        t.grad_bias[c] = A(sum);
    }
}

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    if (t.grad_input || t.grad_offset || t.grad_mask || t.grad_weight)
        BackwardPass<ProductOf<T>, T>(p, t).run();
    if (t.grad_bias) backward_bias(p, t);
}

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
