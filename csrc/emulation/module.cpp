// nasfast's CUDA kernels as a Python module that runs them on the CPU. Pointers are of host memory.
#include "bindings_cuda.hpp"
#include "deform_conv2d/deform_conv2d_cuda.cu"
#include "feature_gather/feature_gather_cuda.cu"
#include "mixed_op/mixed_op_cuda.cu"

PYBIND11_MODULE(_C_emulated, m) {
    nasfast::bind_cuda(m);
    m.def("set_order", &nasfast::emulation::set_order);
}
