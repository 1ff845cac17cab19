// What the products read: maps with padded channels, and kernels packed for the matrix instructions.
//
// Every branch is a 3x3 convolution. The separable ones have the kernel pointwise[o, i] * depthwise[i, tap],
// which is multiplied out here: at the widths of this operation a matrix product with nine times the depth
// costs less than a walk through memory for the map in between.
#pragma once

#include <algorithm>

#include "common/cuda_sums.cuh"
#include "deform_conv2d/deform_conv2d_sample.cuh"
#include "mixed_op/mixed_op.h"

namespace nasfast::mixed_op::cuda {

using namespace nasfast::cuda;

template <class T>
constexpr int kElements = 16 / sizeof(T);  // of a chunk

// Channels of a map in chunks of 16 bytes: every group begins a chunk, zeros fill the last one.
struct Padding {
    int channels, group_channels, group_chunks, chunks;

    template <class T>
    static Padding make(int64_t channels, int64_t groups) {
        const int64_t of_group = channels / groups, chunks = (of_group + kElements<T> - 1) / kElements<T>;
        return {int(channels), int(of_group), int(chunks), int(chunks * groups)};
    }
    // Of an element of a pixel; -1 for a zero.
    template <class T>
    __device__ __forceinline__ int channel(int chunk, int element) const {
        const int in_group = chunk % group_chunks * kElements<T> + element;
        return in_group < group_channels ? chunk / group_chunks * group_channels + in_group : -1;
    }
    template <class T>
    __device__ __forceinline__ int element(int channel) const {
        return channel / group_channels * group_chunks * kElements<T> + channel % group_channels;
    }
};

// A block of a product has this rectangle of pixels of one image.
constexpr int kTileHeight = 8, kTileWidth = 16, kTilePixels = kTileHeight * kTileWidth;
constexpr int kTileThreads = 128;

// Sizes that the kernels derive from Params.
struct Layout {
    int64_t pixels, tiles;
    int channels, height, width;
    int offsets;  // channels of the offset map
    int tiles_across, tiles_down;
    Padding padding, offset_padding;

    template <class T>
    static Layout make(const Params& p, bool with_def, T) {
        Layout l;
        l.channels = int(p.channels);
        l.height = int(p.height);
        l.width = int(p.width);
        l.offsets = int(p.offset_groups) * 3 * kTaps;
        l.pixels = p.batch * p.height * p.width;
        l.tiles_across = int((p.width + kTileWidth - 1) / kTileWidth);
        l.tiles_down = int((p.height + kTileHeight - 1) / kTileHeight);
        l.tiles = p.batch * l.tiles_across * l.tiles_down;
        l.padding = Padding::make<T>(p.channels, with_def ? p.offset_groups : 1);
        l.offset_padding = Padding::make<T>(l.offsets, 1);
        return l;
    }

    // The first pixel of a tile.
    struct Place {
        int64_t image;
        int y, x;
    };
    __device__ __forceinline__ Place place(int64_t tile) const {
        const int64_t line = tile / tiles_across;
        return {line / tiles_down, int(line % tiles_down) * kTileHeight,
                int(tile % tiles_across) * kTileWidth};
    }
    __device__ __forceinline__ int64_t pixel(const Place& place, int y, int x) const {
        return (place.image * height + y) * width + x;
    }
};

// Hands out the workspace from its start on; without one it counts.
class Arena {
public:
    explicit Arena(void* workspace) : start_(reinterpret_cast<uintptr_t>(workspace)) {}

    template <class Element>
    Element* take(int64_t count) {
        const uintptr_t at = start_ + uintptr_t(used_);
        used_ += (count * int64_t(sizeof(Element)) + 255) / 256 * 256;
        return reinterpret_cast<Element*>(at);
    }
    int64_t used() const { return used_; }

private:
    uintptr_t start_;
    int64_t used_ = 0;
};

// norm(raw) = raw * slope + start
template <class A>
struct Affine {
    A slope, start;
};

// What normalises a raw map; statistics null: it is fixed. Raw maps are without the bias of def, which the
// normalisation takes away again: beside it, half precision would round off what differs between pixels.
template <class A>
struct Normalisation {
    const A* statistics;  // [kMaps, 2, C]; the mean of def has its bias
    const A* def_bias;    // null: 0
    const A* scale;       // [kMaps, C]
    const A* shift;
    A eps;
    int channels;

    template <class T>
    static Normalisation make(const Params& p, const Branches<T>& b, const A* statistics) {
        return {statistics, b.def_bias, b.scale, b.shift, A(p.eps), int(p.channels)};
    }
    __device__ __forceinline__ A bias(int map, int c) const {
        return map == kDef && def_bias ? def_bias[c] : 0;
    }
    // Of the raw map.
    __device__ __forceinline__ A mean(int map, int c) const {
        return statistics ? statistics[2 * map * channels + c] - bias(map, c) : 0;
    }
    __device__ __forceinline__ A inverse_deviation(int map, int c) const {
        return statistics ? 1 / sqrt(statistics[(2 * map + 1) * channels + c] + eps) : 1;
    }
    __device__ __forceinline__ A scale_of(int map, int c) const {
        return scale ? scale[map * channels + c] : 1;
    }
    __device__ __forceinline__ A shift_of(int map, int c) const {
        return shift ? shift[map * channels + c] : 0;
    }
    __device__ __forceinline__ Affine<A> affine(int map, int c) const {
        const A slope = scale_of(map, c) * inverse_deviation(map, c);
        return {slope, shift_of(map, c) - mean(map, c) * slope};
    }
};

template <class A>
__device__ __forceinline__ A relu(A value) {
    return value < 0 ? 0 : value;  // NaN stays
}

// ---- padded maps

// target = u * first + w * second + constant, or its ReLU, per channel; without coefficients u alone.
template <class T>
struct PaddedMap {
    using A = Accumulate<T>;
    uint4* target;  // [N, H, W, chunks]
    const T* u;     // [N, H, W, C]
    const T* w;
    const A* coefficients;  // [3, C]: first, constant, second
    int map;                // of Normalisation, the other source of coefficients; -1: none
    bool is_relu;
};
template <class T>
struct PaddedMaps {
    static constexpr int most = 4;
    PaddedMap<T> maps[most];
    int count = 0;

    void add(const PaddedMap<T>& map) { maps[count++] = map; }
};

// A thread has one chunk of many pixels. tf32: values are rounded to it.
template <class T>
__global__ void __launch_bounds__(kElementThreads, 4)
    pad_kernel(const Layout l, const PaddedMaps<T> maps, const Normalisation<Accumulate<T>> norm,
               const bool tf32) {
    using A = Accumulate<T>;
    const PaddedMap<T>& job = maps.maps[blockIdx.y];
    const int chunks = l.padding.chunks;
    const int abreast = max(kElementThreads / chunks, 1);
    for (int chunk = int(threadIdx.x) % min(chunks, kElementThreads); chunk < chunks;
         chunk += kElementThreads) {
        if (int(threadIdx.x) / chunks >= abreast) break;
        A first[kElements<T>], constant[kElements<T>], second[kElements<T>];
        int channels[kElements<T>];
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
            const int c = channels[e] = l.padding.channel<T>(chunk, e);
            first[e] = 1, constant[e] = second[e] = 0;
            if (c >= 0 && job.coefficients) {
                first[e] = job.coefficients[c];
                constant[e] = job.coefficients[l.channels + c];
                if (job.w) second[e] = job.coefficients[2 * l.channels + c];
            } else if (c >= 0 && job.map >= 0) {
                const auto affine = norm.affine(job.map, c);
                first[e] = affine.slope, constant[e] = affine.start;
            }
        }
        const int64_t step = int64_t(gridDim.x) * abreast;
        for (int64_t pixel = int64_t(blockIdx.x) * abreast + threadIdx.x / chunks; pixel < l.pixels;
             pixel += step) {
            Chunk<T> result{};
#pragma unroll
            for (int e = 0; e < kElements<T>; ++e) {
                if (channels[e] < 0) continue;
                const int64_t at = pixel * l.channels + channels[e];
                A value = widen(job.u[at]) * first[e] + constant[e];
                if (job.w) value += widen(job.w[at]) * second[e];
                if (job.is_relu) value = relu(value);
                if constexpr (std::is_same_v<T, float>)
                    if (tf32) value = bits_to_float(to_tf32(value));
                result.values[e] = narrow(value, T{});
            }
            job.target[pixel * chunks + chunk] = as_words(result);
        }
    }
}

template <class T>
void pad(const Params& p, const Layout& l, const PaddedMaps<T>& maps,
         const Normalisation<Accumulate<T>>& norm, void* stream) {
    dim3 grid = element_grid(l.pixels * l.padding.chunks);
    grid.x = std::min(grid.x, 512u);
    grid.y = unsigned(maps.count);
    launch("mixed_op: pad", NASFAST_KERNEL(pad_kernel<T>), grid, kElementThreads, 0, stream, l, maps, norm,
           bool(p.tf32));
}

// ---- packed kernels

// The kernel of a branch, [rows, 3, 3, C], or two that make it; null: zeros. With a factor and a scale, by
// which its rows are multiplied: scale[row] where it is not null.
template <class T>
struct Kernel3x3 {
    using A = Accumulate<T>;
    const T* dense;
    const T* depthwise;  // [C, 3, 3]
    const T* pointwise;  // [C, C]
    int rows;
    const A* factor;
    const A* scale;

    __device__ __forceinline__ A at(int row, int tap, int channel, int channels) const {
        A value = 0;
        if (dense)
            value = widen(dense[(int64_t(row) * kTaps + tap) * channels + channel]);
        else if (pointwise)
            value = widen(pointwise[int64_t(row) * channels + channel]) *
                    widen(depthwise[int64_t(channel) * kTaps + tap]);
        return value * weight(row);
    }
    __device__ __forceinline__ A weight(int row) const {
        return (factor ? *factor : 1) * (scale ? scale[row] : 1);
    }
    __host__ __device__ __forceinline__ bool exists() const { return dense || pointwise; }
};

template <class T>
Kernel3x3<T> kernel_of(const Params& p, const Branches<T>& b, Map map) {
    const int rows = int(p.channels);
    switch (map) {
        case kConv:
            return {b.conv, nullptr, nullptr, rows, nullptr, nullptr};
        case kDil:
            return {b.dil, nullptr, nullptr, rows, nullptr, nullptr};
        case kDef:
            return {b.def, nullptr, nullptr, rows, nullptr, nullptr};
        case kSep:
            return {nullptr, b.depthwise2, b.pointwise2, rows, nullptr, nullptr};
        default:
            return {nullptr, b.depthwise1, b.pointwise1, rows, nullptr, nullptr};
    }
}

// The same, multiplied by what the map counts in the output where nothing is normalised.
template <class T>
Kernel3x3<T> weighted_kernel_of(const Params& p, const Branches<T>& b, Map map) {
    Kernel3x3<T> kernel = kernel_of(p, b, map);
    kernel.factor = b.factors + map;
    if (b.scale) kernel.scale = b.scale + map * p.channels;
    return kernel;
}

template <class T>
Kernel3x3<T> offset_kernel_of(const Layout& l, const Branches<T>& b) {
    return {b.offset_weight, nullptr, nullptr, l.offsets, nullptr, nullptr};
}

// Taps of a product: nine, or those of dilation 1 and of dilation 2 without its centre, which is theirs both.
constexpr int kMergedTaps = 17;

struct Shift {
    int y, x;
};
__device__ __forceinline__ Shift shift_of(int taps, int dilation, int tap) {
    if (taps == kMergedTaps) {
        dilation = tap < kTaps ? 1 : 2;
        if (tap >= kTaps) tap -= tap - kTaps < 4 ? kTaps : kTaps - 1;
    }
    return {(tap / 3 - 1) * dilation, (tap % 3 - 1) * dilation};
}

// Depth of a product: the channels of a map in segments, of which a tile with its border fits into shared
// memory; in a segment runs of taps; in a run the chunks of tap after tap. A step of the product takes two
// chunks, the last of a run perhaps one and zeros.
constexpr int kSegment = 8;  // chunks

struct Depth {
    int chunks, taps, run;  // run: taps of one

    __host__ __device__ __forceinline__ int runs() const { return taps / run; }
    __host__ __device__ __forceinline__ int segments() const { return (chunks + kSegment - 1) / kSegment; }
    __host__ __device__ __forceinline__ int in_segment(int segment) const {
        return min(kSegment, chunks - segment * kSegment);
    }
    __host__ __device__ __forceinline__ int run_steps(int segment) const {
        return (run * in_segment(segment) + 1) / 2;
    }
    __host__ __device__ __forceinline__ int first_step(int segment) const {
        return segment * runs() * run_steps(0);
    }
    __host__ __device__ __forceinline__ int steps() const {
        const int last = segments() - 1;
        return first_step(last) + runs() * run_steps(last);
    }
};

// One matrix: [steps, columns] of 32 bytes.
template <class T>
struct Packing {
    uint4* target;
    Kernel3x3<T> kernels[3];  // stacked; or conv and dil, merged
    Depth depth;
    Padding padding;  // of the channels in depth
    int columns;      // a multiple of 8
    int count;        // of columns that exist
    bool transposed;  // depth goes along the rows of the kernels, with the taps turned around
    bool padded;      // so are the columns
};

template <class T>
struct Packings {
    static constexpr int most = 6;
    Packing<T> jobs[most];
    int count = 0;
};

template <class T>
__device__ __forceinline__ Accumulate<T> packed_value(const Packing<T>& job, int tap, int channel, int column,
                                                      int channels) {
    int row = job.transposed ? channel : column;
    const int other = job.transposed ? column : channel;
    if (job.depth.taps == kMergedTaps) {
        const bool dilated = tap >= kTaps;
        if (dilated) tap -= tap - kTaps < 4 ? kTaps : kTaps - 1;
        if (job.transposed) tap = kTaps - 1 - tap;
        if (dilated) return job.kernels[1].at(row, tap, other, channels);
        const auto value = job.kernels[0].at(row, tap, other, channels);
        return tap == 4 ? value + job.kernels[1].at(row, tap, other, channels) : value;
    }
    if (job.transposed) tap = kTaps - 1 - tap;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (row < job.kernels[i].rows) return job.kernels[i].at(row, tap, other, channels);
        row -= job.kernels[i].rows;
    }
    return 0;
}

// `words`: the order of the words of a step is that in which mma wants a lane's two together.
template <class T, bool words>
__global__ void __launch_bounds__(kElementThreads)
    pack_kernel(const Packings<T> packings, const int channels, const bool tf32) {
    const Packing<T>& job = packings.jobs[blockIdx.y];
    const Depth& depth = job.depth;
    const int64_t elements = int64_t(depth.steps()) * job.columns;
    for (int64_t i = first_element(); i < elements; i += element_step()) {
        const int step = int(i / job.columns);
        int column = int(i % job.columns);
        bool exists = column < job.count;
        if (job.padded) {
            column =
                exists ? job.padding.template channel<T>(column / kElements<T>, column % kElements<T>) : -1;
            exists = column >= 0;
        }
        const int segment = min(step / max(depth.first_step(1), 1), depth.segments() - 1);
        const int run_steps = depth.run_steps(segment), in_segment = depth.in_segment(segment);
        const int run = (step - depth.first_step(segment)) / run_steps;
        const int in_run = (step - depth.first_step(segment)) % run_steps;
        uint4 chunks[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = 2 * in_run + half;
            const int tap = run * depth.run + at / in_segment;
            const int chunk = segment * kSegment + at % in_segment;
            Chunk<T> values{};
#pragma unroll 1
            for (int e = 0; e < kElements<T>; ++e) {
                const int channel = job.padding.template channel<T>(chunk, e);
                if (at >= depth.run * in_segment || channel < 0 || !exists) continue;
                auto value = packed_value(job, tap, channel, column, channels);
                if constexpr (std::is_same_v<T, float>)
                    if (tf32) value = bits_to_float(to_tf32(value));
                values.values[e] = narrow(value, T{});
            }
            chunks[half] = as_words(values);
        }
        uint4* target = job.target + 2 * i;
        if (words) {
            target[0] = make_uint4(chunks[0].x, chunks[1].x, chunks[0].y, chunks[1].y);
            target[1] = make_uint4(chunks[0].z, chunks[1].z, chunks[0].w, chunks[1].w);
        } else {
            target[0] = chunks[0];
            target[1] = chunks[1];
        }
    }
}

}  // namespace nasfast::mixed_op::cuda
