// The convolutions of the forward pass and of the gradient of the input: sums [pixels, columns] over sources,
// each a padded map times a packed kernel. A block has a rectangle of pixels and up to kTileColumns columns.
// It copies the rectangle with its border to shared memory, where a row of the left matrix is read at the
// place of its tap: no column is ever built.
#pragma once

#include "common/cuda_tensor_tile.cuh"
#include "mixed_op/mixed_op_maps.cuh"

namespace nasfast::mixed_op::cuda {

constexpr int kTileColumns = 64;

// Blocks that a multiprocessor must hold, of those that use tensor cores.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTensorBlocks = 3;  // the compiler wants more registers here
#else
constexpr int kTensorBlocks = 4;
#endif

// Sums of a tile by tensor cores. A warp has two rows of 16 pixels, and all columns.
template <class T_>
struct TensorConvolution : TensorTile<2, kTileColumns / 8> {
    using T = T_;
    static constexpr bool words = true;  // of packed kernels
    static constexpr int blocks = kTensorBlocks;

    // Adds `steps` steps. The chunk of step s, half h of pixel (y, x) lies in shared memory at
    // (y * across + x) * stride + offsets[2 * s + h]; offset -1: at `zero`. `eights`: of columns.
    __device__ __forceinline__ void multiply(const uint4* shared, int across, int stride, const int* offsets,
                                             int zero, int steps, const uint4* kernel, int columns,
                                             int eights) {
        const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 2;
        const int first = (row * across + lane % 16) * stride, second = first + across * stride;
        auto* right = reinterpret_cast<const uint2*>(kernel) + lane;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int offset = offsets[2 * step + lane / 16];
            uint32_t left[2][4];
            ldmatrix_x4(left[0], shared + (offset < 0 ? zero : first + offset));
            ldmatrix_x4(left[1], shared + (offset < 0 ? zero : second + offset));
#pragma unroll
            for (int n = 0; n < kTileColumns / 8; ++n) {
                if (n >= eights) continue;
                const uint2 pair = right[n * 32];
                const uint32_t of_eight[2] = {pair.x, pair.y};
                mma(sums[0][n], left[0], of_eight, T());
                mma(sums[1][n], left[1], of_eight, T());
            }
            right += columns * 4;
        }
    }

    // values[pixel * stride + column] of `eights` times 8 columns.
    __device__ __forceinline__ void store(float* values, int stride, int eights) const {
        float* const own = values + int(threadIdx.x) / 32 * 32 * stride;
        this->visit_warp(
            [&](int row, int column, float first, float second) {
                own[row * stride + column] = first;
                own[row * stride + column + 1] = second;
            },
            eights);
    }
};

// The same without tensor cores. A thread has 8 neighbouring pixels, and every eighth column.
template <class T_>
struct PlainConvolution {
    using T = T_;
    static constexpr bool words = false;
    static constexpr int blocks = sizeof(T) == 8 ? 2 : 3;
    T sums[8][kTileColumns / 8] = {};

    __device__ __forceinline__ void multiply(const uint4* shared, int across, int stride, const int* offsets,
                                             int /*zero*/, int steps, const uint4* kernel, int columns,
                                             int eights) {
        const uint4* pixels =
            shared + (int(threadIdx.x) / 16 * across + int(threadIdx.x) / 8 % 2 * 8) * stride;
        kernel += threadIdx.x % 8 * 2;
#pragma unroll 1
        for (int i = 0; i < 2 * steps; ++i) {
            const int offset = offsets[i];
            if (offset < 0) break;  // the last
            Chunk<T> left[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) left[k] = as_chunk<T>(pixels[k * stride + offset]);
            const uint4* right = kernel + int64_t(i / 2) * columns * 2 + i % 2;
#pragma unroll
            for (int n = 0; n < kTileColumns / 8; ++n) {
                if (n >= eights) continue;
                const auto of_column = as_chunk<T>(right[n * 16]);
#pragma unroll
                for (int k = 0; k < 8; ++k)
#pragma unroll
                    for (int e = 0; e < Chunk<T>::size; ++e)
                        sums[k][n] += left[k].values[e] * of_column.values[e];
            }
        }
    }

    __device__ __forceinline__ void store(T* values, int stride, int eights) const {
        const int pixel = int(threadIdx.x) / 8 * 8;
#pragma unroll
        for (int k = 0; k < 8; ++k)
#pragma unroll
            for (int n = 0; n < kTileColumns / 8; ++n)
                if (n < eights) values[(pixel + k) * stride + n * 8 + threadIdx.x % 8] = sums[k][n];
    }
};

// A padded map and its packed kernel. Sampled: the taps of a deformable convolution.
template <class T>
struct Source {
    using A = Accumulate<T>;
    const uint4* map;     // [N, H, W, chunks]
    const uint4* kernel;  // [steps, columns] of 32 bytes
    Depth depth;
    int dilation;
    const A* offset;  // [N, H, W, D * 27]; null: not sampled
    int group_chunks;

    __host__ __device__ __forceinline__ int border() const {
        return depth.taps == kMergedTaps ? 2 : dilation;
    }
};

// One product of a launch. Sink: column(c).store(pixel, sum) writes a result and returns it, moments(tile, c)
// is where to write mean and sum of squared deviations of a tile, or null.
template <class T, class Sink>
struct Task {
    static constexpr int most = 4;
    Source<T> sources[most];
    int sources_count;
    int columns;   // of the result
    int of_block;  // columns of each block but the last
    Sink sink;

    void add(const Source<T>& source) { sources[sources_count++] = source; }
    int blocks() const { return (columns + of_block - 1) / of_block; }
};

constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }
inline int packed_columns(int columns) { return round_up(columns, 8); }

// Columns of a block: as many for each, in eights.
inline int block_columns(int columns) {
    const int blocks = std::max((columns + kTileColumns - 1) / kTileColumns, 1);
    return round_up((columns + blocks - 1) / blocks, 8);
}

// Odd numbers of chunks from pixel to pixel: eight of them that ldmatrix reads lie in different banks.
__host__ __device__ __forceinline__ int odd(int chunks) { return chunks | 1; }

// Chunks of shared memory that a source needs.
template <class T>
__host__ __device__ __forceinline__ int source_chunks(const Source<T>& source) {
    const int stride = odd(min(source.depth.chunks, kSegment)), border = 2 * source.border();
    return (source.offset ? 2 * kTilePixels : (kTileHeight + border) * (kTileWidth + border)) * stride;
}

constexpr int kMaxOffsets = kMergedTaps * kSegment + 1;  // of one run
constexpr int kOffsetChunks = (kMaxOffsets * int(sizeof(int)) + 15) / 16;

// Samples of the taps of a deformable convolution at this thread's pixel of a tile; zeros where there is
// none.
template <class T>
struct Sampler {
    using A = Accumulate<T>;
    using Sample = deform_conv2d::cuda::Sample<A>;
    const deform_conv2d::Params& geometry;
    const uint4* map;  // [N, H, W, chunks]
    int chunks, group_chunks;
    deform_conv2d::cuda::Place place;
    int64_t pixel;    // -1: there is none
    const A* offset;  // of the pixel
    int group = -1, tap = -1;
    Sample sample{};
    A mask = 0;

    __device__ __forceinline__ Sampler(const Layout& l, const deform_conv2d::Params& geometry,
                                       const uint4* map, int chunks, int group_chunks, const A* offset,
                                       const Layout::Place& tile)
        : geometry(geometry), map(map), chunks(chunks), group_chunks(group_chunks) {
        place = {tile.image, tile.y + int(threadIdx.x) / kTileWidth, tile.x + int(threadIdx.x) % kTileWidth};
        pixel = place.y < l.height && place.x < l.width ? l.pixel(tile, place.y, place.x) : -1;
        this->offset = offset + pixel * geometry.offset_step;
    }

    // To a tap of the offset group of a chunk.
    __device__ __forceinline__ void move(int to_tap, int chunk) {
        const int to_group = chunk / group_chunks;
        if (to_group == group && to_tap == tap) return;
        group = to_group;
        tap = to_tap;
        if (pixel < 0) return;
        const int at = group * kTaps + tap;
        sample = locate(geometry, offset + 2 * at, place, tap);
        mask = sample.inside ? offset[2 * kTaps * geometry.offset_groups + at] : 0;
    }
    __device__ __forceinline__ bool has(int corner) const { return sample.inside >> corner & 1; }
    // Index of a corner in [N, H, W].
    __device__ __forceinline__ int64_t corner(int i) const {
        return sample.corner + deform_conv2d::cuda::corner_step(geometry, i);
    }
    __device__ __forceinline__ void load(uint4 (&corners)[4], int chunk) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            corners[i] = load_16(map + (has(i) ? corner(i) * chunks + chunk : 0), has(i));
    }
    template <bool tf32>
    __device__ __forceinline__ uint4 at(int to_tap, int chunk) {
        move(to_tap, chunk);
        uint4 corners[4];
        load(corners, chunk);
        A weights[4];
        sample.weights(weights, mask);
        return deform_conv2d::cuda::weighted_sum<tf32>(corners, weights, T());
    }
};

// Copies chunks [first, first + count) of a rectangle of pixels from (y, x) on, zeros outside of the image.
__device__ __forceinline__ void copy_rectangle(uint4* shared, int stride, const uint4* map, int map_chunks,
                                               int first, int count, const Layout& l,
                                               const Layout::Place& place, int border) {
    const int across = kTileWidth + 2 * border, pixels = across * (kTileHeight + 2 * border);
    for (int at = threadIdx.x; at < pixels * count; at += kTileThreads) {
        const int pixel = at / count, chunk = at % count;
        const int y = place.y - border + pixel / across, x = place.x - border + pixel % across;
        const bool inside = y >= 0 && y < l.height && x >= 0 && x < l.width;
        const int64_t from = inside ? l.pixel(place, y, x) * map_chunks + first + chunk : 0;
        cp_async_16(shared + pixel * stride + chunk, map + from, inside);
    }
}

// Mean and sum of squared deviations of the tile's columns, by a thread for 16 pixels.
template <class A, class Sink>
__device__ __forceinline__ void write_moments(const A* values, int stride, A (*partial)[2], const Layout& l,
                                              const Layout::Place& place, int64_t tile, const Sink& sink,
                                              int first_column, int count) {
    const int row = int(threadIdx.x) / 16, lane = threadIdx.x % 16;
    const int across = min(kTileWidth, l.width - place.x), down = min(kTileHeight, l.height - place.y);
#pragma unroll 1
    for (int first = 0; first < count; first += 16) {
        const int column = first + lane;
        A mean = 0, deviation = 0;
        if (row < down && column < count) {
            const A* own = values + row * kTileWidth * stride + column;
            for (int x = 0; x < across; ++x) mean += own[x * stride];
            mean /= A(across);
            for (int x = 0; x < across; ++x) {
                const A difference = own[x * stride] - mean;
                deviation += difference * difference;
            }
        }
        partial[threadIdx.x][0] = mean;
        partial[threadIdx.x][1] = deviation;
        __syncthreads();
        A* target = row == 0 && column < count ? sink.moments(tile, first_column + column) : nullptr;
        if (target) {
            A of_rows = 0, sum = 0;
            for (int i = 0; i < down; ++i) of_rows += partial[i * 16 + lane][0];
            of_rows /= A(down);
            for (int i = 0; i < down; ++i) {
                const A difference = partial[i * 16 + lane][0] - of_rows;
                sum += partial[i * 16 + lane][1] + difference * difference * A(across);
            }
            target[0] = of_rows;
            target[1] = sum;
        }
        __syncthreads();
    }
}

template <class Tile, bool tf32, class Sink>
__device__ __forceinline__ void run_task(const Layout& l, const deform_conv2d::Params& geometry,
                                         const Task<typename Tile::T, Sink>& task, int block) {
    using T = typename Tile::T;
    using A = Accumulate<T>;
    auto* offsets = shared_memory<int>();                        // [kMaxOffsets]
    uint4* shared = shared_memory<uint4>() + kOffsetChunks + 1;  // after a chunk of zeros
    constexpr int zero = -1;
    const auto place = l.place(blockIdx.x);
    const int first_column = block * task.of_block;
    const int count = min(task.of_block, task.columns - first_column), eights = (count + 7) / 8;
    if (threadIdx.x == 0) shared[zero] = make_uint4(0, 0, 0, 0);

    Tile tile;
#pragma unroll 1
    for (int i = 0; i < task.sources_count; ++i) {
        const Source<T>& source = task.sources[i];
        const Depth& depth = source.depth;
        const int columns = (task.columns + 7) / 8 * 8, border = source.border();
        const int across = source.offset ? kTileWidth : kTileWidth + 2 * border;
        const uint4* kernel = source.kernel + first_column * 2;
#pragma unroll 1
        for (int segment = 0; segment < depth.segments(); ++segment) {
            const int chunks = depth.in_segment(segment), first_chunk = segment * kSegment;
            const int stride = odd(chunks), steps = depth.run_steps(segment);
            __syncthreads();  // what was there is multiplied
            for (int at = threadIdx.x; at < 2 * steps; at += kTileThreads) {
                const Shift shift = shift_of(depth.taps, source.dilation, at / chunks);
                const int pixel = source.offset ? 0 : (shift.y + border) * across + shift.x + border;
                offsets[at] = at < depth.run * chunks ? pixel * stride + at % chunks : -1;
            }
            if (source.offset) {
                Sampler<T> sampler(l, geometry, source.map, depth.chunks, source.group_chunks, source.offset,
                                   place);
#pragma unroll 1
                for (int tap = 0; tap < kTaps; ++tap) {
                    uint4* samples = shared + tap % 2 * kTilePixels * stride;
#pragma unroll 1
                    for (int chunk = 0; chunk < chunks; ++chunk)
                        samples[threadIdx.x * stride + chunk] =
                            sampler.template at<tf32>(tap, first_chunk + chunk);
                    __syncthreads();  // samples are there, those of the tap before may be overwritten
                    tile.multiply(samples, across, stride, offsets, int(shared - samples) + zero, steps,
                                  kernel, columns, eights);
                    kernel += int64_t(steps) * columns * 2;
                }
            } else {
                copy_rectangle(shared, stride, source.map, depth.chunks, first_chunk, chunks, l, place,
                               border);
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads();
                tile.multiply(shared, across, stride, offsets, zero, steps, kernel, columns, eights);
                kernel += int64_t(steps) * columns * 2;
            }
        }
    }

    __syncthreads();
    auto* values = reinterpret_cast<A*>(shared);  // [kTilePixels][stride]
    const int stride = eights * 8 | 1;
    tile.store(values, stride, eights);
    __syncthreads();
    // a thread keeps its column
    const int rows = kTileThreads / count, own = int(threadIdx.x) % count;
    if (int(threadIdx.x) / count < rows) {
        const auto column = task.sink.column(first_column + own);
        for (int pixel = int(threadIdx.x) / count; pixel < kTilePixels; pixel += rows) {
            const int y = place.y + pixel / kTileWidth, x = place.x + pixel % kTileWidth;
            if (y >= l.height || x >= l.width) continue;
            A& value = values[pixel * stride + own];
            value = column.store(l.pixel(place, y, x), value);
        }
    }
    if constexpr (Sink::has_moments) {
        __syncthreads();
        auto* partial = reinterpret_cast<A(*)[2]>(values + kTilePixels * stride);
        write_moments(values, stride, partial, l, place, blockIdx.x, task.sink, first_column, count);
    }
}

template <class T, class Sink>
struct Tasks {
    static constexpr int most = 2;
    Task<T, Sink> tasks[most];
    int count = 0;
};

template <class Tile, bool tf32, class Sink>
__global__ void __launch_bounds__(kTileThreads, Tile::blocks)
    product_kernel(const Layout l, const deform_conv2d::Params geometry,
                   const Tasks<typename Tile::T, Sink> tasks, const int first_blocks) {
    const int block = blockIdx.y;
    const bool second = block >= first_blocks;
    run_task<Tile, tf32>(l, geometry, tasks.tasks[second], second ? block - first_blocks : block);
}

// ---- host

// The deformable convolution of a padded map, as deform_conv2d sees it.
inline deform_conv2d::Params deform_params(const Params& p, int64_t channels) {
    deform_conv2d::Params d{};
    d.batch = p.batch;
    d.channels = d.out_channels = channels;
    d.height = d.out_height = p.height;
    d.width = d.out_width = p.width;
    d.kernel_h = d.kernel_w = 3;
    d.stride_h = d.stride_w = d.pad_h = d.pad_w = d.dilation_h = d.dilation_w = d.groups = 1;
    d.offset_groups = p.offset_groups;
    d.offset_step = d.mask_step = 3 * kTaps * p.offset_groups;
    d.weight_channels_last = 1;
    d.deterministic = p.deterministic;
    d.tf32 = p.tf32;
    return d;
}

// Calls f(TensorConvolution or PlainConvolution, whether it rounds to tf32).
template <class T, class F>
void with_tile(const Params& p, const F& f) {
    if constexpr (sizeof(T) == 2)
        f(static_cast<TensorConvolution<T>*>(nullptr), std::false_type());
    else if constexpr (sizeof(T) == 8)
        f(static_cast<PlainConvolution<T>*>(nullptr), std::false_type());
    else if (p.tf32)
        f(static_cast<TensorConvolution<T>*>(nullptr), std::true_type());
    else
        f(static_cast<PlainConvolution<T>*>(nullptr), std::false_type());
}

template <class T, class Sink>
void multiply(const Params& p, const Layout& l, const Tasks<T, Sink>& tasks, void* stream) {
    using A = Accumulate<T>;
    int64_t chunks = 0, results = 0;
    dim3 grid(unsigned(l.tiles), 0);
    for (int i = 0; i < tasks.count; ++i) {
        const auto& task = tasks.tasks[i];
        for (int s = 0; s < task.sources_count; ++s)
            chunks = std::max<int64_t>(chunks, source_chunks(task.sources[s]));
        int64_t values = int64_t(kTilePixels) * (task.of_block | 1);
        if (Sink::has_moments) values += kTileThreads * 2;
        results = std::max<int64_t>(results, values * int64_t(sizeof(A)));
        grid.y += unsigned(task.blocks());
    }
    if (grid.y == 0) return;
    const int64_t bytes = (kOffsetChunks + 1) * 16 + std::max(chunks * 16, results);
    with_tile<T>(p, [&](auto* tile, auto tf32) {
        launch("mixed_op: product",
               NASFAST_KERNEL(
                   product_kernel<std::remove_reference_t<decltype(*tile)>, decltype(tf32)::value, Sink>),
               grid, kTileThreads, bytes, stream, l, deform_params(p, l.padding.chunks * kElements<T>), tasks,
               tasks.tasks[0].blocks());
    });
}

template <class T>
void pack(const Params& p, const Packings<T>& packings, void* stream) {
    if (packings.count == 0) return;
    int64_t most = 0;
    for (int i = 0; i < packings.count; ++i)
        most = std::max<int64_t>(most, int64_t(packings.jobs[i].depth.steps()) * packings.jobs[i].columns);
    dim3 grid = element_grid(most);
    grid.y = unsigned(packings.count);
    with_tile<T>(p, [&](auto* tile, auto) {
        launch("mixed_op: pack",
               NASFAST_KERNEL(pack_kernel<T, std::remove_reference_t<decltype(*tile)>::words>), grid,
               kElementThreads, 0, stream, packings, int(p.channels), bool(p.tf32));
    });
}

}  // namespace nasfast::mixed_op::cuda
