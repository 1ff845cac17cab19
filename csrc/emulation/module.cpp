// nasfast's CUDA kernels as a Python module that runs them on the CPU. Pointers are of host memory.
#include <pybind11/pybind11.h>

#include "deform_conv2d/bindings_cuda.hpp"
#include "deform_conv2d/deform_conv2d_cuda.cu"
#include "feature_gather/bindings_cuda.hpp"
#include "feature_gather/feature_gather_cuda.cu"
#include "mixed_op/bindings_cuda.hpp"
#include "mixed_op/mixed_op_cuda.cu"

PYBIND11_MODULE(_C_emulated, m) {
    nasfast::deform_conv2d::cuda::bind_cuda(m);
    nasfast::feature_gather::cuda::bind_cuda(m);
    nasfast::mixed_op::cuda::bind_cuda(m);
    m.def("set_order", &nasfast::emulation::set_order);
}
