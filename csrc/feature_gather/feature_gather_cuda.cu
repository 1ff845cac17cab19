// CUDA kernel of feature_gather. The emulation (csrc/emulation) compiles this file too.
#include "feature_gather/feature_gather.cuh"

namespace nasfast::feature_gather::cuda {

void forward(const Params& p, const Pointers& t, void*, void* stream) { launch_gather(p, t, stream); }

}  // namespace nasfast::feature_gather::cuda
