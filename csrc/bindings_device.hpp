// Python's entries about CUDA itself: devices, and the compiler of kernels where nvcc has compiled none.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cuda_device.h"
#ifdef NASFAST_NVRTC
#include "common/cuda_driver.hpp"
#endif

namespace nasfast {

inline pybind11::dict device_info() {
    const CudaInfo info = cuda_info();
    pybind11::list devices;
    for (const auto& device : info.devices)
        devices.append(pybind11::make_tuple(device.name, pybind11::make_tuple(device.major, device.minor)));
    return pybind11::dict(pybind11::arg("runtime") = info.runtime, pybind11::arg("driver") = info.driver,
                          pybind11::arg("devices") = devices, pybind11::arg("error") = info.error);
}

#ifdef NASFAST_NVRTC
// compile: (launch, kernel, major, minor) -> (cubin, symbol); nasfast/ops/_nvrtc.py. Called with the GIL, by
// several threads too.
inline void set_cuda_compiler(const pybind11::function& compile) {
    auto* const kept = new pybind11::function(compile);  // for as long as kernels may be launched
    cuda::set_compiler([kept](const char* launch, const std::string& kernel, int major, int minor) {
        const pybind11::gil_scoped_acquire lock;
        const auto code =
            (*kept)(launch, kernel, major, minor).cast<std::pair<pybind11::bytes, std::string>>();
        return cuda::Code{std::string(code.first), code.second};
    });
}

// (name as NVRTC takes it, bytes of each parameter) of every kernel.
inline pybind11::list cuda_kernels() {
    pybind11::list result;
    for (const cuda::Kernel* kernel : cuda::kernels())
        result.append(pybind11::make_tuple(
            kernel->name(), std::vector<int64_t>(kernel->parameters, kernel->parameters + kernel->count)));
    return result;
}
#endif

inline void bind_device(pybind11::module_& m) {
    m.def("cuda_info", &device_info);
#ifdef NASFAST_NVRTC
    m.def("set_cuda_compiler", &set_cuda_compiler);
    m.def("cuda_kernels", &cuda_kernels);
#endif
}

}  // namespace nasfast
