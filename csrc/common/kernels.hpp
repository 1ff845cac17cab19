// What every op declares, defines and instantiates of its kernels: forward and backward of its Params.
#pragma once

#include "common/dtype.hpp"
#include "common/isa.hpp"

// ---- CPU: for each instruction set, and each dtype of CPU memory

#define NASFAST_DECLARE_KERNELS(T)                  \
    void forward(const Params&, const Forward<T>&); \
    void backward(const Params&, const Backward<T>&);
#define NASFAST_KERNELS_PER_ISA                                                    \
    NASFAST_PER_ISA(NASFAST_DECLARE_KERNELS(float) NASFAST_DECLARE_KERNELS(double) \
                        NASFAST_DECLARE_KERNELS(bfloat16))                         \
    NASFAST_PER_BF16_ISA(NASFAST_DECLARE_KERNELS(bfloat16))

// Defines them for the set that is being compiled, by the op's forward_impl and backward_impl.
#define NASFAST_DEFINE_KERNELS_OF(T)                                           \
    void forward(const Params& p, const Forward<T>& t) { forward_impl(p, t); } \
    void backward(const Params& p, const Backward<T>& t) { backward_impl(p, t); }
#ifdef NASFAST_BF16  // a set for bfloat16 alone
#define NASFAST_DEFINE_KERNELS NASFAST_DEFINE_KERNELS_OF(bfloat16)
#else
#define NASFAST_DEFINE_KERNELS        \
    NASFAST_DEFINE_KERNELS_OF(float)  \
    NASFAST_DEFINE_KERNELS_OF(double) \
    NASFAST_DEFINE_KERNELS_OF(bfloat16)
#endif

// ---- CUDA: the host side. Everything is queued on `stream` (a cudaStream_t of the current device); nothing
// allocates, waits for the device or uses another stream, so that calls can be captured in a graph. A failed
// launch raises std::runtime_error. <way>_workspace returns the bytes of device memory, aligned to 256, that
// the call of the same sizes needs at `workspace`.

#define NASFAST_DECLARE_CUDA(way, Tensors)  \
    template <class T>                      \
    int64_t way##_workspace(const Params&); \
    template <class T>                      \
    void way(const Params&, const Tensors<T>&, void* workspace, void* stream);
#define NASFAST_CUDA_KERNELS                 \
    namespace cuda {                         \
    NASFAST_DECLARE_CUDA(forward, Forward)   \
    NASFAST_DECLARE_CUDA(backward, Backward) \
    }

#define NASFAST_INSTANTIATE_CUDA_OF(T)                                     \
    template int64_t forward_workspace<T>(const Params&);                  \
    template int64_t backward_workspace<T>(const Params&);                 \
    template void forward(const Params&, const Forward<T>&, void*, void*); \
    template void backward(const Params&, const Backward<T>&, void*, void*);
#define NASFAST_INSTANTIATE_CUDA_KERNELS  \
    NASFAST_INSTANTIATE_CUDA_OF(float)    \
    NASFAST_INSTANTIATE_CUDA_OF(double)   \
    NASFAST_INSTANTIATE_CUDA_OF(bfloat16) \
    NASFAST_INSTANTIATE_CUDA_OF(float16)
