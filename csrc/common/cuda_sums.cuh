// Sums over many blocks: of parts in a fixed order, and of terms that come in any order.
#pragma once

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "common/cuda_tiles.cuh"

namespace nasfast::cuda {

// ---- kernels with a thread per element in turn; `name` is "<op>: <kernel>"

constexpr int kElementThreads = 256;

inline dim3 element_grid(int64_t count) {
    const int64_t blocks = (count + kElementThreads - 1) / kElementThreads;
    return dim3(unsigned(std::min<int64_t>(blocks, 4096)));
}

__device__ __forceinline__ int64_t first_element() {
    return int64_t(blockIdx.x) * kElementThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t element_step() { return int64_t(gridDim.x) * kElementThreads; }

template <class Word>
__global__ void clear_kernel(Word* words, int64_t count) {
    for (int64_t i = first_element(); i < count; i += element_step()) words[i] = 0;
}

inline void clear(const char* name, void* memory, int64_t bytes, void* stream) {
    const int64_t words = bytes / int64_t(sizeof(uint32_t));
    launch(name, NASFAST_KERNEL(clear_kernel<uint32_t>), element_grid(words), kElementThreads, 0, stream,
           static_cast<uint32_t*>(memory), words);
}

// result [count] = sum over the rows of parts [number, count]
template <class A>
__global__ void add_parts_kernel(const A* parts, int number, int64_t count, A* result) {
    for (int64_t i = first_element(); i < count; i += element_step()) {
        A sum = 0;
        for (int part = 0; part < number; ++part) sum += parts[part * count + i];
        result[i] = sum;
    }
}

template <class A>
void add_parts(const char* name, const A* parts, int number, int64_t count, A* result, void* stream) {
    launch(name, NASFAST_KERNEL(add_parts_kernel<A>), element_grid(count), kElementThreads, 0, stream, parts,
           number, count, result);
}

// ---- sums that are the same for every order of their terms

// Every term is rounded to a multiple of a power of two, and these are added as integers of 64 bits, which is
// exact. The power is as small as the largest sum possible allows, which is known from the largest values of
// the factors that make up a term. float: a sum errs by at most terms * 2^-63 of that largest one. double has
// a second integer for what the first rounds off. A term that is not finite makes the sum NaN.
template <class A>
struct ExactSums {
    static constexpr int kParts = std::is_same_v<A, double> ? 2 : 1;
    static constexpr int kBias = 1023;
    static constexpr int kFactors = 3;  // at most

    int64_t elements;
    int factors;
    int log_terms;              // a sum has at most 2^log_terms terms
    int log_products;           // and a term is the sum of at most 2^log_products products of the factors
    unsigned long long* parts;  // [kParts, elements]; null: no such sums
    unsigned* not_finite;       // a bit per element
    unsigned* exponents;        // [kFactors] finite values of a factor are below 2^(exponent - kBias)

    static int64_t part_bytes(int64_t elements) { return kParts * elements * int64_t(sizeof(*parts)); }
    static int64_t flag_bytes(int64_t elements) {
        return (elements + 31) / 32 * int64_t(sizeof(*not_finite));
    }
    static int64_t bytes(int64_t elements) {
        return part_bytes(elements) + flag_bytes(elements) + kFactors * int64_t(sizeof(*exponents));
    }

    void place(void* memory) {
        auto* at = static_cast<char*>(memory);
        parts = reinterpret_cast<unsigned long long*>(at);
        not_finite = reinterpret_cast<unsigned*>(at + part_bytes(elements));
        exponents = reinterpret_cast<unsigned*>(at + part_bytes(elements) + flag_bytes(elements));
    }

    // The exponent of two that brings every sum below 2^62, ...
    __device__ __forceinline__ int scale() const {
        int exponent = log_terms + log_products;
        for (int i = 0; i < factors; ++i) exponent += int(exponents[i]) - kBias;
        return 62 - exponent;
    }
    // ... and of what the first part rounds off, at most 1/2 of each term.
    __device__ __forceinline__ int second_scale() const { return 62 - log_terms; }

    __device__ __forceinline__ void add(int64_t index, double term, int scale) const {
        if (!isfinite(term)) {
            atomic_or(not_finite + index / 32, 1u << index % 32);
            return;
        }
        const double scaled = ldexp(term, scale), first = rint(scaled);
        add_integer(index, first);
        if (kParts == 2) add_integer(elements + index, rint(ldexp(scaled - first, second_scale())));
    }

    __device__ __forceinline__ double read(int64_t index, int scale) const {
        if (not_finite[index / 32] >> index % 32 & 1) return nan("");
        double sum = double(int64_t(parts[index]));
        if (kParts == 2) sum += ldexp(double(int64_t(parts[elements + index])), -second_scale());
        return ldexp(sum, -scale);
    }

private:
    __device__ __forceinline__ void add_integer(int64_t index, double value) const {
        atomic_add(parts + index, static_cast<unsigned long long>(int64_t(value)));
    }
};

// Raises *exponent to that of rows [count / width, width] of a factor.
template <class T>
__global__ void find_exponent_kernel(const T* values, int64_t count, int64_t width, int64_t row_step,
                                     unsigned* exponent) {
    int largest = 0;
    for (int64_t i = first_element(); i < count; i += element_step()) {
        const double value = widen(values[i / width * row_step + i % width]);
        if (value != 0 && isfinite(value))
            largest = max(largest, ilogb(value) + 1 + ExactSums<double>::kBias);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = max(largest, shuffle_xor(largest, step));
    if (threadIdx.x % 32 == 0 && largest > 0) atomic_max(exponent, unsigned(largest));
}

template <class T>
void find_exponent(const char* name, const T* values, int64_t count, int64_t width, int64_t row_step,
                   unsigned* exponent, void* stream) {
    launch(name, NASFAST_KERNEL(find_exponent_kernel<T>), element_grid(count), kElementThreads, 0, stream,
           values, count, width, row_step, exponent);
}

inline int ceil_log2(int64_t value) {
    int result = 0;
    while (int64_t(1) << result < value) ++result;
    return result;
}

// ---- sums whose terms many blocks add

// One of the two, or neither: floating [elements], or exact.
template <class A>
struct ScatteredSums {
    A* floating;
    ExactSums<A> exact;

    // Adds `count` of four neighbours. vector: all four exist, and floating + index is aligned to 16 bytes.
    __device__ __forceinline__ void add(int64_t index, const Pack<A, 4>& terms, int count, bool vector,
                                        int scale) const {
        if (exact.parts) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < count) exact.add(index + i, terms.values[i], scale);
            return;
        }
        if constexpr (std::is_same_v<A, float>) {
            if (vector) {
                const auto& [x, y, z, w] = terms.values;
                atomic_add(floating + index, make_float4(x, y, z, w));
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) atomic_add(floating + index + i, terms.values[i]);
    }

    __device__ __forceinline__ A read(int64_t index, int scale) const {
        return exact.parts ? A(exact.read(index, scale)) : floating[index];
    }
    __device__ __forceinline__ int scale() const { return exact.parts ? exact.scale() : 0; }
};

// The sums in another type.
template <class T, class A>
__global__ void finish_sums(const ScatteredSums<A> sums, T* result) {
    const int scale = sums.scale();
    for (int64_t i = first_element(); i < sums.exact.elements; i += element_step())
        result[i] = narrow(sums.read(i, scale), T{});
}

}  // namespace nasfast::cuda
