// Gradients of the kernels of 3x3 convolutions: grad^T [rows, pixels] times the map at the taps' places
// [pixels, taps * channels]. A block has up to eight chunks of rows, some chunks of columns, and a part of
// the tiles of pixels; parts are added in order.
#pragma once

#include "mixed_op/mixed_op_product.cuh"

namespace nasfast::mixed_op::cuda {

// Sums of a block by tensor cores. A warp has all rows, and a quarter of the columns.
template <class T_>
struct TensorGradient : TensorTile<kSegment * kElements<T_> / 16, 4> {
    using T = T_;
    static constexpr int size = kElements<T>, row_tiles = kSegment * size / 16;  // of 16 rows
    static constexpr bool tf32 = size == 4;
    static constexpr int column_chunks = 128 / size, own = 32 / size;  // of a block; of a warp
    static constexpr int sampled_chunks = own;  // of a block that samples, which takes longer

    // Adds a tile of pixels. grad: chunk c of pixel i at i * grad_stride + c, `rows` chunks; map: column
    // chunk j of pixel (y, x) at (y * across + x) * stride + offsets[j].
    __device__ __forceinline__ void multiply(const uint4* grad, int grad_stride, int rows, const uint4* map,
                                             int across, int stride, const int* offsets) {
        const int lane = threadIdx.x % 32, first = int(threadIdx.x) / 32 * own;
        if constexpr (sizeof(T) == 2) {
            // lanes name the pixels of ldmatrix
            const int pixel = lane % 8 + lane / 8 % 2 * 8;
            const int left_pixel = lane % 8 + lane / 16 * 8, left_chunk = lane / 8 % 2;
            const int at[2] = {offsets[first + lane / 16], offsets[first + 2 + lane / 16]};
#pragma unroll 1
            for (int y = 0; y < kTileHeight; ++y) {
                uint32_t right[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    ldmatrix_x4_trans(right[j], map + (y * across + pixel) * stride + at[j]);
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    if (2 * m >= rows) continue;
                    uint32_t left[4];
                    const int chunk = min(2 * m + left_chunk, rows - 1);
                    ldmatrix_x4_trans(left, grad + (y * kTileWidth + left_pixel) * grad_stride + chunk);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const uint32_t of_eight[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
                        mma(this->sums[m][n], left, of_eight, T());
                    }
                }
            }
        } else {
            const auto* left_words = reinterpret_cast<const uint32_t*>(grad);
            const auto* right_words = reinterpret_cast<const uint32_t*>(map);
            int at[4];  // of the column that this lane reads of each eight
#pragma unroll
            for (int n = 0; n < 4; ++n) at[n] = offsets[first + 2 * n + lane / 16] * 4 + lane / 4 % 4;
#pragma unroll 1
            for (int k = 0; k < kTilePixels; k += 8) {
                const int pixel = k + lane % 4;
                uint32_t right[4][2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int own_pixel = pixel + half * 4;
                    const int place = (own_pixel / kTileWidth * across + own_pixel % kTileWidth) * stride * 4;
#pragma unroll
                    for (int n = 0; n < 4; ++n) right[n][half] = right_words[place + at[n]];
                }
#pragma unroll
                for (int m = 0; m < row_tiles; ++m) {
                    if (4 * m >= rows) continue;
                    uint32_t left[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = min(m * 16 + lane / 4 + i % 2 * 8, rows * 4 - 1);
                        left[i] = left_words[(pixel + i / 2 * 4) * grad_stride * 4 + row];
                    }
#pragma unroll
                    for (int n = 0; n < 4; ++n) mma(this->sums[m][n], left, right[n], T());
                }
            }
        }
    }

    // f(row, column chunk, element, sum)
    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
        const int chunk = int(threadIdx.x) / 32 * own;
        this->visit_warp([&](int row, int column, float first, float second) {
            f(row, chunk + column / size, column % size, first);
            f(row, chunk + (column + 1) / size, (column + 1) % size, second);
        });
    }
};

// The same without tensor cores. A thread has a chunk of rows, and two of columns.
template <class T_>
struct PlainGradient {
    using T = T_;
    static constexpr bool tf32 = false;
    static constexpr int size = kElements<T>, column_chunks = 32, sampled_chunks = 8;
    T sums[size][2][size] = {};

    __device__ __forceinline__ void multiply(const uint4* grad, int grad_stride, int rows, const uint4* map,
                                             int across, int stride, const int* offsets) {
        const int row = min(int(threadIdx.x) / 16, rows - 1);
        const int at[2] = {offsets[threadIdx.x % 16], offsets[threadIdx.x % 16 + 16]};
#pragma unroll 2
        for (int pixel = 0; pixel < kTilePixels; ++pixel) {
            const auto left = as_chunk<T>(grad[pixel * grad_stride + row]);
            const uint4* place = map + (pixel / kTileWidth * across + pixel % kTileWidth) * stride;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const auto right = as_chunk<T>(place[at[j]]);
#pragma unroll
                for (int i = 0; i < size; ++i)
#pragma unroll
                    for (int e = 0; e < size; ++e) sums[i][j][e] += left.values[i] * right.values[e];
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
#pragma unroll
        for (int i = 0; i < size; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < size; ++e)
                    f(int(threadIdx.x) / 16 * size + i, int(threadIdx.x) % 16 + j * 16, e, sums[i][j][e]);
    }
};

// The gradient of one kernel.
template <class A>
struct WeightTask {
    const uint4* grad;  // [N, H, W, rows.chunks]
    const uint4* map;   // [N, H, W, columns.chunks]
    Padding rows, columns;
    int of_block;     // chunks of columns
    const A* offset;  // [N, H, W, D * 27]; null: not sampled
    int dilation;     // of what is not
    int64_t start;    // of [rows, 3, 3, C] in a part
    int first_block;

    __host__ __device__ __forceinline__ Depth depth() const { return {columns.chunks, kTaps, kTaps}; }
    // Of columns, in a segment.
    __host__ __device__ __forceinline__ int column_blocks(int segment) const {
        return (kTaps * depth().in_segment(segment) + of_block - 1) / of_block;
    }
    __host__ __device__ __forceinline__ int all_column_blocks() const {
        const int last = depth().segments() - 1;
        return last * column_blocks(0) + column_blocks(last);
    }
    __host__ __device__ __forceinline__ int row_blocks() const {
        return (rows.chunks + kSegment - 1) / kSegment;
    }
};

template <class A>
struct WeightTasks {
    static constexpr int most = 6;
    WeightTask<A> tasks[most];
    int count = 0;
    int blocks = 0;    // of all tasks
    int64_t size = 0;  // of a part
    int parts = 0;
    int64_t part_tiles;  // of pixels

    // The place of its gradient in a part.
    int64_t add(const uint4* grad, const Padding& rows, const uint4* map, const Padding& columns,
                int dilation, const A* offset, int of_block) {
        const WeightTask<A> task{grad, map, rows, columns, of_block, offset, dilation, size, blocks};
        blocks += task.row_blocks() * task.all_column_blocks();
        size += int64_t(rows.channels) * kTaps * columns.channels;
        tasks[count++] = task;
        return task.start;
    }
    // As many parts as `blocks` of a part need to keep a large device busy.
    void divide(const Layout& l, int blocks_of_part) {
        const int64_t wanted = std::max(1024 / blocks_of_part, 1);
        part_tiles = std::max<int64_t>((l.tiles + wanted - 1) / wanted, 1);
        parts = int((l.tiles + part_tiles - 1) / part_tiles);
    }
};

constexpr int kMaxColumnChunks = 32;

template <class Gradient>
__global__ void __launch_bounds__(kTileThreads, 4)
    weight_kernel(const Layout l, const deform_conv2d::Params geometry,
                  const WeightTasks<Accumulate<typename Gradient::T>> tasks,
                  Accumulate<typename Gradient::T>* parts) {
    using T = typename Gradient::T;
    int number = 0;
    while (number + 1 < tasks.count && int(blockIdx.x) >= tasks.tasks[number + 1].first_block) ++number;
    const auto& task = tasks.tasks[number];
    const Depth depth = task.depth();
    const int column_blocks = task.all_column_blocks();
    const int block = (int(blockIdx.x) - task.first_block) % column_blocks;
    const int first_row = (int(blockIdx.x) - task.first_block) / column_blocks * kSegment;
    const int segment = min(block / task.column_blocks(0), depth.segments() - 1);
    const int first_column = (block - segment * task.column_blocks(0)) * task.of_block;
    const int chunks = depth.in_segment(segment), rows = min(kSegment, task.rows.chunks - first_row);
    const bool sampled = task.offset != nullptr;
    const int columns = min(task.of_block, kTaps * chunks - first_column);  // chunks
    const int stride = odd(sampled ? columns : chunks), grad_stride = odd(rows);
    const int border = sampled ? 0 : task.dilation, across = kTileWidth + 2 * border;

    auto* offsets = shared_memory<int>();  // [kMaxColumnChunks]
    uint4* grad = shared_memory<uint4>() + kMaxColumnChunks * sizeof(int) / 16;
    uint4* map = grad + kTilePixels * grad_stride;
    for (int i = threadIdx.x; i < Gradient::column_chunks; i += kTileThreads) {
        const int column = min(i, columns - 1);  // those behind the last are not used
        const int at = first_column + column;
        const Shift shift = shift_of(kTaps, task.dilation, at / chunks);
        const int pixel = (shift.y + border) * across + shift.x + border;
        offsets[i] = sampled ? column : pixel * stride + at % chunks;
    }
    Gradient gradient;
    const int64_t first_tile = int64_t(blockIdx.y) * tasks.part_tiles;
    const int64_t end = min(first_tile + tasks.part_tiles, l.tiles);
#pragma unroll 1
    for (int64_t tile = first_tile; tile < end; ++tile) {
        const auto place = l.place(tile);
        __syncthreads();  // the tile before is multiplied
        copy_rectangle(grad, grad_stride, task.grad, task.rows.chunks, first_row, rows, l, place, 0);
        if (!sampled)
            copy_rectangle(map, stride, task.map, task.columns.chunks, segment * kSegment, chunks, l, place,
                           border);
        cp_async_commit();
        if (sampled) {
            Sampler<T> sampler(l, geometry, task.map, task.columns.chunks, task.columns.group_chunks,
                               task.offset, place);
#pragma unroll 1
            for (int i = 0; i < columns; ++i)
                map[threadIdx.x * stride + i] = sampler.template at<Gradient::tf32>(
                    (first_column + i) / chunks, segment * kSegment + (first_column + i) % chunks);
        }
        cp_async_wait<0>();
        __syncthreads();
        gradient.multiply(grad, grad_stride, rows, map, across, stride, offsets);
    }
    auto* part = parts + int64_t(blockIdx.y) * tasks.size + task.start;
    gradient.visit([&](int row, int column, int element, auto sum) {
        const int at = first_column + column;
        if (row >= rows * kElements<T> || column >= columns) return;
        const int r = task.rows.template channel<T>(first_row + row / kElements<T>, row % kElements<T>);
        const int c = task.columns.template channel<T>(segment * kSegment + at % chunks, element);
        if (r >= 0 && c >= 0) part[(int64_t(r) * kTaps + at / chunks) * task.columns.channels + c] = sum;
    });
}

template <class T, bool tensor_cores>
using Gradient = std::conditional_t<tensor_cores, TensorGradient<T>, PlainGradient<T>>;

// Chunks of columns that a block has.
template <class T>
int gradient_chunks(const Params& p, bool sampled) {
    int result = 0;
    with_tile<T>(p, [&](auto* tile, auto) {
        using G = Gradient<T, std::remove_reference_t<decltype(*tile)>::words>;
        result = sampled ? G::sampled_chunks : G::column_chunks;
    });
    return result;
}

// Sums of the tasks' gradients, [size], by way of `parts` [parts, size].
template <class T>
void weight_gradients(const Params& p, const Layout& l, const WeightTasks<Accumulate<T>>& tasks,
                      Accumulate<T>* parts, Accumulate<T>* sums, void* stream) {
    if (tasks.count == 0) return;
    int chunks = 0;
    for (int i = 0; i < tasks.count; ++i) {
        const auto& task = tasks.tasks[i];
        const int border = 2 * task.dilation, in_segment = std::min(task.columns.chunks, kSegment);
        const int of_map = task.offset ? kTilePixels * odd(std::min(task.of_block, kTaps * in_segment))
                                       : (kTileHeight + border) * (kTileWidth + border) * odd(in_segment);
        chunks = std::max(chunks, kTilePixels * odd(std::min(task.rows.chunks, kSegment)) + of_map);
    }
    with_tile<T>(p, [&](auto* tile, auto) {
        launch("mixed_op: weight",
               NASFAST_KERNEL(weight_kernel<Gradient<T, std::remove_reference_t<decltype(*tile)>::words>>),
               dim3(unsigned(tasks.blocks), unsigned(tasks.parts)), kTileThreads,
               kMaxColumnChunks * int64_t(sizeof(int)) + chunks * int64_t(16), stream, l,
               deform_params(p, l.padding.chunks * kElements<T>), tasks, parts);
    });
    add_parts("mixed_op: add_parts", parts, tasks.parts, tasks.size, sums, stream);
}

}  // namespace nasfast::mixed_op::cuda
