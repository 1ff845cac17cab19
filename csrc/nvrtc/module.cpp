// nasfast._C without its CPU kernels, for tests of kernels that are compiled when they are used.
#include "bindings_cuda.hpp"
#include "bindings_device.hpp"

PYBIND11_MODULE(_C_nvrtc, m) {
    nasfast::bind_cuda(m);
    nasfast::bind_device(m);
}
