// Products of tiles in shared memory, by tensor cores or without, for blocks of kThreads threads.
#pragma once

#include <type_traits>

#include "common/cuda_tensor_tile.cuh"

namespace nasfast::cuda {

constexpr int kThreads = 256;
constexpr int kColumns = 64;  // of every product

// Neighbours in memory that are read or written at once.
template <class T, int count>
struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Pack {
    T values[count];
};

template <int count, class T>
__device__ __forceinline__ Pack<T, count> load_pack(const T* source) {
    return *reinterpret_cast<const Pack<T, count>*>(source);
}
template <int count, class T>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, count>& pack) {
    *reinterpret_cast<Pack<T, count>*>(target) = pack;
}

// shared[r * stride + c] = source[r * source_step + c], zero where r >= rows or c >= columns. Seen after
// cp_async_commit, cp_async_wait and a barrier. `vector`: 16 bytes of a row are aligned and all or none
// inside.
template <int all_rows, int all_columns, int stride, class T>
__device__ __forceinline__ void load_tile(T* shared, const T* source, int64_t source_step, int rows,
                                          int columns, bool vector) {
    constexpr int size = 16 / sizeof(T), per_row = all_columns / size, turns = all_rows * per_row / kThreads;
    static_assert(turns * kThreads == all_rows * per_row);
    if (vector) {
#pragma unroll 1
        for (int i = 0; i < turns; ++i) {
            const int index = int(threadIdx.x) + i * kThreads;
            const int row = index / per_row, column = index % per_row * size;
            const bool valid = row < rows && column < columns;
            cp_async_16(shared + row * stride + column, valid ? source + row * source_step + column : source,
                        valid);
        }
    } else {
#pragma unroll 1
        for (int index = threadIdx.x; index < all_rows * all_columns; index += kThreads) {
            const int row = index / all_columns, column = index % all_columns;
            shared[row * stride + column] =
                row < rows && column < columns ? source[row * source_step + column] : T{};
        }
    }
}

// Elements to put after each row of a tile, which spread over the banks what a warp reads at once: where the
// depth runs along the rows of the tile, and where it runs down its columns.
template <class T>
constexpr int kPadAlong = 16 / sizeof(T);
template <class T>
constexpr int kPadDown = (std::is_same_v<T, float> ? 32 : 16) / sizeof(T);

// A thread's part of sums [rows, kColumns] += a @ b. Tiles: a [rows, depth], or [depth, rows] if a_by_depth;
// b [depth, kColumns]. visit calls f(row, column, sum, sum at column + 1) for every second column.
template <int rows>
struct Warps {
    static constexpr int kWarpsDown = rows == 64 ? 2 : 4, kWarpsAcross = kThreads / 32 / kWarpsDown;
    static constexpr int kDown = rows / kWarpsDown / 16, kAcross = kColumns / kWarpsAcross / 8;  // of a warp
    static_assert(kAcross % 2 == 0);
};

template <class T, int rows>
struct TensorProduct : Warps<rows>, TensorTile<Warps<rows>::kDown, Warps<rows>::kAcross> {
    using Warps<rows>::kWarpsDown, Warps<rows>::kDown, Warps<rows>::kAcross;
    static constexpr int kStep = 32 / sizeof(T);  // of depth

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static int row() { return int(threadIdx.x) / 32 % kWarpsDown * (kDown * 16); }
    __device__ __forceinline__ static int column() {
        return int(threadIdx.x) / 32 / kWarpsDown * (kAcross * 8);
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
                for (int j = 0; j < kAcross; ++j) mma(this->sums[i][j], left, right[j / 2][j % 2], T{});
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
        this->visit_warp(
            [&](int r, int c, float first, float second) { f(row() + r, column() + c, first, second); });
    }

private:
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
};

template <class T, int rows>
struct PlainProduct {
    static constexpr int kDown = rows / 16, kAcross = kColumns / 16;

    T sums[kDown][kAcross] = {};

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
            const auto right = load_pack<kAcross>(b + k * b_stride + column());
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
                const T left = a_by_depth ? a[k * a_stride + row() + i] : a[(row() + i) * a_stride + k];
#pragma unroll
                for (int j = 0; j < kAcross; ++j) sums[i][j] += left * right.values[j];
            }
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(const F& f) const {
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; j += 2) f(row() + i, column() + j, sums[i][j], sums[i][j + 1]);
    }
};

template <class T, bool tensor_cores, int rows>
using Product = std::conditional_t<tensor_cores, TensorProduct<T, rows>, PlainProduct<T, rows>>;

}  // namespace nasfast::cuda
