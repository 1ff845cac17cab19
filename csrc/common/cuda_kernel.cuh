// What CUDA kernels and their host code are written with. The same sources are compiled
// - by nvcc, kernels and host code together;
// - where there is no nvcc, the host code by a C++ compiler (common/cuda_driver.hpp), and a kernel by NVRTC
//   when it is first launched (nasfast/ops/_nvrtc.py);
// - with NASFAST_EMULATION by a C++ compiler for the CPU (emulation/cuda_on_cpu.hpp).
//
// A kernel is launched as launch("<op>: <kernel>", NASFAST_KERNEL(the kernel), ..). To run in all, it
// - takes shared memory from shared_memory() only and has blocks of whole warps;
// - calls every warp-wide function with all 32 lanes;
// - orders accesses to shared memory by __syncthreads() or __syncwarp() (a shuffle or mma orders nothing).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.hpp"

#if defined(NASFAST_EMULATION)
#include "emulation/cuda_on_cpu.hpp"
#elif !defined(__CUDACC__)
#include "common/cuda_driver.hpp"
#else

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda_host.hpp"

namespace nasfast::cuda {

// ---- host

#define NASFAST_KERNEL(...) __VA_ARGS__

// Launches on `stream` (a cudaStream_t). `name` is "<op>: <kernel>". No grid, no launch.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            int64_t shared_bytes, void* stream, std::decay_t<Parameters>... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 << 10)
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status == cudaSuccess) {
        const auto queue = static_cast<cudaStream_t>(stream);
        kernel<<<grid, threads, size_t(shared_bytes), queue>>>(arguments...);
        status = cudaGetLastError();
    }
    if (status != cudaSuccess) {
        cudaGetLastError();  // leave none behind for the next launch to report
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
    }
}

// Multiprocessors of the current device.
inline int multiprocessors() {
    int device = 0, count = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string("device properties: ") + cudaGetErrorString(status));
    }
    return count;
}

}  // namespace nasfast::cuda
#endif

namespace nasfast::cuda {

// blockIdx.x, read anew by every call: what is derived from it needs no register in between.
__device__ __forceinline__ unsigned block_index() {
    unsigned index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

// ---- memory

// Dynamic shared memory of the block, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char nasfast_shared[];
    return reinterpret_cast<T*>(nasfast_shared);
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
}

// 16 bytes of global memory that no kernel in flight writes.
__device__ __forceinline__ uint4 load_16(const void* global) {
    return __ldg(static_cast<const uint4*>(global));
}

// The same where valid; zeros elsewhere. Without a branch, so that several loads go out together, and
// volatile, so that they go out here and not where their values are used.
__device__ __forceinline__ uint4 load_16(const void* global, bool valid) {
    uint4 words;
    asm volatile(
        "{\n"
        " .reg .pred valid;\n"
        " setp.ne.s32 valid, %5, 0;\n"
        " mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        " @valid ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
        : "l"(global), "r"(int(valid)));
    return words;
}

// Copies 16 bytes in the background; zeros where not valid, whatever `global` is.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups, but for the latest N. Other threads see the copies after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void atomic_add(float* global, float value) { atomicAdd(global, value); }
__device__ __forceinline__ void atomic_add(double* global, double value) { atomicAdd(global, value); }
__device__ __forceinline__ void atomic_add(unsigned long long* global, unsigned long long value) {
    atomicAdd(global, value);
}
__device__ __forceinline__ void atomic_max(unsigned* global, unsigned value) { atomicMax(global, value); }
__device__ __forceinline__ void atomic_or(unsigned* global, unsigned value) { atomicOr(global, value); }

// Four neighbours, aligned to 16 bytes; each is added atomically, not the four together.
__device__ __forceinline__ void atomic_add(float* global, float4 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
                 : "memory");
#else
    atomicAdd(global, value.x);
    atomicAdd(global + 1, value.y);
    atomicAdd(global + 2, value.z);
    atomicAdd(global + 3, value.w);
#endif
}

// ---- warp

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}
// Of the given lane, modulo 32.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// ---- numbers

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float widen(float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

// To the nearest, ties to even.
__device__ __forceinline__ float narrow(float value, float) { return value; }
__device__ __forceinline__ double narrow(double value, double) { return value; }
__device__ __forceinline__ bfloat16 narrow(float value, bfloat16 result) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
__device__ __forceinline__ float16 narrow(float value, float16 result) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// Two half values in a word, the first in the low bits.
__device__ __forceinline__ float2 widen_pair(uint32_t pair, bfloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float2 widen_pair(uint32_t pair, float16) {
    return make_float2(widen(float16{uint16_t(pair)}), widen(float16{uint16_t(pair >> 16)}));
}
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, bfloat16) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, float16) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Bits of the nearest tf32 value. mma reads no more than these; unrounded operands are cut off.
__device__ __forceinline__ uint32_t to_tf32(float value) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

// ---- tensor cores
// mma: d [16, 8] += a [16, K] b [K, 8], K of 32 bytes: 16 half values, or 8 of tf32 for float. Lane 4 g + q
// holds the words (row, word) of a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); (column, word) of b:
// (g, q), (g, q + 4); d: (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements. Lane 8 m + r passes the address of row r (16 bytes) of matrix m;
// lane 4 g + q gets in words[m] the elements (g, 2 q) and (g, 2 q + 1), transposed (2 q, g) and (2 q + 1, g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(shared))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

}  // namespace nasfast::cuda
#endif

namespace nasfast::cuda {

// 16 bytes as elements.
template <class T>
struct Chunk {
    static constexpr int size = 16 / sizeof(T);
    T values[size];
};
template <class T>
__device__ __forceinline__ Chunk<T> as_chunk(const uint4& words) {
    Chunk<T> chunk;
    memcpy(&chunk, &words, sizeof words);
    return chunk;
}
template <class T>
__device__ __forceinline__ uint4 as_words(const Chunk<T>& chunk) {
    uint4 words;
    memcpy(&words, &chunk, sizeof words);
    return words;
}

// Sum over the lanes that differ in the bits of `lanes` - 1 (a power of two), in all of them.
template <int lanes = 32, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
    return value;
}

}  // namespace nasfast::cuda
