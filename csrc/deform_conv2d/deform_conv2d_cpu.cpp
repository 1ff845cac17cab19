// CPU kernels of deform_conv2d, compiled once per instruction set. Samples go straight into the operand of a
// matrix product, a cache-resident tile at a time. Results are identical for any number of threads: the order
// of every sum is fixed by the sizes.
#include <algorithm>
#include <utility>
#include <vector>

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "deform_conv2d/deform_conv2d_forward.hpp"
#include "deform_conv2d/deform_conv2d_sample.hpp"

namespace nasfast::deform_conv2d::NASFAST_ISA {
namespace {

constexpr int64_t kBackwardTile = 96;

// Runs of input channels that lie in one group and one offset group. A unit of the backward pass owns such a
// slice of grad_input, so that no two units add to the same place.
struct Slice {
    int64_t begin, count;
};

std::vector<Slice> slices(const Params& p, int64_t most) {
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
// some tiles of some images, after which the slices' parts of grad_offset and grad_mask are summed. The sums
// depend on `parts` and `streams`, which the sizes alone decide; the rounds only bound the memory.
struct Plan {
    static constexpr int64_t kWeightBytes = 1 << 20;  // of all streams' weight gradients beyond the first
    static constexpr int64_t kPartialBytes = 2 << 20;
    static constexpr int64_t kUnits = 8;

    Tiling tiling;
    int64_t streams;
    std::vector<Slice> parts;
    int64_t images, tiles;  // of a round

    Plan(const Params& p, bool wants_weight, int64_t element) : tiling(p, kBackwardTile) {
        const int64_t taps = p.kernel_h * p.kernel_w;
        const int64_t weight_bytes = p.out_channels * p.channels / p.groups * taps * element;
        streams =
            std::max<int64_t>(1, wants_weight ? std::min(p.batch, 1 + kWeightBytes / weight_bytes) : p.batch);
        parts = slices(p, 64);
        if (streams * count() < kUnits) parts = slices(p, 32);
        const int64_t each = count() * kBackwardTile * taps * 3 * element;
        images = std::clamp(kPartialBytes / each / streams * streams, streams,
                            round_up(std::max<int64_t>(p.batch, 1), streams));
        tiles = std::clamp<int64_t>(kPartialBytes / each / images, 1, tiling.per_image());
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
    bool input, position, columns;
};

// Takes the gradient of the columns of a tile, [pixel, tap, channel of the slice], apart: adds it to
// grad_image at the corners, sums its products with the corners to sums[pixel, tap, 4], and puts the columns
// in its place.
template <class T>
void scatter(const T* image, T* grad_image, const Samples<T>& samples, int64_t pixels, const Slice& slice,
             Wanted wanted, T* tile, int64_t row, T* sums) {
    constexpr int full = kWidth<T>;
    for (int64_t s = 0; s < pixels * samples.per_pixel; ++s, sums += 4) {
        T* const columns = tile + s / samples.per_pixel * row + s % samples.per_pixel * slice.count;
        const auto sample = samples[s];
        if (!sample.inside()) {
            std::fill_n(columns, slice.count, T(0));
            std::fill_n(sums, 4, T(0));
            continue;
        }
        int64_t corner[4];
        T weight[4];
        for (int i = 0; i < 4; ++i) corner[i] = sample.corner(i) + slice.begin, weight[i] = sample.weight(i);
        Vector<T, full> products[4] = {};
        by_vectors<full>(slice.count, [&](auto width, int64_t j) NASFAST_INLINE_LAMBDA {
            constexpr int w = decltype(width)::value;
            const auto grad = load<w>(columns + j);
            Vector<T, w> column = {};
            for (int i = 0; i < 4; ++i) {
                const auto value = load<w>(image + corner[i] + j);
                if (wanted.position) {
                    if constexpr (w == full)
                        products[i] += grad * value;
                    else
                        for (int k = 0; k < w; ++k) products[i][k] += grad[k] * value[k];
                }
                column += weight[i] * value;
            }
            if (wanted.input)
                for (int i = 0; i < 4; ++i) {
                    T* const to = grad_image + corner[i] + j;  // corners may coincide
                    store<w>(to, load<w>(to) + weight[i] * grad);
                }
            if (wanted.columns) store<w>(columns + j, column);
        });
        if (wanted.position) store_sums(products, sums);
    }
}

// derivatives[0, 1, 2] = gradients by y, x and mask of the samples of a tile, from the sums of scatter.
template <class T>
void differentiate(const Samples<T>& samples, int64_t count, const T* sums, T* derivatives, int64_t stride) {
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
template <class T>
void backward_samples(const Params& p, const Backward<T>& t) {
    const int64_t taps = p.kernel_h * p.kernel_w, in = p.channels / p.groups, out = p.out_channels / p.groups;
    const Wanted wanted{t.grad_input != nullptr, t.grad_offset || t.grad_mask, t.grad_weight != nullptr};
    const Plan plan(p, wanted.columns, sizeof(T));
    const int64_t tiles = plan.tiling.per_image();
    const WeightSteps steps(p);
    const Panels<T> out_panels(out);
    int64_t widest = 0;
    for (const Slice& slice : plan.parts) widest = std::max(widest, slice.count);

    const int64_t weight_size = p.out_channels * in * taps;
    const auto clear = [](T* memory, int64_t count) {
        constexpr int64_t piece = 1 << 14;
        parallel_for(memory ? ceil_div(count, piece) : 0, [&](int64_t unit) {
            std::fill_n(memory + unit * piece, std::min(piece, count - unit * piece), T(0));
        });
    };
    const Buffer streams(wanted.columns ? (plan.streams - 1) * weight_size * sizeof(T) : 0);
    clear(t.grad_input, p.batch * p.height * p.width * p.channels);
    clear(t.grad_weight, weight_size);
    if (wanted.columns) clear(streams.get<T>(), (plan.streams - 1) * weight_size);
    // of a tile and a slice: gradients by y, x and mask, [3, pixel, tap]
    const int64_t stride = round_up(kBackwardTile * taps, kWidth<T>), each = 3 * stride;
    const Buffer derivatives(wanted.position ? plan.images * plan.tiles * plan.count() * each * sizeof(T)
                                             : 0);

    struct Scratch {
        Samples<T> samples;
        T *sums, *columns, *grad, *grad_panels, *row, *weight, *grad_weight;
    };
    const auto layout = [&](Arena& arena) {
        return Scratch{{arena, p, 1, kBackwardTile},
                       arena.take<T>(4 * stride),
                       arena.take<T>(kBackwardTile * Panels<T>(taps * widest).padded()),
                       arena.take<T>(kBackwardTile * out),
                       arena.take<T>(kBackwardTile * out_panels.padded()),
                       arena.take<T>(taps * widest),
                       arena.take<T>(out * Panels<T>(taps * widest).padded()),
                       arena.take<T>(wanted.columns ? taps * widest * out_panels.padded() : 0)};
    };
    for (int64_t image = 0; image < p.batch; image += plan.images)
        for (int64_t first = 0; first < tiles; first += plan.tiles) {
            const int64_t images = std::min(plan.images, p.batch - image);
            const int64_t count = std::min(plan.tiles, tiles - first);
            const auto part_of = [&](int64_t n, int64_t tile, int64_t part) {
                return derivatives.get<T>() + ((n * count + tile) * plan.count() + part) * each;
            };
            parallel_for(
                std::min(plan.streams, images) * plan.count(), layout, [&](int64_t unit, Scratch& s) {
                    const int64_t part = unit % plan.count(), stream = unit / plan.count();
                    const Slice slice = plan.parts[part];
                    const int64_t group = slice.begin / in, width = taps * slice.count;
                    const int64_t corner = group * out * steps.out + slice.begin % in * steps.channel;
                    const Panels<T> panels(width);
                    // the weight of the slice, [out, (tap, channel)]
                    for (int64_t k = 0; k < out; ++k) {
                        const T* const from = t.weight + corner + k * steps.out;
                        for (int64_t tap = 0; tap < taps; ++tap)
                            for (int64_t c = 0; c < slice.count; ++c)
                                s.row[tap * slice.count + c] = from[tap * steps.tap + c * steps.channel];
                        pack(panels, out, k, 1, s.row, width, 1, s.weight);
                    }
                    if (wanted.columns) std::fill_n(s.grad_weight, width * out_panels.padded(), T(0));
                    for (int64_t n = stream; n < images; n += plan.streams)
                        for (int64_t i = 0; i < count; ++i) {
                            const Tile tile = plan.tiling[(image + n) * tiles + first + i];
                            const int64_t pixels = tile.pixels();
                            locate<true>(p, t.offset, t.mask, slice.begin / (p.channels / p.offset_groups),
                                         tile, s.samples);
                            for (int64_t pixel = 0; pixel < pixels; ++pixel)
                                std::copy_n(t.grad + tile.pixel(p, pixel) * p.out_channels + group * out, out,
                                            s.grad + pixel * out);
                            for (int64_t k = 0; k < out; k += VectorProduct<T>::kDepth)
                                multiply(pixels, std::min(VectorProduct<T>::kDepth, out - k), s.grad + k, out,
                                         1, panels, s.weight, out, k, k ? Into::add : Into::assign, s.columns,
                                         panels.padded());
                            const int64_t offset = (image + n) * p.height * p.width * p.channels;
                            scatter(t.input + offset, t.grad_input + offset, s.samples, pixels, slice, wanted,
                                    s.columns, panels.padded(), s.sums);
                            if (wanted.position)
                                differentiate(s.samples, pixels * taps, s.sums, part_of(n, i, part), stride);
                            if (wanted.columns) {
                                pack(out_panels, pixels, 0, pixels, s.grad, out, 1, s.grad_panels);
                                multiply(width, pixels, s.columns, 1, panels.padded(), out_panels,
                                         s.grad_panels, pixels, 0, Into::add, s.grad_weight,
                                         out_panels.padded());
                            }
                        }
                    if (!wanted.columns) return;
                    T* const target =
                        (stream ? streams.get<T>() + (stream - 1) * weight_size : t.grad_weight) + corner;
                    for (int64_t k = 0; k < out; k += 16)
                        for (int64_t tap = 0; tap < taps; ++tap)
                            for (int64_t c = 0; c < slice.count; ++c) {
                                T* const to = target + k * steps.out + tap * steps.tap + c * steps.channel;
                                const T* const from =
                                    s.grad_weight + (tap * slice.count + c) * out_panels.padded() + k;
                                for (int64_t j = 0; j < std::min<int64_t>(16, out - k); ++j)
                                    to[j * steps.out] += from[j];
                            }
                });
            if (wanted.position)
                parallel_for(images * count, [&](int64_t unit) {
                    const int64_t n = unit / count, i = unit % count;
                    const Tile tile = plan.tiling[(image + n) * tiles + first + i];
                    for (int64_t part = 0; part < plan.count();) {
                        T* const sum = part_of(n, i, part);
                        const int64_t group = plan.parts[part].begin / (p.channels / p.offset_groups);
                        for (++part; part < plan.count() &&
                                     plan.parts[part].begin / (p.channels / p.offset_groups) == group;
                             ++part) {
                            const T* const other = part_of(n, i, part);
                            for (int64_t j = 0; j < each; ++j) sum[j] += other[j];
                        }
                        for (int64_t pixel = 0; pixel < tile.pixels(); ++pixel) {
                            const int64_t at = (tile.pixel(p, pixel) * p.offset_groups + group) * taps;
                            for (int64_t tap = 0; tap < taps; ++tap) {
                                const T* const from = sum + pixel * taps + tap;
                                if (t.grad_offset) {
                                    t.grad_offset[2 * (at + tap)] = from[0];
                                    t.grad_offset[2 * (at + tap) + 1] = from[stride];
                                }
                                if (t.grad_mask) t.grad_mask[at + tap] = from[2 * stride];
                            }
                        }
                    }
                });
        }
    if (wanted.columns)
        parallel_for(p.out_channels, [&](int64_t unit) {
            const int64_t row = in * taps;
            for (int64_t stream = 1; stream < plan.streams; ++stream)
                for (int64_t i = unit * row; i < (unit + 1) * row; ++i)
                    t.grad_weight[i] += streams.get<T>()[(stream - 1) * weight_size + i];
        });
}

// Bias gradient: sums over pieces of the pixels, then over the pieces, in double.
template <class T>
void backward_bias(const Params& p, const Backward<T>& t) {
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    const int64_t pieces = std::clamp<int64_t>(pixels / 256, 1, 64);
    const Buffer partial(pieces * p.out_channels * sizeof(double));
    parallel_for(pieces, [&](int64_t unit) {
        double* const sums = partial.get<double>() + unit * p.out_channels;
        std::fill_n(sums, p.out_channels, 0.0);
        for (int64_t pixel = unit * pixels / pieces; pixel < (unit + 1) * pixels / pieces; ++pixel)
            for (int64_t c = 0; c < p.out_channels; ++c) sums[c] += t.grad[pixel * p.out_channels + c];
    });
    for (int64_t c = 0; c < p.out_channels; ++c) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece)
            sum += partial.get<double>()[piece * p.out_channels + c];
        t.grad_bias[c] = T(sum);
    }
}

template <class T>
void backward_impl(const Params& p, const Backward<T>& t) {
    if (t.grad_input || t.grad_offset || t.grad_mask || t.grad_weight) backward_samples(p, t);
    if (t.grad_bias) backward_bias(p, t);
}

}  // namespace

void forward(const Params& p, const Forward<float>& t) { forward_impl<VectorProduct<float>>(p, t); }
void forward(const Params& p, const Forward<double>& t) { forward_impl<VectorProduct<double>>(p, t); }
void forward(const Params& p, const Forward<bfloat16>& t) { forward_impl<VectorProduct<float>>(p, t); }
void backward(const Params& p, const Backward<float>& t) { backward_impl(p, t); }
void backward(const Params& p, const Backward<double>& t) { backward_impl(p, t); }

}  // namespace nasfast::deform_conv2d::NASFAST_ISA
