// One kernel for all fields of a batch. A block has a piece of one field of one sample; its threads have a
// few loads of 16 bytes each under way at once.
#pragma once

#include <algorithm>

#include "common/cuda_kernel.cuh"
#include "feature_gather/feature_gather.h"

namespace nasfast::feature_gather::cuda {

using namespace nasfast::cuda;

constexpr int kThreads = 256;
constexpr int kLoads = 4;
constexpr int64_t kMostRows = 65535;  // that a grid has

// How a field is divided.
struct Division {
    int64_t blocks;  // of this field and those before it
    int64_t units;   // of a sample: 16 bytes, or single elements
    bool single;     // where 16 bytes of a sample, or what becomes of them, would be misaligned
};

struct Plan {
    Params params;
    Pointers tensors;
    Division divisions[kFields];
};

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(bfloat16 value) { return widen(value); }
__device__ __forceinline__ float number(float16 value) { return widen(value); }

// The elements that the 16 bytes of a unit become, written at once.
template <class To, int size>
struct alignas(size * sizeof(To) < 16 ? size * sizeof(To) : 16) Run {
    To values[size];
};

// A piece of a field of a sample.
template <class From, class To>
struct Piece {
    const unsigned char* from;
    To* to;

    static __device__ __forceinline__ To convert(From value) {
        if constexpr (std::is_same_v<From, uint8_t>)
            return value;
        else
            return narrow(number(value), To());
    }

    __device__ __forceinline__ void gather(const Division& division, int64_t first) const {
        if (division.single) {
            for (int k = 0; k < kLoads; ++k) {
                const int64_t i = first + k * kThreads;
                if (i < division.units) to[i] = convert(reinterpret_cast<const From*>(from)[i]);
            }
            return;
        }
        uint4 words[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads;
            words[k] = load_16(from + i * 16, i < division.units);
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int64_t i = first + k * kThreads;
            constexpr int size = Chunk<From>::size;
            if (i >= division.units) break;
            const Chunk<From> chunk = as_chunk<From>(words[k]);
            Run<To, size> run;
#pragma unroll
            for (int j = 0; j < size; ++j) run.values[j] = convert(chunk.values[j]);
            reinterpret_cast<Run<To, size>*>(to)[i] = run;
        }
    }
};

template <class From, class To>
__device__ __forceinline__ void gather(const Plan& plan, int number, const unsigned char* block, int64_t row,
                                       int64_t first) {
    const Field& field = plan.params.fields[number];
    Piece<From, To>{block + field.offset, static_cast<To*>(plan.tensors.out[number]) + row * field.elements}
        .gather(plan.divisions[number], first);
}

template <class To>
__device__ __forceinline__ void gather_as(const Plan& plan, int number, const unsigned char* block,
                                          int64_t row, int64_t first) {
    switch (plan.params.fields[number].from) {
        case Kind::float32:
            return gather<float, To>(plan, number, block, row, first);
        case Kind::bfloat16:
            return gather<bfloat16, To>(plan, number, block, row, first);
        default:
            return gather<float16, To>(plan, number, block, row, first);
    }
}

// Grid: pieces of the fields of a sample, rows of the batch.
__global__ void __launch_bounds__(kThreads) gather_kernel(const Plan plan) {
    int number = 0;
    while (blockIdx.x >= plan.divisions[number].blocks) ++number;
    const int64_t before = number ? plan.divisions[number - 1].blocks : 0;
    const int64_t first = (blockIdx.x - before) * kThreads * kLoads + threadIdx.x;
    const Params& p = plan.params;
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const int64_t index = plan.tensors.indices[row];
        if (index < 0 || index >= p.samples) continue;
        const unsigned char* const block = plan.tensors.data + index * p.stride;
        switch (p.fields[number].to) {
            case Kind::float32:
                gather_as<float>(plan, number, block, row, first);
                break;
            case Kind::bfloat16:
                gather_as<bfloat16>(plan, number, block, row, first);
                break;
            case Kind::float16:
                gather_as<float16>(plan, number, block, row, first);
                break;
            default:
                gather<uint8_t, uint8_t>(plan, number, block, row, first);
        }
    }
}

inline int64_t size_of(Kind kind) {
    return kind == Kind::float32 ? 4 : kind == Kind::bfloat16 || kind == Kind::float16 ? 2 : 1;
}

inline void launch_gather(const Params& p, const Pointers& t, void* stream) {
    Plan plan{p, t, {}};
    int64_t blocks = 0;
    for (int64_t i = 0; i < p.count; ++i) {
        const Field& field = p.fields[i];
        const int64_t bytes = field.elements * size_of(field.from);
        Division& division = plan.divisions[i];
        division.single = bytes % 16 || field.elements * size_of(field.to) % 16 ||
                          reinterpret_cast<uintptr_t>(t.out[i]) % 16;
        division.units = division.single ? field.elements : bytes / 16;
        division.blocks = blocks += (division.units + kThreads * kLoads - 1) / (kThreads * kLoads);
    }
    launch("feature_gather: gather", NASFAST_KERNEL(gather_kernel),
           dim3(unsigned(blocks), unsigned(std::min(p.rows, kMostRows))), kThreads, 0, stream, plan);
}

}  // namespace nasfast::feature_gather::cuda
