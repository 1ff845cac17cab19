// Backward: the kernels of each gradient, and the host code that launches them.
//
// A slice is a run of at most kColumns input channels inside one group and one offset group; a position is a
// pair (offset group, tap). Every sum has a fixed order but those of grad_input, where blocks meet: atomics
// add in the order in which they come, unless Params::deterministic asks for ExactSums.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "common/cuda_sums.cuh"
#include "common/cuda_tiles.cuh"
#include "deform_conv2d/deform_conv2d_sample.cuh"

namespace nasfast::deform_conv2d::cuda {

constexpr int kPixels = 64;  // of a block of backward_data
constexpr int kStages = 3;   // of its copies: chunks of output channels
template <class T>
constexpr int kDepth = 128 / sizeof(T);  // of a chunk
template <class T>
constexpr int kGradSlots = sizeof(T) == 8 ? kStages : 4;  // chunks of grad that have room

// Sizes that the kernels derive from Params.
struct Layout {
    int64_t pixels;             // N * Ho * Wo
    int64_t elements, weights;  // of input and of weight
    int taps, positions;
    int group_channels, group_out;              // of one group: C / G and Co / G
    int offset_channels;                        // of one offset group: C / D
    int segment;                                // of channels with group and offset group in common
    int segment_slices, offset_slices, slices;  // of a segment, an offset group, all channels
    int chunks;                                 // of the output channels of a group
    bool keep_grad;                             // all of them have room
    bool vector;                                // 16 bytes of channels are aligned and of one segment

    template <class T>
    Layout(const Params& p, const Backward<T>& t) {
        pixels = p.batch * p.out_height * p.out_width;
        elements = p.batch * p.height * p.width * p.channels;
        taps = int(p.kernel_h * p.kernel_w);
        positions = int(p.offset_groups) * taps;
        group_channels = int(p.channels / p.groups);
        group_out = int(p.out_channels / p.groups);
        weights = p.out_channels * taps * group_channels;
        offset_channels = int(p.channels / p.offset_groups);
        segment = std::gcd(group_channels, offset_channels);
        segment_slices = (segment + kColumns - 1) / kColumns;
        offset_slices = offset_channels / segment * segment_slices;
        slices = offset_slices * int(p.offset_groups);
        chunks = (group_out + kDepth<T> - 1) / kDepth<T>;
        keep_grad = p.groups * chunks <= kGradSlots<T>;
        const auto aligned = [](const void* pointer) {
            return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
        };
        const int size = std::max<int>(16 / sizeof(T), 4);
        vector = segment % size == 0 && group_out % size == 0 && aligned(t.grad) && aligned(t.input) &&
                 aligned(t.weight) && aligned(t.grad_input);
    }
};

struct Slice {
    int begin, count, group;

    __device__ __forceinline__ Slice(const Layout& l, int index) {
        const int offset = index % l.segment_slices * kColumns;
        begin = index / l.segment_slices * l.segment + offset;
        count = min(kColumns, l.segment - offset);
        group = begin / l.group_channels;
    }
};

// A sample whose `corner` is the element of channel 0 in input, and its factor; 0 where it does not count.
template <class A>
struct MaskedSample : Sample<A> {
    A mask;

    __device__ __forceinline__ bool has(int corner) const { return this->inside >> corner & 1; }
    __device__ __forceinline__ A along_y(int corner) const { return corner & 2 ? this->y : 1 - this->y; }
    __device__ __forceinline__ A along_x(int corner) const { return corner & 1 ? this->x : 1 - this->x; }
    __device__ __forceinline__ int64_t element(const Params& p, int corner) const {
        return this->corner + corner_step(p, corner) * p.channels;
    }
};

// `t` has offset and mask.
template <class Tensors, class A = typename Tensors::A>
__device__ __forceinline__ MaskedSample<A> locate_masked(const Params& p, const Tensors& t, int64_t pixel,
                                                         int d, int tap) {
    Sample<A> sample = locate(p, t.offset, pixel, d, tap);
    sample.corner *= p.channels;
    return {sample, sample.inside ? mask_at(p, t.mask, pixel, d, tap) : 0};
}

template <class T, class A = Accumulate<T>>
__device__ __forceinline__ MaskedSample<A> locate_masked(const Params& p, const Layout& l,
                                                         const Backward<T>& t, int64_t pixel, int position) {
    if (pixel >= l.pixels) return {};
    return locate_masked(p, t, pixel, position / l.taps, position % l.taps);
}

// ---- gradients of input, offset and mask

template <class T>
struct DataTiles {
    using A = Accumulate<T>;
    static constexpr int kGradStride = kDepth<T> + kPadAlong<T>, kWeightStride = kColumns + kPadDown<T>;
    static constexpr int kSampleStride = kColumns + 8;

    T grad[kGradSlots<T>][kPixels * kGradStride];          // [pixel, output channel]
    T weight[kStages][kDepth<T> * kWeightStride];          // [output channel, input channel]
    alignas(16) A grad_samples[kPixels * kSampleStride];   // [pixel, input channel]
    MaskedSample<A> samples[kThreads / kPixels][kPixels];  // of positions in a row
};

// The chunks of grad and weight in the order in which a block of backward_data multiplies them. Where all of
// grad has room, it is copied once only.
template <class T>
struct ChunkQueue {
    using Tiles = DataTiles<T>;
    int position, end;  // of the next copy; of the block
    int slice = 0;      // in the offset group
    int chunk = 0, stage = 0;
    int count, group;   // of the slice
    const T* weight;    // of the slice
    unsigned kept = 0;  // slots of grad that are filled

    __device__ __forceinline__ ChunkQueue(const Layout& l, const T* weights, int begin, int end)
        : position(begin), end(end) {
        start_slice(l, weights);
    }

    static __device__ __forceinline__ int grad_slot(const Layout& l, int group, int chunk, int stage) {
        return l.keep_grad ? group * l.chunks + chunk : stage;
    }

    __device__ __forceinline__ void copy_next(const Params& p, const Layout& l, const Backward<T>& t,
                                              Tiles& tiles, int64_t first_pixel) {
        if (position < end) {
            const int first = chunk * kDepth<T>, depth = l.group_out - first;
            const int64_t row_step = int64_t(l.taps) * l.group_channels;
            load_tile<kDepth<T>, kColumns, Tiles::kWeightStride>(
                tiles.weight[stage], weight + first * row_step, row_step, depth, count, l.vector);
            const int slot = grad_slot(l, group, chunk, stage);
            if (!(l.keep_grad && kept >> slot & 1)) {
                const T* grad = t.grad + first_pixel * p.out_channels + int64_t(group) * l.group_out + first;
                load_tile<kPixels, kDepth<T>, Tiles::kGradStride>(
                    tiles.grad[slot], grad, p.out_channels,
                    int(min(int64_t(kPixels), l.pixels - first_pixel)), depth, l.vector);
                kept |= 1u << slot;
            }
            if (++chunk == l.chunks) {
                chunk = 0;
                if (++slice == l.offset_slices) {
                    slice = 0;
                    ++position;
                }
                start_slice(l, t.weight);
            }
        }
        cp_async_commit();
        stage = (stage + 1) % kStages;
    }

private:
    __device__ __forceinline__ void start_slice(const Layout& l, const T* weights) {
        const Slice channels(l, position / l.taps * l.offset_slices + slice);
        count = channels.count;
        group = channels.group;
        weight = weights + (int64_t(group) * l.group_out * l.taps + position % l.taps) * l.group_channels +
                 (channels.begin - group * l.group_channels);
    }
};

// What follows is for 16 lanes, which have four neighbouring pixels: samples[i] and row i of grad_samples. A
// lane has four channels, the first being `begin`, of which `count` or all exist.

// Four channels, or zeros.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ Pack<A, 4> load_four(const T* source, bool valid) {
    if constexpr (sizeof(T) == 2) {
        uint2 words = make_uint2(0, 0);
        if (valid) words = *reinterpret_cast<const uint2*>(source);
        const float2 first = widen_pair(words.x, T{}), second = widen_pair(words.y, T{});
        return {first.x, first.y, second.x, second.y};
    } else {
        Pack<A, 4> values{};
        if (valid) values = load_pack<4>(source);
        return values;
    }
}

// dots[4 * i + corner] += over the channels: gradient of the sample of pixel i, times the corner's value.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ void add_dots(A (&dots)[16], const Params& p, const Layout& l, const T* input,
                                         const A* grad_samples, const MaskedSample<A>* samples, int begin,
                                         int count) {
    const auto source = [&](int i, int corner) { return input + samples[i].element(p, corner) + begin; };
    if (l.vector) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto grads = load_pack<4>(grad_samples + i * DataTiles<T>::kSampleStride);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                const auto values = load_four(source(i, corner), samples[i].has(corner));
                A& dot = dots[4 * i + corner];
                dot += grads.values[0] * values.values[0] + grads.values[1] * values.values[1] +
                       (grads.values[2] * values.values[2] + grads.values[3] * values.values[3]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (samples[i / 4].has(i % 4))
#pragma unroll 1
                for (int c = 0; c < min(count, 4); ++c)
                    dots[i] += grad_samples[i / 4 * DataTiles<T>::kSampleStride + c] *
                               widen(source(i / 4, i % 4)[c]);
    }
}

// Sums `count` values over the lanes that differ in `lanes` and in the bits below it, of which there are as
// many values: every turn halves the values and the lanes that hold them. The lane whose bits are i gets that
// of values[i].
template <int count, class A>
__device__ __forceinline__ A halving_sum(A (&values)[count], int lanes) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int turn = 1; turn < count; turn *= 2) {
        const int half = count / 2 / turn, step = lanes / turn;
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < count / 2; ++i)
            if (i < half)
                values[i] = (upper ? values[half + i] : values[i]) +
                            shuffle_xor(upper ? values[i] : values[half + i], step);
    }
    return values[0];
}

// Writes grad_offset and grad_mask of four samples, with all lanes of the warp: lane 4 i + corner of 16 has
// the dot of sample i. `index`: of the sample in [N, Ho, Wo, D, K]; `t` has both gradients.
template <class Tensors, class A>
__device__ __forceinline__ void write_position(A dot, const Tensors& t, const MaskedSample<A>& sample,
                                               bool exists, int64_t index) {
    const int corner = threadIdx.x % 4;
    if (!sample.has(corner)) dot = 0;  // it has read zeros, but the gradient may be NaN
    const A along_y = sample.along_y(corner), along_x = sample.along_x(corner);
    const A of_y = warp_sum<4>((corner & 2 ? dot : -dot) * along_x * sample.mask);
    const A of_x = warp_sum<4>((corner & 1 ? dot : -dot) * along_y * sample.mask);
    const A of_mask = warp_sum<4>(dot * along_y * along_x);
    if (!exists) return;
    if (corner < 2 && t.grad_offset) t.grad_offset[2 * index + corner] = corner ? of_x : of_y;
    if (corner == 2 && t.grad_mask) t.grad_mask[index] = of_mask;
}

// Spreads the gradient of the samples over their corners. Neighbours often share two corners, the right ones
// of one being the left ones of the next: these are added together.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ void spread(const ScatteredSums<A>& sums, const Params& p, const Layout& l,
                                       const A* grad_samples, const MaskedSample<A>* samples, int begin,
                                       int count) {
    Pack<A, 4> right[2]{};   // what the right corners of the pixel before still have to get
    unsigned right_has = 0;  // which of them are in the image, as bits of left corners
    int64_t right_corner = 0;
    const int scale = sums.scale();
#pragma unroll 1
    for (int i = 0; i <= 4; ++i) {
        const bool last = i == 4;
        const MaskedSample<A> sample = last ? MaskedSample<A>{} : samples[i];
        const auto grads = load_pack<4>(grad_samples + (last ? 0 : i) * DataTiles<T>::kSampleStride);
        const bool shared = (sample.inside & 0b0101) == right_has && sample.corner == right_corner;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int64_t below = row * p.width * p.channels + begin;
            const A along = sample.along_y(2 * row) * sample.mask;
            const A to_left = along * (1 - sample.x), to_right = along * sample.x;
            const bool pending = right_has >> 2 * row & 1;
            if (pending && !shared) sums.add(right_corner + below, right[row], count, l.vector, scale);
            Pack<A, 4> left;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                left.values[c] = to_left * grads.values[c];
                if (pending && shared) left.values[c] += right[row].values[c];
                right[row].values[c] = to_right * grads.values[c];
            }
            if (sample.has(2 * row)) sums.add(sample.corner + below, left, count, l.vector, scale);
        }
        right_has = sample.inside >> 1 & 0b0101;
        right_corner = sample.corner + p.channels;
    }
}

// A block makes, for its pixels and positions, the gradient of the samples slice by slice, as the product
// grad [pixels, Co/G] @ weight [Co/G, slice]. From there half a warp has four pixels: it sums the products
// with the corners over all slices of the offset group, and spreads the gradient over the corners.
template <class T, bool tensor_cores>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    backward_data(const Params p, const Layout l, const Backward<T> t,
                  const ScatteredSums<Accumulate<T>> sums, const int block_positions) {
    using A = Accumulate<T>;
    using Tiles = DataTiles<T>;
    auto& tiles = *shared_memory<Tiles>();
    const int64_t first_pixel = int64_t(blockIdx.x) * kPixels;
    const int first_position = int(blockIdx.y) * block_positions;
    const int end = min(first_position + block_positions, l.positions);
    const bool wants_position = t.grad_offset || t.grad_mask, wants_input = sums.floating || sums.exact.parts;
    const int own = int(threadIdx.x) / 16 * 4, channel = int(threadIdx.x) % 16 * 4;
    const A* own_grad = tiles.grad_samples + own * Tiles::kSampleStride + channel;

    ChunkQueue<T> queue(l, t.weight, first_position, end);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) queue.copy_next(p, l, t, tiles, first_pixel);
    Product<T, tensor_cores, kPixels> product;
    for (int position = first_position; position < queue.end; ++position) {
        constexpr int batch = kThreads / kPixels;
        const int in_batch = (position - first_position) % batch;
        const MaskedSample<A>* samples = tiles.samples[in_batch];
        A dots[16]{};
        for (int i = 0; i < l.offset_slices; ++i) {
            const Slice slice(l, position / l.taps * l.offset_slices + i);
            product.clear();
            for (int chunk = 0; chunk < l.chunks; ++chunk) {
                cp_async_wait<kStages - 2>();
                __syncthreads();  // the chunk is complete, and the one before is done with
                queue.copy_next(p, l, t, tiles, first_pixel);  // comes back to the stage of this chunk
                if (i == 0 && chunk == 0 && in_batch == 0) {
                    const int ahead = int(threadIdx.x) / kPixels, pixel = threadIdx.x % kPixels;
                    if (position + ahead < queue.end)
                        tiles.samples[ahead][pixel] =
                            locate_masked(p, l, t, first_pixel + pixel, position + ahead);
                }
                product.template multiply<false, kDepth<T>, Tiles::kGradStride, Tiles::kWeightStride>(
                    tiles.grad[queue.grad_slot(l, slice.group, chunk, queue.stage)],
                    tiles.weight[queue.stage]);
            }
            product.visit([&](int row, int column, A first, A second) {
                store_pack(tiles.grad_samples + row * Tiles::kSampleStride + column,
                           Pack<A, 2>{first, second});
            });
            __syncthreads();
            const int count = slice.count - channel;
            if (count > 0 && wants_position)
                add_dots<T>(dots, p, l, t.input, own_grad, samples + own, slice.begin + channel, count);
            if (count > 0 && wants_input)
                spread<T>(sums, p, l, own_grad, samples + own, slice.begin + channel, count);
        }
        if (wants_position) {
            const int row = own + int(threadIdx.x) % 16 / 4;
            write_position(halving_sum(dots, 8), t, samples[row], first_pixel + row < l.pixels,
                           (first_pixel + row) * l.positions + position);
        }
    }
}

// ---- gradients of weight and bias: from parts of the pixels, which are added in order

constexpr int kStep = 32;  // pixels of a step

template <class T, int rows>
struct WeightTiles {
    static constexpr int kGradStride = rows + kPadDown<T>, kSampleStride = kColumns + kPadDown<T>;

    T grad[2][kStep * kGradStride];                    // [pixel, output channel]
    T sampled[2][kStep * kSampleStride];               // [pixel, input channel]
    MaskedSample<Accumulate<T>> samples[2][kThreads];  // of the pixels of kThreads / kStep steps
};

// A sample of `size` channels, zero from `count` on, one after another.
template <int size, class T, class A>
__device__ __forceinline__ void sample_singly(const Params& p, const MaskedSample<A>& sample,
                                              const A (&weights)[4], const T* input, int count, T* target) {
#pragma unroll 1
    for (int c = 0; c < size; ++c) {
        A sum = 0;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
            if (sample.has(corner) && c < count)
                sum += weights[corner] * widen(input[sample.element(p, corner) + c]);
        target[c] = narrow(sum, T{});
    }
}

// A block makes grad^T [rows, pixels] @ samples [pixels, slice] of one tap for a part of the pixels. While
// one step is multiplied, the corners of the next are under way to registers.
template <class T, bool tensor_cores, int rows>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    backward_weight(const Params p, const Layout l, const Backward<T> t, Accumulate<T>* parts,
                    const int part_steps) {
    using A = Accumulate<T>;
    using Tiles = WeightTiles<T, rows>;
    constexpr int size = 16 / sizeof(T), turns = kStep * kColumns / size / kThreads;
    auto& tiles = *shared_memory<Tiles>();
    const Slice slice(l, int(blockIdx.x) % l.slices);
    const int tap = int(blockIdx.x) / l.slices, position = slice.begin / l.offset_channels * l.taps + tap;
    const int first_row = int(blockIdx.y) * rows;
    const int64_t out = int64_t(slice.group) * l.group_out + first_row;
    const int64_t first_pixel = int64_t(blockIdx.z) * part_steps * kStep;
    const int steps = int(min(int64_t(part_steps), (l.pixels - first_pixel + kStep - 1) / kStep));

    constexpr int batch = kThreads / kStep;
    const auto locate_batch = [&](int number) {
        tiles.samples[number % 2][threadIdx.x] =
            locate_masked(p, l, t, first_pixel + int64_t(number) * kThreads + threadIdx.x, position);
    };
    const auto sample_at = [&](int step, int pixel) -> const MaskedSample<A>& {
        return tiles.samples[step / batch % 2][step % batch * kStep + pixel];
    };
    const auto copy_grad = [&](int step) {
        const int64_t pixel = first_pixel + int64_t(step) * kStep;
        load_tile<kStep, rows, Tiles::kGradStride>(
            tiles.grad[step % 2], t.grad + pixel * p.out_channels + out, p.out_channels,
            int(min(int64_t(kStep), l.pixels - pixel)), l.group_out - first_row, l.vector);
        cp_async_commit();
    };
    // a thread has `size` channels of a pixel in each turn; without l.vector nothing is read ahead
    const int own = int(threadIdx.x) / (kColumns / size), channel = threadIdx.x % (kColumns / size) * size;
    const int count = slice.count - channel;
    const T* input = t.input + slice.begin + channel;
    uint4 values[turns][4];
    const auto gather = [&](int step) {
        if (!l.vector) return;
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            const MaskedSample<A>& sample = sample_at(step, own + turn * (kStep / turns));
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                values[turn][corner] = make_uint4(0, 0, 0, 0);
                if (sample.has(corner) && count > 0)
                    values[turn][corner] = load_16(input + sample.element(p, corner));
            }
        }
    };
    const auto combine = [&](int step) {
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            const int pixel = own + turn * (kStep / turns);
            const MaskedSample<A>& sample = sample_at(step, pixel);
            T* target = tiles.sampled[step % 2] + pixel * Tiles::kSampleStride + channel;
            A weights[4];
            sample.weights(weights, sample.mask);
            if (l.vector) {
                *reinterpret_cast<uint4*>(target) = weighted_sum<false>(values[turn], weights, T{});
            } else {
                sample_singly<size>(p, sample, weights, input, count, target);
            }
        }
    };

    Product<T, tensor_cores, rows> product;
    if (steps > 0) {
        locate_batch(0);
        copy_grad(0);
        __syncthreads();
        gather(0);
        combine(0);
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<0>();
        __syncthreads();  // grad and samples of this step are complete
        const bool more = step + 1 < steps;
        if (step % batch == batch / 2) locate_batch(step / batch + 1);
        if (more) {
            copy_grad(step + 1);
            gather(step + 1);
        }
        product.template multiply<true, kStep, Tiles::kGradStride, Tiles::kSampleStride>(
            tiles.grad[step % 2], tiles.sampled[step % 2]);
        if (more) combine(step + 1);
    }

    A* part = parts + blockIdx.z * l.weights + slice.begin - slice.group * l.group_channels;
    product.visit([&](int row, int column, A first, A second) {
        if (first_row + row >= l.group_out) return;
        A* target = part + ((out + row) * l.taps + tap) * l.group_channels + column;
        if (column < slice.count) target[0] = first;
        if (column + 1 < slice.count) target[1] = second;
    });
}

// parts[blockIdx.y] [Co]: the sum of a part of the pixels; 32 channels by 8 pixels at a time.
template <class T>
__global__ void backward_bias(const T* grad, int64_t pixels, int channels, Accumulate<T>* parts) {
    auto* sums = shared_memory<Accumulate<T>>();
    const int channel = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
    const int64_t begin = pixels * blockIdx.y / gridDim.y, end = pixels * (blockIdx.y + 1) / gridDim.y;
    Accumulate<T> sum = 0;
    if (channel < channels)
        for (int64_t pixel = begin + threadIdx.x / 32; pixel < end; pixel += kThreads / 32)
            sum += widen(grad[pixel * channels + channel]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || channel >= channels) return;
    for (int i = 32; i < kThreads; i += 32) sum += sums[threadIdx.x + i];
    parts[int64_t(blockIdx.y) * channels + channel] = sum;
}

// ---- host

// Blocks enough to keep a device busy. The parts of weight and bias, and so the workspace and the order of
// sums, depend on the sizes alone.
template <class T>
struct BackwardGrids {
    int weight_rows;  // of a product: all output channels, if they fit, so that samples are taken once
    int block_positions, part_steps;
    dim3 data, weight, bias;

    BackwardGrids(const Params& p, const Layout& l) {
        const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
        // what each part of `size` gets, where `others` times the parts make so many blocks
        const auto share = [&](int64_t size, int64_t least, int64_t blocks, int64_t others) {
            const int64_t parts = std::max<int64_t>(blocks / std::max<int64_t>(others, 1), 1);
            return std::max(ceil_div(size, parts), least);
        };
        constexpr int two_waves = 512;  // of blocks on a large device, two to a multiprocessor
        data = grid(ceil_div(l.pixels, kPixels));
        block_positions = int(share(l.positions, 1, 8 * multiprocessors(), data.x));
        data.y = unsigned(ceil_div(l.positions, block_positions));

        const int64_t steps = ceil_div(l.pixels, kStep);
        weight_rows = sizeof(T) == 2 && l.group_out > 64 ? 256 : 64;
        weight = grid(int64_t(l.taps) * l.slices);
        weight.y = unsigned(ceil_div(l.group_out, weight_rows));
        part_steps = int(share(steps, 4, two_waves, int64_t(weight.x) * weight.y));
        weight.z = unsigned(std::max<int64_t>(ceil_div(steps, part_steps), 1));

        bias = grid(ceil_div(p.out_channels, 32));
        bias.y = unsigned(ceil_div(l.pixels, share(l.pixels, 64, two_waves, bias.x)));
        bias.y = std::max(bias.y, 1u);
    }
};

template <class T>
void launch_data(const Params& p, const Layout& l, const Backward<T>& t, const BackwardGrids<T>& grids,
                 void* workspace, void* stream) {
    using A = Accumulate<T>;
    ScatteredSums<A> sums{};
    sums.exact.elements = l.elements;
    if (t.grad_input && p.deterministic) {
        sums.exact.factors = t.mask ? 3 : 2;
        sums.exact.log_terms = ceil_log2(p.out_height * p.out_width * l.taps);
        sums.exact.log_products = ceil_log2(l.group_out);
        sums.exact.place(workspace);
        clear("deform_conv2d: clear", workspace, ExactSums<A>::bytes(l.elements), stream);
        const auto find = [&](const auto* values, int64_t count, int64_t width, int64_t row_step,
                              int factor) {
            find_exponent("deform_conv2d: find_exponent", values, count, width, row_step,
                          sums.exact.exponents + factor, stream);
        };
        find(t.grad, l.pixels * p.out_channels, p.out_channels, p.out_channels, 0);
        find(t.weight, l.weights, l.weights, l.weights, 1);
        if (t.mask) find(t.mask, l.pixels * l.positions, l.positions, p.mask_step, 2);
    } else if (t.grad_input) {
        sums.floating = static_cast<A*>(std::is_same_v<T, A> ? t.grad_input : workspace);
        clear("deform_conv2d: clear", sums.floating, l.elements * int64_t(sizeof(A)), stream);
    }
    const auto run = [&](auto kernel) {
        launch("deform_conv2d: backward_data", kernel, grids.data, kThreads, sizeof(DataTiles<T>), stream, p,
               l, t, sums, grids.block_positions);
    };
    if constexpr (std::is_same_v<T, double>)
        run(NASFAST_KERNEL(backward_data<T, false>));
    else if constexpr (std::is_same_v<T, float>)
        p.tf32 ? run(NASFAST_KERNEL(backward_data<T, true>)) : run(NASFAST_KERNEL(backward_data<T, false>));
    else
        run(NASFAST_KERNEL(backward_data<T, true>));
    if (t.grad_input && static_cast<void*>(t.grad_input) != sums.floating)
        launch("deform_conv2d: finish_sums", NASFAST_KERNEL(finish_sums<T, A>), element_grid(l.elements),
               kElementThreads, 0, stream, sums, t.grad_input);
}

template <class T>
void launch_weight(const Params& p, const Layout& l, const Backward<T>& t, const BackwardGrids<T>& grids,
                   void* workspace, void* stream) {
    const int parts = int(grids.weight.z);
    auto* sums = parts > 1 ? static_cast<Accumulate<T>*>(workspace) : t.grad_weight;
    const auto run = [&](auto kernel, auto tiles) {
        launch("deform_conv2d: backward_weight", kernel, grids.weight, kThreads, sizeof(*tiles), stream, p, l,
               t, sums, grids.part_steps);
    };
    constexpr WeightTiles<T, 64>* tiles = nullptr;
    if constexpr (std::is_same_v<T, double>) {
        run(NASFAST_KERNEL(backward_weight<T, false, 64>), tiles);
    } else if constexpr (std::is_same_v<T, float>) {
        p.tf32 ? run(NASFAST_KERNEL(backward_weight<T, true, 64>), tiles)
               : run(NASFAST_KERNEL(backward_weight<T, false, 64>), tiles);
    } else if (grids.weight_rows == 64) {
        run(NASFAST_KERNEL(backward_weight<T, true, 64>), tiles);
    } else {
        run(NASFAST_KERNEL(backward_weight<T, true, 256>), static_cast<WeightTiles<T, 256>*>(nullptr));
    }
    if (parts > 1) add_parts("deform_conv2d: add_parts", sums, parts, l.weights, t.grad_weight, stream);
}

template <class T>
void launch_bias(const Params& p, const Layout& l, const Backward<T>& t, const BackwardGrids<T>& grids,
                 void* workspace, void* stream) {
    auto* sums = static_cast<Accumulate<T>*>(workspace);
    launch("deform_conv2d: backward_bias", NASFAST_KERNEL(backward_bias<T>), grids.bias, kThreads,
           kThreads * sizeof(Accumulate<T>), stream, t.grad, l.pixels, int(p.out_channels), sums);
    add_parts("deform_conv2d: add_parts", sums, int(grids.bias.y), p.out_channels, t.grad_bias, stream);
}

template <class T>
void backward(const Params& p, const Backward<T>& t, void* workspace, void* stream) {
    check_sizes(p);
    const Layout l(p, t);
    const BackwardGrids<T> grids(p, l);
    if (t.grad_input || t.grad_offset || t.grad_mask) launch_data(p, l, t, grids, workspace, stream);
    if (t.grad_weight) launch_weight(p, l, t, grids, workspace, stream);
    if (t.grad_bias) launch_bias(p, l, t, grids, workspace, stream);
}

// The gradients use the workspace one after another.
template <class T>
int64_t backward_workspace(const Params& p) {
    using A = Accumulate<T>;
    check_sizes(p);
    const Layout l(p, Backward<T>{});
    const BackwardGrids<T> grids(p, l);
    int64_t input = 0, weights = 0;
    if (p.deterministic)
        input = ExactSums<A>::bytes(l.elements);
    else if (!std::is_same_v<T, A>)
        input = l.elements * int64_t(sizeof(A));
    if (grids.weight.z > 1) weights = grids.weight.z * l.weights * int64_t(sizeof(A));
    return std::max({input, weights, grids.bias.y * p.out_channels * int64_t(sizeof(A))});
}

}  // namespace nasfast::deform_conv2d::cuda
