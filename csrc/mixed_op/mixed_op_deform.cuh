// Backward through the samples of the deformable branch. A block has a rectangle of pixels and a row of taps.
// Tap by tap it makes the gradient of the samples, as a product of the raw map's gradient; from there a
// thread has one pixel: it multiplies with the corners, for the offset and the mask, and adds to the corners.
#pragma once

#include "mixed_op/mixed_op_product.cuh"

namespace nasfast::mixed_op::cuda {

template <class T>
struct DeformGradient {
    using A = Accumulate<T>;
    Source<T> source;  // the raw map's gradient, with the transposed kernel; padded columns
    int columns;       // of the kernel
    const uint4* map;  // [N, H, W, chunks], what is sampled
    Padding padding;   // of both maps
    const A* offset;   // [N, H, W, D * 27]
    T* logits;         // [N, H, W, padded D * 27], gradients of what the offset convolution gave
    Padding logit_padding;
    ScatteredSums<A> sums;  // [N, H, W, padded C], gradient of the map; or neither
};

constexpr int kTapsInRow = 3;

// Writes the gradients of the two offsets and the mask's logit, by products of the gradient with the corners.
template <bool tf32, class T, class A = Accumulate<T>>
__device__ __forceinline__ void write_logits(const DeformGradient<T>& job, const Sampler<T>& sampler,
                                             const A (&dots)[4]) {
    if (sampler.pixel < 0 || sampler.group < 0) return;
    A d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = sampler.has(i) ? dots[i] : 0;
    const A y = sampler.sample.y, x = sampler.sample.x, mask = sampler.mask;
    const A top = (1 - x) * d[0] + x * d[1], bottom = (1 - x) * d[2] + x * d[3];
    const A value = (1 - y) * top + y * bottom;
    const A results[3] = {mask * (bottom - top), mask * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2])),
                          value * mask * (1 - mask)};
    const int at = sampler.group * kTaps + sampler.tap, masks = job.logit_padding.channels / 3;
    T* target = job.logits + sampler.pixel * job.logit_padding.chunks * kElements<T>;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        A result = results[i];
        if constexpr (tf32) result = bits_to_float(to_tf32(result));
        target[i < 2 ? 2 * at + i : 2 * masks + at] = narrow(result, T());
    }
}

// Neighbouring lanes have neighbouring pixels, whose samples often share two corners, the right ones of one
// being the left ones of the next: the first then gives its terms to the second, which adds them together.
struct Neighbours {
    bool gives, takes;

    template <class T>
    __device__ __forceinline__ static Neighbours of(const Sampler<T>& sampler) {
        const int lane = threadIdx.x % 32;
        const auto& own = sampler.sample;
        const int64_t corner = shuffle(own.corner, lane - 1);
        const unsigned inside = shuffle(own.inside, lane - 1);
        const bool takes = lane % kTileWidth != 0 && own.inside && inside && corner + 1 == own.corner &&
                           (inside >> 1 & 0b0101) == (own.inside & 0b0101);
        return {bool(shuffle(int(takes), lane + 1)) && lane % kTileWidth != kTileWidth - 1, takes};
    }
};

// Adds weights[corner] * grad to the corners of a chunk of which `left` channels exist; by whole warps.
template <class T, class A = Accumulate<T>>
__device__ __forceinline__ void scatter(const DeformGradient<T>& job, const Sampler<T>& sampler,
                                        const Neighbours& neighbours, int chunk, const A* grad,
                                        const A (&weights)[4], int left, int scale) {
    constexpr int most = kElements<T> < 4 ? kElements<T> : 4;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < kElements<T>; first += most) {
        if (first >= left) continue;
        const int count = min(most, left - first);
#pragma unroll
        for (int row = 0; row < 4; row += 2) {
            Pack<A, 4> terms[2]{};
#pragma unroll
            for (int i = 0; i < most; ++i) {
                const A right = weights[row + 1] * grad[first + i];
                const A given = shuffle(right, lane - 1);
                terms[0].values[i] = weights[row] * grad[first + i] + (neighbours.takes ? given : 0);
                terms[1].values[i] = right;
            }
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool nothing =
                    side ? neighbours.gives || weights[row + 1] == 0 : weights[row] == 0 && !neighbours.takes;
                if (nothing || !sampler.has(row + side)) continue;
                const int64_t target = (sampler.corner(row + side) * sampler.chunks + chunk) * kElements<T>;
                job.sums.add(target + first, terms[side], count, most == 4, scale);
            }
        }
    }
}

template <class Tile, bool tf32>
__global__ void __launch_bounds__(kTileThreads, Tile::blocks)
    deform_kernel(const Layout l, const deform_conv2d::Params geometry,
                  const DeformGradient<typename Tile::T> job) {
    using T = typename Tile::T;
    using A = Accumulate<T>;
    constexpr int zero = -1, column_chunks = kTileColumns / kElements<T>;
    auto* offsets = shared_memory<int>();                      // [kMaxOffsets]
    uint4* grad = shared_memory<uint4>() + kOffsetChunks + 1;  // after a chunk of zeros
    const Depth& depth = job.source.depth;
    const int grad_stride = odd(min(depth.chunks, kSegment));
    auto* values = reinterpret_cast<A*>(grad + kTilePixels * grad_stride);  // [kTilePixels][stride]
    const auto place = l.place(blockIdx.x);
    const int chunks = job.padding.chunks, scale = job.sums.scale();
    if (threadIdx.x == 0) grad[zero] = make_uint4(0, 0, 0, 0);

    Sampler<T> sampler(l, geometry, job.map, chunks, job.padding.group_chunks, job.offset, place);
    if (blockIdx.y == 0 && sampler.pixel >= 0)  // what no position writes
        for (int c = job.logit_padding.channels; c < job.logit_padding.chunks * kElements<T>; ++c)
            job.logits[sampler.pixel * job.logit_padding.chunks * kElements<T> + c] = T{};
    bool copied = false;
#pragma unroll 1
    for (int tap = int(blockIdx.y) * kTapsInRow; tap < int(blockIdx.y + 1) * kTapsInRow; ++tap) {
        A dots[4] = {};
        Neighbours neighbours{};
#pragma unroll 1
        for (int first = 0; first < chunks; first += column_chunks) {
            const int count = min(column_chunks, chunks - first);
            const int columns = count * kElements<T>, eights = (columns + 7) / 8, stride = eights * 8 | 1;
            Tile tile;
#pragma unroll 1
            for (int segment = 0; segment < depth.segments(); ++segment) {
                const int in_segment = depth.in_segment(segment), steps = depth.run_steps(segment);
                __syncthreads();  // the gradients of the samples before are read
                if (!copied || depth.segments() > 1) {
                    copied = true;
                    copy_rectangle(grad, grad_stride, job.source.map, depth.chunks, segment * kSegment,
                                   in_segment, l, place, 0);
                    for (int i = threadIdx.x; i < 2 * steps; i += kTileThreads)
                        offsets[i] = i < in_segment ? i : -1;
                    cp_async_commit();
                    cp_async_wait<0>();
                    __syncthreads();
                }
                // the packed taps are turned around
                const int step = depth.first_step(segment) + (kTaps - 1 - tap) * steps;
                const uint4* kernel =
                    job.source.kernel + (int64_t(step) * job.columns + first * kElements<T>)*2;
                tile.multiply(grad, kTileWidth, grad_stride, offsets, zero, steps, kernel, job.columns,
                              eights);
            }
            tile.store(values, stride, eights);
            __syncthreads();
            const A* own = values + threadIdx.x * stride;
#pragma unroll 1
            for (int chunk = first; chunk < first + count; ++chunk, own += kElements<T>) {
                if (chunk % job.padding.group_chunks == 0) {
                    if (chunk) write_logits<tf32>(job, sampler, dots);
#pragma unroll
                    for (A& dot : dots) dot = 0;
                    sampler.move(tap, chunk);
                    neighbours = Neighbours::of(sampler);
                }
                uint4 corners[4];
                sampler.load(corners, chunk);
                A weights[4];
                sampler.sample.weights(weights, sampler.mask);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto values_of_corner = as_chunk<T>(corners[i]);
#pragma unroll
                    for (int e = 0; e < kElements<T>; ++e)
                        dots[i] += own[e] * widen(values_of_corner.values[e]);
                }
                if (job.sums.floating || job.sums.exact.parts)
                    scatter(job, sampler, neighbours, chunk, own, weights,
                            job.padding.group_channels - chunk % job.padding.group_chunks * kElements<T>,
                            scale);
            }
        }
        write_logits<tf32>(job, sampler, dots);
    }
}

template <class T>
void deform_gradient(const Params& p, const Layout& l, const DeformGradient<T>& job, void* stream) {
    using A = Accumulate<T>;
    const ScatteredSums<A>& sums = job.sums;
    if (sums.exact.parts) {
        clear("mixed_op: clear", sums.exact.parts, ExactSums<A>::bytes(sums.exact.elements), stream);
        const auto find = [&](const auto* values, int64_t count, int64_t width, int64_t row_step,
                              int factor) {
            find_exponent("mixed_op: find_exponent", values, count, width, row_step,
                          sums.exact.exponents + factor, stream);
        };
        const auto values_of = [](const uint4* chunks) { return reinterpret_cast<const T*>(chunks); };
        const int64_t of_map = l.pixels * job.padding.chunks * kElements<T>;
        const int64_t of_kernel = int64_t(job.source.depth.steps()) * job.columns * 2 * kElements<T>;
        find(values_of(job.source.map), of_map, of_map, of_map, 0);
        find(values_of(job.source.kernel), of_kernel, of_kernel, of_kernel, 1);
        find(job.offset + l.offsets / 3 * 2, l.pixels * (l.offsets / 3), l.offsets / 3, l.offsets, 2);
    } else if (sums.floating) {
        clear("mixed_op: clear", sums.floating, sums.exact.elements * int64_t(sizeof(A)), stream);
    }
    const int columns = std::min(packed_columns(job.columns), kTileColumns);
    const int64_t bytes =
        (kOffsetChunks + 1 + kTilePixels * odd(std::min(job.source.depth.chunks, kSegment))) * int64_t(16) +
        kTilePixels * (columns | 1) * int64_t(sizeof(A));
    with_tile<T>(p, [&](auto* tile, auto tf32) {
        launch("mixed_op: deform",
               NASFAST_KERNEL(deform_kernel<std::remove_reference_t<decltype(*tile)>, decltype(tf32)::value>),
               dim3(unsigned(l.tiles), kTaps / kTapsInRow), kTileThreads, bytes, stream, l,
               deform_params(p, job.padding.chunks * kElements<T>), job);
    });
}

}  // namespace nasfast::mixed_op::cuda
