// common/cuda_kernel.cuh for a C++ compiler alone: host code that has its kernels compiled by NVRTC when they
// are first launched. The driver is libcuda.so.1, found when called, so that the module imports without it.
//
// Kernels are named here and never compiled: NASFAST_KERNEL names one where nothing is evaluated. What they
// call need only be declared, but has a body, for compilers that compile it all the same.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

#include "common/cuda_host.hpp"
#include "common/cuda_language.hpp"
#include "common/dtype.hpp"

namespace nasfast::cuda {

constexpr int kMostDevices = 64;

// A kernel, once for all devices.
struct Kernel {
    const char* mangled;                              // of the type Named<the kernel>
    const int64_t* parameters;                        // their sizes
    int64_t count;                                    // of the parameters
    std::atomic<void*> functions[kMostDevices] = {};  // CUfunction by device, once loaded

    Kernel(const char* mangled, const int64_t* parameters, int64_t count);
    // As NVRTC takes it: "nasfast::<op>::cuda::<kernel><..>".
    std::string name() const;
};

// Kernels of this module.
std::vector<const Kernel*> kernels();

// Makes the code of a kernel: (launch, "<op>: <kernel>"; Kernel::name; compute capability) -> cubin and the
// kernel's symbol in it.
struct Code {
    std::string cubin, symbol;
};
using Compiler = std::function<Code(const char* launch, const std::string& kernel, int major, int minor)>;
void set_compiler(Compiler);

// `arguments` points to each argument. Throws std::runtime_error.
void launch_kernel(const char* name, Kernel& kernel, dim3 grid, unsigned threads, int64_t shared_bytes,
                   void* stream, void** arguments);

int multiprocessors();

template <auto kernel>
struct Named;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Named<kernel> {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied to the device");
    static constexpr int64_t sizes[] = {sizeof(Parameters)...};
    inline static Kernel entry{typeid(Named).name(), sizes, sizeof...(Parameters)};
    using Signature = void (*)(Parameters...);
};
template <auto kernel>
Named<kernel> named();
#define NASFAST_KERNEL(...) decltype(::nasfast::cuda::named<__VA_ARGS__>())()

// Launches on `stream` (a CUstream). `name` is "<op>: <kernel>". No grid, no launch.
template <class... Parameters, void (*kernel)(Parameters...)>
void launch(const char* name, Named<kernel>, dim3 grid, unsigned threads, int64_t shared_bytes, void* stream,
            std::decay_t<Parameters>... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    void* addresses[] = {&arguments...};
    launch_kernel(name, Named<kernel>::entry, grid, threads, shared_bytes, stream, addresses);
}

// ---- what kernels call; common/cuda_kernel.cuh in its order

inline unsigned block_index() { __builtin_trap(); }
template <class T>
T* shared_memory() {
    __builtin_trap();
}
inline uint4 load_16(const void*) { __builtin_trap(); }
inline uint4 load_16(const void*, bool) { __builtin_trap(); }
inline void cp_async_16(void*, const void*, bool) { __builtin_trap(); }
inline void cp_async_commit() { __builtin_trap(); }
template <int N>
void cp_async_wait() {
    __builtin_trap();
}
template <class T, class Value>
void atomic_add(T*, Value) {
    __builtin_trap();
}
inline void atomic_max(unsigned*, unsigned) { __builtin_trap(); }
inline void atomic_or(unsigned*, unsigned) { __builtin_trap(); }
template <class T>
T shuffle_xor(T, int) {
    __builtin_trap();
}
template <class T>
T shuffle(T, int) {
    __builtin_trap();
}
inline float widen(float) { __builtin_trap(); }
inline double widen(double) { __builtin_trap(); }
inline float widen(bfloat16) { __builtin_trap(); }
inline float widen(float16) { __builtin_trap(); }
inline float bits_to_float(uint32_t) { __builtin_trap(); }
template <class Wide, class T>
T narrow(Wide, T) {
    __builtin_trap();
}
template <class T>
float2 widen_pair(uint32_t, T) {
    __builtin_trap();
}
template <class T>
uint32_t narrow_pair(float, float, T) {
    __builtin_trap();
}
inline uint32_t to_tf32(float) { __builtin_trap(); }
template <class T>
void mma(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], T) {
    __builtin_trap();
}
inline void ldmatrix_x4(uint32_t (&)[4], const void*) { __builtin_trap(); }
inline void ldmatrix_x4_trans(uint32_t (&)[4], const void*) { __builtin_trap(); }

}  // namespace nasfast::cuda

inline void __syncthreads() {}
inline void __syncwarp() {}
