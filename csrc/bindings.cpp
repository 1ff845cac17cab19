// nasfast._C: one entry per kernel. Sizes and pointers arrive as tuples of integers in the order of the
// struct's fields; nasfast/ops has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "common/isa.hpp"
#include "deform_conv2d/deform_conv2d.h"
#ifdef NASFAST_CUDA
#include "common/cuda_device.h"
#include "deform_conv2d/bindings_cuda.hpp"
#endif

namespace py = pybind11;
namespace dc = nasfast::deform_conv2d;

namespace {

// One integer for each field of a struct whose fields are all int64_t or pointers.
template <class Struct>
using Fields = std::array<int64_t, sizeof(Struct) / sizeof(int64_t)>;

template <class Struct>
Struct unpack(const Fields<Struct>& fields) {
    Struct result;
    std::memcpy(&result, fields.data(), sizeof(Struct));
    return result;
}

// Python's entry for a CPU kernel: (float64, sizes, pointers); runs without the GIL.
#define NASFAST_CPU_ENTRY(op, function, Tensors)                                                    \
    [](bool float64, const Fields<op::Params>& sizes, const Fields<op::Tensors<float>>& pointers) { \
        const auto params = unpack<op::Params>(sizes);                                              \
        if (float64)                                                                                \
            NASFAST_DISPATCH(op, function, params, unpack<op::Tensors<double>>(pointers));          \
        else                                                                                        \
            NASFAST_DISPATCH(op, function, params, unpack<op::Tensors<float>>(pointers));           \
    },                                                                                              \
        py::call_guard<py::gil_scoped_release>()

std::string isa_name() {
    const int level = nasfast::isa_level();
    return level ? "x86-64-v" + std::to_string(level) : "portable";
}

#ifdef NASFAST_CUDA
py::dict cuda_info() {
    const nasfast::CudaInfo info = nasfast::cuda_info();
    py::list devices;
    for (const auto& device : info.devices)
        devices.append(py::make_tuple(device.name, py::make_tuple(device.major, device.minor)));
    return py::dict(py::arg("runtime") = info.runtime, py::arg("driver") = info.driver,
                    py::arg("devices") = devices, py::arg("error") = info.error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    nasfast::isa_level();  // a processor or setting that cannot work fails the import, with the reason
    m.def("isa_level", &isa_name);
    m.def("deform_conv2d_forward", NASFAST_CPU_ENTRY(dc, forward, Forward));
    m.def("deform_conv2d_backward", NASFAST_CPU_ENTRY(dc, backward, Backward));
#ifdef NASFAST_CUDA
    m.def("cuda_info", &cuda_info);
    dc::cuda::bind_cuda(m);
#endif
}
