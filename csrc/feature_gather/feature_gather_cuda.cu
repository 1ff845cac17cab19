// CUDA kernel of feature_gather. The emulation (csrc/emulation) compiles this file too.
#include "feature_gather/feature_gather.cuh"
#include "feature_gather/feature_gather_cuda.h"

namespace nasfast::feature_gather::cuda {

int64_t forward_workspace(DType, const Params&) { return 0; }

void forward(const Params& p, const Pointers& t, void*, void* stream) { launch_gather(p, t, stream); }

}  // namespace nasfast::feature_gather::cuda
