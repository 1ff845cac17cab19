// Gradients of deform_conv2d on CUDA: the kernels, and the host code that launches them.
//
// A slice is a run of at most 64 input channels inside one group and one offset group; a position is a pair
// (offset group, tap). Sums have a fixed order everywhere but in grad_input, where blocks meet:
// floating-point atomics add in the order in which they come. Params::deterministic adds there in 64-bit
// fixed point instead, which is exact and so has no order.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "common/cuda_kernel.cuh"
#include "deform_conv2d/deform_conv2d_cuda.h"
#include "deform_conv2d/deform_conv2d_sample.cuh"

namespace nasfast::deform_conv2d::cuda::gradients {

constexpr int kThreads = 256;
constexpr int kTile = 64;            // pixels of a block of backward_data; columns of every product
constexpr int kStages = 3;           // chunks under way in backward_data
constexpr int kWeightDepth = 32;     // pixels per step of backward_weight
constexpr int kWeightBlocks = 1024;  // wanted of backward_weight: two or more for every multiprocessor
constexpr int kDataBlocks = 1024;    // wanted of backward_data

// Sizes that the kernels derive from Params.
struct Layout {
    int64_t pixels;  // N * Ho * Wo
    int taps, positions;
    int group_channels, group_out;              // of one group: C / G and Co / G
    int offset_channels;                        // of one offset group: C / D
    int segment;                                // channels that share group and offset group
    int segment_slices, offset_slices, slices;  // slices in a segment, an offset group, all channels
    bool vector;                                // rows of channels may be read 16 bytes at a time
};

struct Slice {
    int begin, count;  // channels
    int group;
};

__device__ __forceinline__ Slice slice_at(const Layout& l, int index) {
    const int offset = index % l.segment_slices * kTile;
    const int begin = index / l.segment_slices * l.segment + offset;
    return {begin, min(kTile, l.segment - offset), begin / l.group_channels};
}

// A sample and its factor, 0 where the sample does not count.
template <class A>
struct MaskedSample : Sample<A> {
    A mask;

    __device__ __forceinline__ bool has(int corner) const { return this->inside >> corner & 1; }
    __device__ __forceinline__ A along_y(int corner) const { return corner & 2 ? this->y : 1 - this->y; }
    __device__ __forceinline__ A along_x(int corner) const { return corner & 1 ? this->x : 1 - this->x; }
};

template <class T, class A = Accumulate<T>>
__device__ __forceinline__ MaskedSample<A> locate(const Params& p, const Layout& l, const Backward<T>& t,
                                                  int64_t pixel, int position) {
    const int d = position / l.taps, tap = position % l.taps;
    const Sample<A> sample = cuda::locate(p, t.offset, pixel, d, tap);
    return {sample, sample.inside ? mask_at(p, t.mask, pixel, d, tap) : 0};
}

// Neighbours in memory that are read or written at once.
template <class T, int count>
struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Pack {
    T values[count];
};

// The first `count` values at `source`, then zeros; `vector` as in Layout.
template <int size, class T>
__device__ __forceinline__ Pack<T, size> load_pack(const T* source, int count, bool vector) {
    if (vector && count >= size) return *reinterpret_cast<const Pack<T, size>*>(source);
    Pack<T, size> pack{};
    if (!vector) {
#pragma unroll
        for (int i = 0; i < size; ++i)
            if (i < count) pack.values[i] = source[i];
    }
    return pack;
}

// shared[r * stride + c] = source[r * source_step + c], zero where r >= rows or c >= columns. Seen after
// cp_async_commit, cp_async_wait and a barrier.
template <int all_rows, int all_columns, int stride, class T>
__device__ __forceinline__ void load_tile(T* shared, const T* source, int64_t source_step, int rows,
                                          int columns, bool vector) {
    constexpr int size = 16 / sizeof(T), per_row = all_columns / size;
    static_assert(all_rows * per_row % kThreads == 0);
#pragma unroll
    for (int i = 0; i < all_rows * per_row / kThreads; ++i) {
        const int index = int(threadIdx.x) + i * kThreads;
        const int row = index / per_row, column = index % per_row * size;
        const bool valid = row < rows && column < columns;
        T* target = shared + row * stride + column;
        const T* from = valid ? source + row * source_step + column : source;
        if (vector) {
            cp_async_16(target, from, valid);
        } else {
            *reinterpret_cast<Pack<T, size>*>(target) =
                load_pack<size>(from, valid ? columns - column : 0, false);
        }
    }
}

// ---- products of shared tiles
// Product<...>: what a thread holds of a [rows, kTile] matrix of the block. multiply adds a @ b, where a is
// [rows, depth], or [depth, rows] if a_by_depth, and b is [depth, kTile]. visit calls f(row, column, value,
// value at column + 1) for each pair.

// Elements after each row of a tile that spread its columns over the banks: read by ldmatrix or as rows of
// floats, and read as columns of floats.
template <class T>
constexpr int kRowPad = 16 / sizeof(T);
template <class T>
constexpr int kColumnPad = (std::is_same_v<T, float> ? 32 : 16) / sizeof(T);

template <class T, int rows>
struct TensorCoreProduct {
    static constexpr int kWarpsDown = rows == 64 ? 2 : 4, kWarpsAcross = kThreads / 32 / kWarpsDown;
    static constexpr int kDown = rows / kWarpsDown / 16, kAcross = kTile / kWarpsAcross / 8;  // mma of a warp
    static constexpr int kStep = 32 / sizeof(T);  // depth of an mma
    static_assert(kAcross % 2 == 0);

    float sums[kDown][kAcross][4];

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static int row() { return int(threadIdx.x) / 32 % kWarpsDown * (kDown * 16); }
    __device__ __forceinline__ static int column() {
        return int(threadIdx.x) / 32 / kWarpsDown * (kAcross * 8);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kDown * kAcross * 4; ++i) (&sums[0][0][0])[i] = 0;
    }

    // a [16, kStep] from (row, k)
    template <bool a_by_depth, int stride>
    __device__ __forceinline__ static void load_a(uint32_t (&words)[4], const T* a, int row, int k) {
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = row + lane() / 4 + i % 2 * 8, c = k + lane() % 4 + i / 2 * 4;
                words[i] = to_tf32(a_by_depth ? a[c * stride + r] : a[r * stride + c]);
            }
        } else {
            const int matrix = lane() / 8, line = lane() % 8;
            const int across = matrix % 2 * 8, deep = matrix / 2 * 8;
            if constexpr (a_by_depth)
                ldmatrix_x4_trans(words, a + (k + deep + line) * stride + row + across);
            else
                ldmatrix_x4(words, a + (row + across + line) * stride + k + deep);
        }
    }

    // b [kStep, 16] from (k, column), as two operands of 8 columns
    template <int stride>
    __device__ __forceinline__ static void load_b(uint32_t (&words)[2][2], const T* b, int k, int column) {
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i / 2][i % 2] =
                    to_tf32(b[(k + lane() % 4 + i % 2 * 4) * stride + column + lane() / 4 + i / 2 * 8]);
        } else {
            const int matrix = lane() / 8, line = lane() % 8;
            uint32_t loaded[4];
            ldmatrix_x4_trans(loaded, b + (k + matrix % 2 * 8 + line) * stride + column + matrix / 2 * 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i / 2][i % 2] = loaded[i];
        }
    }

    template <bool a_by_depth, int depth, int a_stride, int b_stride>
    __device__ __forceinline__ void multiply(const T* a, const T* b) {
#pragma unroll
        for (int k = 0; k < depth; k += kStep) {
            uint32_t right[kAcross / 2][2][2];
#pragma unroll
            for (int j = 0; j < kAcross / 2; ++j) load_b<b_stride>(right[j], b, k, column() + j * 16);
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
                uint32_t left[4];
                load_a<a_by_depth, a_stride>(left, a, row() + i * 16, k);
#pragma unroll
                for (int j = 0; j < kAcross; ++j) mma(sums[i][j], left, right[j / 2][j % 2], T{});
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(F f) const {
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    f(row() + i * 16 + half * 8 + lane() / 4, column() + j * 8 + lane() % 4 * 2,
                      sums[i][j][2 * half], sums[i][j][2 * half + 1]);
    }
};

template <class T, int rows>
struct PlainProduct {
    static constexpr int kDown = rows / 16, kAcross = kTile / 16;

    T sums[kDown][kAcross];

    __device__ __forceinline__ static int row() { return int(threadIdx.x) / 16 * kDown; }
    __device__ __forceinline__ static int column() { return int(threadIdx.x) % 16 * kAcross; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kDown * kAcross; ++i) (&sums[0][0])[i] = 0;
    }

    template <bool a_by_depth, int depth, int a_stride, int b_stride>
    __device__ __forceinline__ void multiply(const T* a, const T* b) {
#pragma unroll 4
        for (int k = 0; k < depth; ++k) {
            const auto right = *reinterpret_cast<const Pack<T, kAcross>*>(b + k * b_stride + column());
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
                const T left = a_by_depth ? a[k * a_stride + row() + i] : a[(row() + i) * a_stride + k];
#pragma unroll
                for (int j = 0; j < kAcross; ++j) sums[i][j] += left * right.values[j];
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(F f) const {
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; j += 2) f(row() + i, column() + j, sums[i][j], sums[i][j + 1]);
    }
};

template <class T, bool tensor_cores, int rows>
using Product = std::conditional_t<tensor_cores, TensorCoreProduct<T, rows>, PlainProduct<T, rows>>;

// ---- where grad_input is summed

// An exponent e says that every finite value of a tensor is below 2^(e - kExponentBias).
constexpr int kExponentBias = 1023;

// value = (high + low * 2^-low_bits) * 2^-high_bits, high and low being the sums of integers. float has no
// low part: its 62 bits reach from the largest sum there can be to below float's own rounding of it.
template <class A>
struct FixedPoint {
    static constexpr int kParts = std::is_same_v<A, double> ? 2 : 1;

    unsigned long long* parts;  // [kParts, elements]; null: sums in floating point
    uint32_t* not_finite;       // a bit per element that is to become NaN
    const unsigned* exponents;  // [factors]
    int factors;                // grad, weight and, where there is one, mask
    int64_t elements;           // N * H * W * C
    int log_terms;              // terms of a sum: at most 2^log_terms
    int log_products;           // products in a term: at most 2^log_products

    // Powers of two that bring a sum of any order below 2^62.
    __device__ __forceinline__ double high_scale() const {
        int exponent = log_terms + log_products;
        for (int i = 0; i < factors; ++i) exponent += int(exponents[i]) - kExponentBias;
        return ldexp(1.0, 62 - min(max(exponent, -900), 1084));
    }
    __device__ __forceinline__ double low_scale() const { return ldexp(1.0, 62 - log_terms); }

    __device__ __forceinline__ void add(int64_t index, double value, double scale) const {
        if (!isfinite(value)) {
            atomic_or(not_finite + index / 32, 1u << index % 32);
            return;
        }
        const double scaled = value * scale, high = rint(scaled);
        atomic_add(parts + index, static_cast<unsigned long long>(int64_t(high)));
        if (kParts == 2)
            atomic_add(parts + elements + index,
                       static_cast<unsigned long long>(int64_t(rint((scaled - high) * low_scale()))));
    }

    __device__ __forceinline__ double read(int64_t index, double scale) const {
        if (not_finite[index / 32] >> index % 32 & 1) return nan("");
        double value = double(int64_t(parts[index]));
        if (kParts == 2) value += double(int64_t(parts[elements + index])) / low_scale();
        return value / scale;
    }
};

template <class A>
struct InputSums {
    A* floating;  // [N, H, W, C]
    FixedPoint<A> fixed;

    __device__ __forceinline__ explicit operator bool() const { return floating || fixed.parts; }

    __device__ __forceinline__ void add(int64_t index, const Pack<A, 4>& value, int count, bool vector,
                                        double scale) const {
        if (fixed.parts) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < count) fixed.add(index + i, value.values[i], scale);
            return;
        }
        if constexpr (std::is_same_v<A, float>) {
            if (vector) {
                const auto& [x, y, z, w] = value.values;
                atomic_add(floating + index, make_float4(x, y, z, w));
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) atomic_add(floating + index + i, value.values[i]);
    }
};

// ---- gradients of input, offset and mask

// Shared memory of backward_data.
template <class T>
struct DataTiles {
    using A = Accumulate<T>;
    static constexpr int kDepth = 128 / sizeof(T);  // output channels of a chunk
    static constexpr int kGradStride = kDepth + kRowPad<T>, kWeightStride = kTile + kColumnPad<T>;
    static constexpr int kColumnStride = kTile + 8;  // spreads the pairs of a product over the banks
    static constexpr int kGradSlots = sizeof(T) == 8 ? kStages : 4;

    T grad[kGradSlots][kTile * kGradStride];       // [pixel, output channel]
    T weight[kStages][kDepth * kWeightStride];     // [output channel, input channel]
    alignas(16) A columns[kTile * kColumnStride];  // gradient of the samples: [pixel, input channel]
    MaskedSample<A> samples[2][kTile];
};

// A block makes, for its pixels and positions, the gradient of the samples slice by slice:
// grad [pixels, Co/G] @ weight [Co/G, slice], fed in chunks of output channels. Half a warp then takes four
// neighbouring pixels, a lane four channels: it reads the corners to sum, over all channels of the offset
// group, the products with the gradient, and spreads the gradient over the corners. Neighbours that share
// corners, as they do where offsets are smooth, add to memory together.
template <class T, bool tensor_cores>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    backward_data(const Params p, const Layout l, const Backward<T> t, const InputSums<Accumulate<T>> sums) {
    using A = Accumulate<T>;
    using Tiles = DataTiles<T>;
    auto& tiles = *shared_memory<Tiles>();
    const int64_t first = int64_t(blockIdx.x) * kTile;
    const int rows = int(min(int64_t(kTile), l.pixels - first));
    const int begin = int(int64_t(l.positions) * blockIdx.y / gridDim.y);
    const int end = int(int64_t(l.positions) * (blockIdx.y + 1) / gridDim.y);
    const int chunks = (l.group_out + Tiles::kDepth - 1) / Tiles::kDepth;
    const bool keep_grad = int(p.groups) * chunks <= Tiles::kGradSlots;  // each chunk of grad has its slot
    const bool wants_position = t.grad_offset || t.grad_mask;
    const double scale = sums.fixed.parts ? sums.fixed.high_scale() : 1;

    struct Step {
        int position, slice, chunk, stage;  // slice: in the offset group
    };
    const auto advance = [&](Step& step) {
        step.stage = step.stage + 1 < kStages ? step.stage + 1 : 0;
        if (++step.chunk < chunks) return;
        step.chunk = 0;
        if (++step.slice < l.offset_slices) return;
        step.slice = 0;
        ++step.position;
    };
    const auto channels = [&](const Step& step) {
        return slice_at(l, step.position / l.taps * l.offset_slices + step.slice);
    };
    const auto grad_slot = [&](const Step& step, int group) {
        return tiles.grad[keep_grad ? group * chunks + step.chunk : step.stage];
    };

    Step ahead{begin, 0, 0, 0};
    unsigned kept = 0;  // slots that are loaded for good
    const auto fetch = [&] {
        if (ahead.position < end) {
            const Slice slice = channels(ahead);
            const int out = ahead.chunk * Tiles::kDepth, depth = l.group_out - out;
            const int64_t channel = int64_t(slice.group) * l.group_out + out;
            load_tile<Tiles::kDepth, kTile, Tiles::kWeightStride>(
                tiles.weight[ahead.stage],
                t.weight + (channel * l.taps + ahead.position % l.taps) * l.group_channels +
                    slice.begin % l.group_channels,
                int64_t(l.taps) * l.group_channels, depth, slice.count, l.vector);
            const unsigned bit = keep_grad ? 1u << (slice.group * chunks + ahead.chunk) : 0;
            if (!(kept & bit))
                load_tile<kTile, Tiles::kDepth, Tiles::kGradStride>(grad_slot(ahead, slice.group),
                                                                    t.grad + first * p.out_channels + channel,
                                                                    p.out_channels, rows, depth, l.vector);
            kept |= bit;
            advance(ahead);
        }
        cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) fetch();

    const int lane = threadIdx.x % 16, pixel = int(threadIdx.x) / 16 * 4, channel = lane * 4;
    Product<T, tensor_cores, kTile> product;
    A dots[16];  // of pixel + i / 4 and corner i % 4: gradient of the sample times the corner's value
    for (Step step{begin, 0, 0, 0}; step.position < end; advance(step)) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the chunk is here; the one before, whose stage is free now, is done
        fetch();
        const Slice slice = channels(step);
        MaskedSample<A>* samples = tiles.samples[step.position % 2];
        if (step.chunk == 0) {
            product.clear();
            if (step.slice == 0) {
                const int i = threadIdx.x;
                if (i < kTile)
                    samples[i] = i < rows ? locate(p, l, t, first + i, step.position) : MaskedSample<A>{};
#pragma unroll
                for (A& dot : dots) dot = 0;
            }
        }
        product.template multiply<false, Tiles::kDepth, Tiles::kGradStride, Tiles::kWeightStride>(
            grad_slot(step, slice.group), tiles.weight[step.stage]);
        if (step.chunk + 1 < chunks) continue;

        product.visit([&](int row, int column, A a, A b) {
            *reinterpret_cast<Pack<A, 2>*>(tiles.columns + row * Tiles::kColumnStride + column) = {a, b};
        });
        __syncthreads();
        const int count = slice.count - channel;
        const auto gradient = [&](int i) {
            return *reinterpret_cast<const Pack<A, 4>*>(tiles.columns + (pixel + i) * Tiles::kColumnStride +
                                                        channel);
        };
        if (wants_position && count > 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const MaskedSample<A>& sample = samples[pixel + i];
                const Pack<A, 4> grad = gradient(i);
#pragma unroll
                for (int corner = 0; corner < 4; ++corner) {
                    if (!sample.has(corner)) continue;
                    const auto value =
                        load_pack<4>(t.input + (sample.corner + corner_step(p, corner)) * p.channels +
                                         slice.begin + channel,
                                     count, l.vector);
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (c < count) dots[4 * i + corner] += grad.values[c] * widen(value.values[c]);
                }
            }
        }
        if (sums && count > 0) {
            Pack<A, 4> right[2]{};   // of the pixel before: what its right corners still have to get
            unsigned right_has = 0;  // which of them, as bits of the left corners of the next
            int64_t right_corner = 0;
            const auto add = [&](int64_t corner, int row, const Pack<A, 4>& value) {
                sums.add((corner + row * p.width) * p.channels + slice.begin + channel, value, count,
                         l.vector, scale);
            };
#pragma unroll 1
            for (int i = 0; i <= 4; ++i) {
                const MaskedSample<A> sample = i < 4 ? samples[pixel + i] : MaskedSample<A>{};
                const Pack<A, 4> grad = i < 4 ? gradient(i) : Pack<A, 4>{};
                const unsigned left_has = sample.inside & 0b0101;
                const bool shared = left_has == right_has && sample.corner == right_corner;
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const A along = sample.along_y(2 * row) * sample.mask;
                    const A left_weight = along * (1 - sample.x), right_weight = along * sample.x;
                    const bool pending = right_has >> 2 * row & 1;
                    if (pending && !shared) add(right_corner, row, right[row]);
                    Pack<A, 4> left;
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        left.values[c] = left_weight * grad.values[c];
                        if (pending && shared) left.values[c] += right[row].values[c];
                        right[row].values[c] = right_weight * grad.values[c];
                    }
                    if (sample.has(2 * row)) add(sample.corner, row, left);
                }
                right_has = sample.inside >> 1 & 0b0101;
                right_corner = sample.corner + 1;
            }
        }
        if (wants_position && step.slice + 1 == l.offset_slices) {
            // sums over the 16 lanes: every step halves the values and the lanes that hold them
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const int half = 8 >> step;
                const bool upper = lane & half;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (i < half)
                        dots[i] = (upper ? dots[half + i] : dots[i]) +
                                  shuffle_xor(upper ? dots[i] : dots[half + i], half);
            }
            const int row = pixel + lane / 4, corner = lane % 4;  // of dots[0] now
            const MaskedSample<A>& sample = samples[row];
            const A along_y = sample.along_y(corner), along_x = sample.along_x(corner), dot = dots[0];
            const A of_y = warp_sum<4>((corner / 2 ? dot : -dot) * along_x * sample.mask);
            const A of_x = warp_sum<4>((corner % 2 ? dot : -dot) * along_y * sample.mask);
            const A of_mask = warp_sum<4>(dot * along_y * along_x);
            if (row < rows) {
                const int64_t index = (first + row) * l.positions + step.position;
                if (corner < 2 && t.grad_offset) t.grad_offset[2 * index + corner] = corner ? of_x : of_y;
                if (corner == 2 && t.grad_mask) t.grad_mask[index] = of_mask;
            }
        }
    }
}

// ---- gradients of weight and bias: parts of the pixels, summed in order at the end

template <class T, int rows>
struct WeightTiles {
    static constexpr int kGradStride = rows + kColumnPad<T>, kColumnStride = kTile + kColumnPad<T>;

    T grad[2][kWeightDepth * kGradStride];       // [pixel, output channel]
    T columns[2][kWeightDepth * kColumnStride];  // samples: [pixel, input channel]
    MaskedSample<Accumulate<T>> samples[2][kWeightDepth];
};

// A block makes grad^T [rows, pixels] @ columns [pixels, slice] of one tap for its part of the pixels. While
// the product of a step is computed, the corners of the next are on their way to the registers.
template <class T, bool tensor_cores, int rows>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    backward_weight(const Params p, const Layout l, const Backward<T> t, Accumulate<T>* parts) {
    using A = Accumulate<T>;
    using Tiles = WeightTiles<T, rows>;
    constexpr int kSize = 16 / sizeof(T), kItems = kWeightDepth * kTile / kSize / kThreads;
    auto& tiles = *shared_memory<Tiles>();
    const Slice slice = slice_at(l, int(blockIdx.x) % l.slices);
    const int tap = int(blockIdx.x) / l.slices, position = slice.begin / l.offset_channels * l.taps + tap;
    const int out = int(blockIdx.y) * rows;
    const int64_t steps = (l.pixels + kWeightDepth - 1) / kWeightDepth;
    const int64_t begin = steps * blockIdx.z / gridDim.z, end = steps * (blockIdx.z + 1) / gridDim.z;

    const auto locate_step = [&](int64_t step) {
        const int i = threadIdx.x;
        if (i >= kWeightDepth || step >= end) return;
        const int64_t pixel = step * kWeightDepth + i;
        tiles.samples[step % 2][i] = pixel < l.pixels ? locate(p, l, t, pixel, position) : MaskedSample<A>{};
    };
    const auto fetch_grad = [&](int64_t step) {
        const int64_t pixel = step * kWeightDepth;
        load_tile<kWeightDepth, rows, Tiles::kGradStride>(
            tiles.grad[step % 2], t.grad + pixel * p.out_channels + int64_t(slice.group) * l.group_out + out,
            p.out_channels, int(min(int64_t(kWeightDepth), l.pixels - pixel)), l.group_out - out, l.vector);
        cp_async_commit();
    };
    Pack<T, kSize> corners[kItems][4];
    const auto item_pixel = [](int item) { return (int(threadIdx.x) + item * kThreads) / (kTile / kSize); };
    const int channel = threadIdx.x % (kTile / kSize) * kSize;
    const auto gather = [&](int64_t step) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const MaskedSample<A>& sample = tiles.samples[step % 2][item_pixel(item)];
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
                corners[item][corner] = load_pack<kSize>(
                    t.input + (sample.corner + corner_step(p, corner)) * p.channels + slice.begin + channel,
                    sample.has(corner) ? slice.count - channel : 0, l.vector);
        }
    };
    const auto combine = [&](int64_t step) {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const MaskedSample<A>& sample = tiles.samples[step % 2][item_pixel(item)];
            A weights[4];
            sample.weights(weights, sample.mask);
            Pack<T, kSize> column;
#pragma unroll
            for (int c = 0; c < kSize; ++c) {
                A sum = 0;
#pragma unroll
                for (int corner = 0; corner < 4; ++corner)
                    sum += weights[corner] * widen(corners[item][corner].values[c]);
                column.values[c] = narrow(sum, T{});
            }
            *reinterpret_cast<Pack<T, kSize>*>(tiles.columns[step % 2] +
                                               item_pixel(item) * Tiles::kColumnStride + channel) = column;
        }
    };

    Product<T, tensor_cores, rows> product;
    product.clear();
    if (begin < end) {
        locate_step(begin);
        fetch_grad(begin);
        __syncthreads();
        gather(begin);
        locate_step(begin + 1);
        combine(begin);
        cp_async_wait<0>();
    }
    for (int64_t step = begin; step < end; ++step) {
        __syncthreads();  // columns and grad of this step and samples of the next are here
        const bool more = step + 1 < end;
        if (more) {
            fetch_grad(step + 1);
            gather(step + 1);
            locate_step(step + 2);
        }
        product.template multiply<true, kWeightDepth, Tiles::kGradStride, Tiles::kColumnStride>(
            tiles.grad[step % 2], tiles.columns[step % 2]);
        if (more) combine(step + 1);
        cp_async_wait<0>();
    }

    A* part = parts + blockIdx.z * (p.out_channels * l.taps * l.group_channels);
    product.visit([&](int row, int column, A a, A b) {
        if (out + row >= l.group_out) return;
        const int64_t channel = int64_t(slice.group) * l.group_out + out + row;
        A* target = part + (channel * l.taps + tap) * l.group_channels + slice.begin % l.group_channels;
        if (column < slice.count) target[column] = a;
        if (column + 1 < slice.count) target[column + 1] = b;
    });
}

// parts[blockIdx.y] [Co]: sums of grad over a part of the pixels; 32 channels by 8 pixels at a time.
template <class T>
__global__ void backward_bias(const T* grad, int64_t pixels, int channels, Accumulate<T>* parts) {
    using A = Accumulate<T>;
    A* sums = shared_memory<A>();
    const int channel = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
    const int64_t begin = pixels * blockIdx.y / gridDim.y, end = pixels * (blockIdx.y + 1) / gridDim.y;
    A sum = 0;
    if (channel < channels)
        for (int64_t pixel = begin + threadIdx.x / 32; pixel < end; pixel += kThreads / 32)
            sum += widen(grad[pixel * channels + channel]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || channel >= channels) return;
    for (int i = 32; i < kThreads; i += 32) sum += sums[threadIdx.x + i];
    parts[int64_t(blockIdx.y) * channels + channel] = sum;
}

// ---- small kernels, a thread per element in turn

__device__ __forceinline__ int64_t first_element() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t element_step() { return int64_t(gridDim.x) * kThreads; }

// result [count] = sum of parts [number, count]
template <class A>
__global__ void add_parts(const A* parts, int number, int64_t count, A* result) {
    for (int64_t i = first_element(); i < count; i += element_step()) {
        A sum = 0;
        for (int part = 0; part < number; ++part) sum += parts[part * count + i];
        result[i] = sum;
    }
}

template <class Word>
__global__ void clear(Word* words, int64_t count) {
    for (int64_t i = first_element(); i < count; i += element_step()) words[i] = 0;
}

// Raises *exponent (FixedPoint::exponents) to that of the largest finite value of rows [count / width,
// width].
template <class T>
__global__ void find_exponent(const T* values, int64_t count, int64_t width, int64_t row_step,
                              unsigned* exponent) {
    unsigned largest = 0;
    for (int64_t i = first_element(); i < count; i += element_step()) {
        const double value = widen(values[i / width * row_step + i % width]);
        if (value != 0 && isfinite(value)) largest = max(largest, unsigned(ilogb(value) + 1 + kExponentBias));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = max(largest, shuffle_xor(largest, step));
    if (threadIdx.x % 32 == 0 && largest > 0) atomic_max(exponent, largest);
}

template <class T>
__global__ void finish_input(const InputSums<Accumulate<T>> sums, T* grad_input) {
    const double scale = sums.fixed.parts ? sums.fixed.high_scale() : 1;
    for (int64_t i = first_element(); i < sums.fixed.elements; i += element_step())
        grad_input[i] =
            narrow(sums.fixed.parts ? Accumulate<T>(sums.fixed.read(i, scale)) : sums.floating[i], T{});
}

// ---- host

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
inline int ceil_log2(int64_t value) {
    int result = 0;
    while (int64_t(1) << result < value) ++result;
    return result;
}

inline Layout layout(const Params& p) {
    Layout l{};
    l.pixels = p.batch * p.out_height * p.out_width;
    l.taps = int(p.kernel_h * p.kernel_w);
    l.positions = int(p.offset_groups) * l.taps;
    l.group_channels = int(p.channels / p.groups);
    l.group_out = int(p.out_channels / p.groups);
    l.offset_channels = int(p.channels / p.offset_groups);
    l.segment = std::gcd(l.group_channels, l.offset_channels);
    l.segment_slices = int(ceil_div(l.segment, kTile));
    l.offset_slices = l.offset_channels / l.segment * l.segment_slices;
    l.slices = l.offset_slices * int(p.offset_groups);
    return l;
}

template <class T>
bool allows_vectors(const Layout& l, const Backward<T>& t) {
    constexpr int size = std::max<int>(16 / sizeof(T), 4);
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return l.segment % size == 0 && l.group_channels % size == 0 && l.group_out % size == 0 &&
           aligned(t.grad) && aligned(t.input) && aligned(t.weight) && aligned(t.grad_input);
}

// Rows of the product of backward_weight: all output channels, if they fit, so that samples are taken once.
template <class T>
int weight_rows(const Layout& l) {
    return sizeof(T) == 2 && l.group_out > 128 ? 256 : 64;
}

template <class T>
dim3 weight_grid(const Params& p, const Layout& l) {
    const int64_t x = int64_t(l.taps) * l.slices, y = ceil_div(l.group_out, weight_rows<T>(l));
    const int64_t most = std::max<int64_t>(l.pixels / (4 * kWeightDepth), 1);  // a part has at least 4 steps
    static_cast<void>(p);
    return dim3(unsigned(x), unsigned(y), unsigned(std::min(ceil_div(kWeightBlocks, x * y), most)));
}

inline dim3 bias_grid(const Params& p, const Layout& l) {
    const int64_t most = std::max<int64_t>(l.pixels / 64, 1);
    return dim3(unsigned(ceil_div(p.out_channels, 32)), unsigned(std::min<int64_t>(most, 256)));
}

inline dim3 element_grid(int64_t count) {
    return dim3(unsigned(std::min<int64_t>(ceil_div(count, kThreads), 4096)));
}

// Places in the workspace; grad_input, weight and bias use it one after another.
template <class T>
struct Workspace {
    using A = Accumulate<T>;
    int64_t floating = 0, parts = 0, flags = 0, exponents = 0, input_bytes = 0;  // offsets of grad_input's
    int64_t weight_bytes = 0, bias_bytes = 0;

    Workspace(const Params& p, const Layout& l) {
        const int64_t elements = p.batch * p.height * p.width * p.channels;
        if (p.deterministic) {
            flags = aligned(elements * FixedPoint<A>::kParts * int64_t(sizeof(uint64_t)));
            exponents = flags + aligned(ceil_div(elements, 32) * int64_t(sizeof(uint32_t)));
            input_bytes = exponents + aligned(3 * sizeof(unsigned));
        } else if (!std::is_same_v<T, A>) {
            input_bytes = aligned(elements * int64_t(sizeof(A)));
        }
        const dim3 grid = weight_grid<T>(p, l);
        const int64_t weights = p.out_channels * l.taps * l.group_channels;
        if (grid.z > 1) weight_bytes = grid.z * weights * int64_t(sizeof(A));
        bias_bytes = bias_grid(p, l).y * p.out_channels * int64_t(sizeof(A));
    }

    int64_t bytes() const { return std::max({input_bytes, weight_bytes, bias_bytes}); }
};

inline void launch_clear(void* memory, int64_t bytes, void* stream) {
    const int64_t words = bytes / int64_t(sizeof(uint32_t));
    launch("deform_conv2d: clear", clear<uint32_t>, element_grid(words), kThreads, 0, stream,
           static_cast<uint32_t*>(memory), words);
}

template <class T>
void launch_data(const Params& p, const Layout& l, const Backward<T>& t, char* workspace, void* stream) {
    using A = Accumulate<T>;
    const Workspace<T> places(p, l);
    const int64_t elements = p.batch * p.height * p.width * p.channels;
    InputSums<A> sums{};
    sums.fixed.elements = elements;
    if (t.grad_input && p.deterministic) {
        auto* exponents = reinterpret_cast<unsigned*>(workspace + places.exponents);
        sums.fixed.parts = reinterpret_cast<unsigned long long*>(workspace);
        sums.fixed.not_finite = reinterpret_cast<uint32_t*>(workspace + places.flags);
        sums.fixed.exponents = exponents;
        sums.fixed.factors = t.mask ? 3 : 2;
        sums.fixed.log_terms = ceil_log2(p.out_height * p.out_width * l.taps);
        sums.fixed.log_products = ceil_log2(l.group_out);
        launch_clear(workspace, places.input_bytes, stream);
        const auto find = [&](const auto* values, int64_t count, int64_t width, int64_t step, int index) {
            using V = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
            launch("deform_conv2d: find_exponent", find_exponent<V>, element_grid(count), kThreads, 0, stream,
                   values, count, width, step, exponents + index);
        };
        const int64_t grads = l.pixels * p.out_channels, weights = p.out_channels * l.taps * l.group_channels;
        find(t.grad, grads, p.out_channels, p.out_channels, 0);
        find(t.weight, weights, weights, weights, 1);
        if (t.mask) find(t.mask, l.pixels * l.positions, l.positions, p.mask_step, 2);
    } else if (t.grad_input) {
        sums.floating =
            std::is_same_v<T, A> ? reinterpret_cast<A*>(t.grad_input) : reinterpret_cast<A*>(workspace);
        launch_clear(sums.floating, elements * int64_t(sizeof(A)), stream);
    }
    const int64_t tiles = ceil_div(l.pixels, kTile);
    const int64_t splits = std::min<int64_t>(ceil_div(kDataBlocks, std::max<int64_t>(tiles, 1)), l.positions);
    const auto run = [&](auto kernel) {
        launch("deform_conv2d: backward_data", kernel, dim3(unsigned(tiles), unsigned(splits)), kThreads,
               sizeof(DataTiles<T>), stream, p, l, t, sums);
    };
    if constexpr (std::is_same_v<T, double>)
        run(backward_data<T, false>);
    else if constexpr (std::is_same_v<T, float>)
        p.tf32 ? run(backward_data<T, true>) : run(backward_data<T, false>);
    else
        run(backward_data<T, true>);
    if (t.grad_input && (p.deterministic || !std::is_same_v<T, A>))
        launch("deform_conv2d: finish_input", finish_input<T>, element_grid(elements), kThreads, 0, stream,
               sums, t.grad_input);
}

template <class T>
void launch_weight(const Params& p, const Layout& l, const Backward<T>& t, char* workspace, void* stream) {
    using A = Accumulate<T>;
    const dim3 grid = weight_grid<T>(p, l);
    A* parts = grid.z > 1 ? reinterpret_cast<A*>(workspace) : t.grad_weight;
    const auto run = [&](auto kernel, int64_t shared_bytes) {
        launch("deform_conv2d: backward_weight", kernel, grid, kThreads, shared_bytes, stream, p, l, t,
               parts);
    };
    if constexpr (std::is_same_v<T, double>) {
        run(backward_weight<T, false, 64>, sizeof(WeightTiles<T, 64>));
    } else if constexpr (std::is_same_v<T, float>) {
        p.tf32 ? run(backward_weight<T, true, 64>, sizeof(WeightTiles<T, 64>))
               : run(backward_weight<T, false, 64>, sizeof(WeightTiles<T, 64>));
    } else {
        weight_rows<T>(l) == 64 ? run(backward_weight<T, true, 64>, sizeof(WeightTiles<T, 64>))
                                : run(backward_weight<T, true, 256>, sizeof(WeightTiles<T, 256>));
    }
    const int64_t weights = p.out_channels * l.taps * l.group_channels;
    if (grid.z > 1)
        launch("deform_conv2d: add_parts", add_parts<A>, element_grid(weights), kThreads, 0, stream, parts,
               int(grid.z), weights, t.grad_weight);
}

template <class T>
void launch_bias(const Params& p, const Layout& l, const Backward<T>& t, char* workspace, void* stream) {
    using A = Accumulate<T>;
    const dim3 grid = bias_grid(p, l);
    A* parts = reinterpret_cast<A*>(workspace);
    launch("deform_conv2d: backward_bias", backward_bias<T>, grid, kThreads, kThreads * sizeof(A), stream,
           t.grad, l.pixels, int(p.out_channels), parts);
    launch("deform_conv2d: add_parts", add_parts<A>, element_grid(p.out_channels), kThreads, 0, stream, parts,
           int(grid.y), p.out_channels, t.grad_bias);
}

}  // namespace nasfast::deform_conv2d::cuda::gradients

namespace nasfast::deform_conv2d::cuda {

inline int64_t backward_workspace(DType dtype, const Params& p) {
    using namespace gradients;
    const Layout l = layout(p);
    switch (dtype) {
        case DType::float64:
            return Workspace<double>(p, l).bytes();
        case DType::float32:
            return Workspace<float>(p, l).bytes();
        default:
            return Workspace<bfloat16>(p, l).bytes();  // and float16
    }
}

template <class T>
void backward(const Params& p, const Backward<T>& t, void* workspace, void* stream) {
    using namespace gradients;
    Layout l = layout(p);
    l.vector = allows_vectors(l, t);
    char* memory = static_cast<char*>(workspace);
    if (t.grad_input || t.grad_offset || t.grad_mask) launch_data(p, l, t, memory, stream);
    if (t.grad_weight) launch_weight(p, l, t, memory, stream);
    if (t.grad_bias) launch_bias(p, l, t, memory, stream);
}

}  // namespace nasfast::deform_conv2d::cuda
