// Columns in memory: the samples of some output pixels, and what becomes of their gradient. The products with
// the weight are matrix products of a library (nasfast/ops/deform_conv2d.py).
//
// A block has a tile of pixels and a run of taps, whose samples it locates once; it walks over slices of the
// channels, and in each over the taps, which share much of the input, while that is in the cache.
#pragma once

#include "deform_conv2d/deform_conv2d_backward.cuh"

namespace nasfast::deform_conv2d::cuda {

constexpr int kColumnThreads = 128;
constexpr int kColumnPixels = kColumnThreads / 4;  // of a tile
constexpr int kMostColumnTaps = 9;                 // of a block

// Sizes of a launch that follow from Part.
struct ColumnPlan {
    int taps;            // K
    int alike;           // channels of an offset group
    int block_taps;      // of a block
    int blocks_of_taps;  // of an offset group
    int slice;           // channels

    struct Block {
        int64_t first_pixel;       // in the part
        int pixels, d, tap, taps;  // how many; offset group; the first, how many
    };
    __device__ __forceinline__ Block block(const Part& p) const {
        const int64_t first_pixel = int64_t(blockIdx.x) * kColumnPixels;
        const int tap = int(blockIdx.y) % blocks_of_taps * block_taps;
        return {first_pixel, int(min(int64_t(kColumnPixels), p.pixels - first_pixel)),
                int(blockIdx.y) / blocks_of_taps, tap, min(block_taps, taps - tap)};
    }
};

// ---- samples

template <class A>
struct alignas(16) ColumnCorners {
    A weights[4];     // with the mask; 0 outside of the image
    int64_t element;  // of input, where corner 0 begins
};

template <class T>
__global__ void __launch_bounds__(kColumnThreads, sizeof(T) == 8 ? 4 : 8)
    columns_forward_kernel(const Part p, const ColumnsForward<T> t, const ColumnPlan plan) {
    using A = Accumulate<T>;
    constexpr int size = Chunk<T>::size;
    auto* corners = shared_memory<ColumnCorners<A>>();  // [taps][kColumnPixels]
    const auto here = plan.block(p);
    for (int i = threadIdx.x; i < here.taps * kColumnPixels; i += kColumnThreads) {
        const int row = i % kColumnPixels, tap = here.tap + i / kColumnPixels;
        ColumnCorners<A> found{};
        if (row < here.pixels) {
            const auto sample = locate_masked(p, t, p.first_pixel + here.first_pixel + row, here.d, tap);
            sample.weights(found.weights, sample.mask);
            found.element = sample.corner;
        }
        corners[i] = found;
    }
    __syncthreads();

    for (int begin = 0; begin < plan.alike; begin += plan.slice) {
        const int chunks = min(plan.slice, plan.alike - begin) / size;
        for (int i = threadIdx.x; i < here.pixels * chunks; i += kColumnThreads) {
            const int row = i / chunks, channel = here.d * plan.alike + begin + i % chunks * size;
            T* column = t.columns + ((here.first_pixel + row) * plan.taps + here.tap) * p.channels + channel;
#pragma unroll 2
            for (int tap = 0; tap < here.taps; ++tap) {
                const auto& sample = corners[tap * kColumnPixels + row];
                const T* source = t.input + sample.element + channel;
                uint4 gathered[4];
#pragma unroll
                for (int corner = 0; corner < 4; ++corner)
                    gathered[corner] =  // not where the weight is zero: that may be outside of the image
                        load_16(source + corner_step(p, corner) * p.channels, sample.weights[corner] != 0);
                *reinterpret_cast<uint4*>(column + tap * p.channels) =
                    weighted_sum<false>(gathered, sample.weights, T());
            }
        }
    }
}

// ---- gradients

// Adds to four channels of the image's gradient.
template <class A>
__device__ __forceinline__ void add_four(A* sums, const Pack<A, 4>& terms) {
    if constexpr (std::is_same_v<A, float>) {
        const auto& [x, y, z, w] = terms.values;
        atomic_add(sums, make_float4(x, y, z, w));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) atomic_add(sums + i, terms.values[i]);
    }
}

template <class T>
__device__ __forceinline__ void store_four_narrow(T* target, const Pack<Accumulate<T>, 4>& values) {
    Pack<T, 4> narrowed;
#pragma unroll
    for (int i = 0; i < 4; ++i) narrowed.values[i] = narrow(values.values[i], T{});
    store_pack(target, narrowed);
}

// Half a warp has four neighbouring pixels, a lane four channels of a slice of 64. The products of gradient
// and corners are summed over the slices in shared memory, each by the lane that has it after halving_sum.
// Neighbours often share two corners, the right ones of one being the left ones of the next: these are added
// to the image's gradient together.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, sizeof(T) == 8 ? 2 : 5)
    columns_backward_kernel(const Part p, const ColumnsBackward<T> t, const ColumnPlan plan) {
    using A = Accumulate<T>;
    auto* samples = shared_memory<MaskedSample<A>>();                           // [taps][kColumnPixels]
    A* sums = reinterpret_cast<A*>(samples + plan.block_taps * kColumnPixels);  // [taps][kColumnThreads]
    const auto here = plan.block(p);
    for (int i = threadIdx.x; i < here.taps * kColumnPixels; i += kColumnThreads) {
        const int row = i % kColumnPixels, tap = here.tap + i / kColumnPixels;
        samples[i] = row < here.pixels
                         ? locate_masked(p, t, p.first_pixel + here.first_pixel + row, here.d, tap)
                         : MaskedSample<A>{};
    }
    for (int tap = 0; tap < here.taps; ++tap) sums[tap * kColumnThreads + threadIdx.x] = 0;
    __syncthreads();

    const int own = int(threadIdx.x) / 16 * 4;
    const int channels = int(p.channels), row_step = int(p.width) * channels,
              column_step = plan.taps * channels;
    for (int begin = 0; begin < plan.alike; begin += plan.slice) {
        const int in_group = begin + int(threadIdx.x) % 16 * 4, channel = here.d * plan.alike + in_group;
        const bool exists = in_group < plan.alike;
        const int64_t first_column = ((here.first_pixel + own) * plan.taps + here.tap) * p.channels + channel;
#pragma unroll 1
        for (int tap = 0; tap < here.taps; ++tap) {
            const MaskedSample<A>* of_tap = samples + tap * kColumnPixels + own;
            const int64_t column = first_column + tap * channels;
            A of_pixels[4];         // dots; a lane has those of one corner
            Pack<A, 4> right[2]{};  // what the right corners of the pixel before still have to get
            const auto add_right = [&](int i, int row) {  // of pixel i
                if (exists && of_tap[i].has(2 * row + 1))
                    add_four(t.grad_input + (of_tap[i].corner + channels + row * row_step + channel),
                             right[row]);
            };
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const MaskedSample<A> sample = of_tap[i];
                const bool here_too = exists && own + i < here.pixels;
                const auto grads = load_four(t.grad_columns + column + int64_t(i) * column_step, here_too);
                Pack<A, 4> values[4], sampled{};
                A dots[4];
#pragma unroll
                for (int corner = 0; corner < 4; ++corner)
                    values[corner] =
                        load_four(t.input + (sample.corner + channel) +
                                      ((corner & 1 ? channels : 0) + (corner & 2 ? row_step : 0)),
                                  exists && sample.has(corner));
#pragma unroll
                for (int corner = 0; corner < 4; ++corner) {
                    const A weight = sample.along_y(corner) * sample.along_x(corner) * sample.mask;
                    A dot = 0;
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        dot += grads.values[c] * values[corner].values[c];
                        sampled.values[c] += weight * values[corner].values[c];
                    }
                    dots[corner] = dot;
                }
                of_pixels[i] = halving_sum(dots, 2);
                if (t.columns && here_too)
                    store_four_narrow(t.columns + column + int64_t(i) * column_step, sampled);
                if (!t.grad_input) continue;
                const bool shared = i > 0 &&
                                    (sample.inside & 0b0101) == (of_tap[i - 1].inside >> 1 & 0b0101) &&
                                    sample.corner == of_tap[i - 1].corner + channels;
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    if (i > 0 && !shared) add_right(i - 1, row);
                    const A along = sample.along_y(2 * row) * sample.mask;
                    const A to_left = along * (1 - sample.x), to_right = along * sample.x;
                    const bool has = sample.has(2 * row);
                    Pack<A, 4> left;
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        left.values[c] =
                            to_left * grads.values[c] + (shared && has ? right[row].values[c] : 0);
                        right[row].values[c] = to_right * grads.values[c];
                    }
                    if (exists && has)
                        add_four(t.grad_input + (sample.corner + row * row_step + channel), left);
                }
            }
            if (t.grad_input) {
                add_right(3, 0);
                add_right(3, 1);
            }
            sums[tap * kColumnThreads + threadIdx.x] += halving_sum(of_pixels, 8);
        }
    }

    if (!t.grad_offset && !t.grad_mask) return;
    const int row = own + int(threadIdx.x) % 16 / 4;
    for (int tap = 0; tap < here.taps; ++tap) {
        const int64_t pixel = p.first_pixel + here.first_pixel + row;
        const int64_t index = (pixel * p.offset_groups + here.d) * plan.taps + here.tap + tap;
        write_position(sums[tap * kColumnThreads + threadIdx.x], t, samples[tap * kColumnPixels + row],
                       row < here.pixels, index);
    }
}

// ---- host

// `most`: channels of a slice.
inline ColumnPlan column_plan(const Part& p, int most) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t tiles = std::max<int64_t>(ceil_div(p.pixels, kColumnPixels), 1);
    const int64_t taps = p.kernel_h * p.kernel_w, alike = p.channels / p.offset_groups;
    // several taps to a block, but enough blocks for the device
    const int64_t wanted = ceil_div(8 * multiprocessors(), tiles * p.offset_groups);
    const int64_t blocks = std::clamp(wanted, ceil_div(taps, kMostColumnTaps), taps);
    const int64_t block_taps = ceil_div(taps, blocks);
    return {int(taps), int(alike), int(block_taps), int(ceil_div(taps, block_taps)), most};
}

inline dim3 column_grid(const Part& p, const ColumnPlan& plan) {
    dim3 size = grid((p.pixels + kColumnPixels - 1) / kColumnPixels);
    size.y = unsigned(p.offset_groups * plan.blocks_of_taps);
    return size;
}

template <class T>
void columns_forward(const Part& p, const ColumnsForward<T>& t, void* stream) {
    check_sizes(p);
    auto plan = column_plan(p, 0);
    // slices of at most 256 bytes, equal ones
    constexpr int chunk = Chunk<T>::size;
    const int chunks = plan.alike / chunk, slices = (chunks + 15) / 16;
    plan.slice = (chunks + slices - 1) / slices * chunk;
    launch("deform_conv2d: columns_forward", NASFAST_KERNEL(columns_forward_kernel<T>), column_grid(p, plan),
           kColumnThreads, plan.block_taps * kColumnPixels * int64_t(sizeof(ColumnCorners<Accumulate<T>>)),
           stream, p, t, plan);
}

template <class T>
void columns_backward(const Part& p, const ColumnsBackward<T>& t, void* stream) {
    using A = Accumulate<T>;
    check_sizes(p);
    const auto plan = column_plan(p, kColumns);
    launch("deform_conv2d: columns_backward", NASFAST_KERNEL(columns_backward_kernel<T>),
           column_grid(p, plan), kColumnThreads,
           plan.block_taps * int64_t(kColumnPixels * sizeof(MaskedSample<A>) + kColumnThreads * sizeof(A)),
           stream, p, t, plan);
}

}  // namespace nasfast::deform_conv2d::cuda
