// The sums that the tensor cores of a warp make, the one thing that every product by them has.
#pragma once

#include "common/cuda_kernel.cuh"

namespace nasfast::cuda {

// [16 * down, 8 * across] of a warp; every [16, 8] lies in its lanes as mma leaves it.
template <int down, int across>
struct TensorTile {
    float sums[down][across][4] = {};

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < down * across * 4; ++i) (&sums[0][0][0])[i] = 0;
    }

    // f(row, column, sum, sum at column + 1) for this lane's, of the first `eights` times 8 columns.
    template <class F>
    __device__ __forceinline__ void visit_warp(const F& f, int eights = across) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < down; ++i)
#pragma unroll
            for (int j = 0; j < across; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (j < eights)
                        f(i * 16 + half * 8 + lane / 4, j * 8 + lane % 4 * 2, sums[i][j][2 * half],
                          sums[i][j][2 * half + 1]);
    }
};

}  // namespace nasfast::cuda
