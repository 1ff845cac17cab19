// nasfast._C: one entry per kernel. Sizes and pointers arrive as tuples of integers in the order of the
// struct's fields; nasfast/ops has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/fields.hpp"
#include "common/isa.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "feature_cache/bindings_cpu.hpp"
#include "feature_gather/feature_gather.h"
#include "mixed_op/mixed_op.h"
#ifdef NASFAST_CUDA
#include "common/cuda_device.h"
#include "deform_conv2d/bindings_cuda.hpp"
#include "feature_gather/bindings_cuda.hpp"
#include "mixed_op/bindings_cuda.hpp"
#endif

namespace py = pybind11;
namespace dc = nasfast::deform_conv2d;
namespace fg = nasfast::feature_gather;
namespace mo = nasfast::mixed_op;

namespace {

using nasfast::Fields;
using nasfast::unpack;

// Python's entry for a CPU kernel: (dtype, sizes, pointers); runs without the GIL. The types are those that
// the kernel stores.
template <class Params, template <class> class Tensors, class... Types, class Function>
auto cpu_entry(Function function) {
    return [function](int64_t dtype, const Fields<Params>& sizes, const Fields<Tensors<float>>& pointers) {
        const auto params = unpack<Params>(sizes);
        const auto run = [&](auto type) {
            using T = decltype(type);
            if (nasfast::dtype_of<T> != static_cast<nasfast::DType>(dtype)) return false;
            function(params, unpack<Tensors<T>>(pointers));
            return true;
        };
        py::gil_scoped_release release;
        if (!(run(Types()) || ...))
            throw std::invalid_argument("no CPU kernel for dtype " + std::to_string(dtype));
    };
}

// Calls the function of an op for the processor's instruction set.
#define NASFAST_KERNEL(op, function)                                \
    [](const auto& params, const auto& tensors) {                   \
        if constexpr (is_bfloat16<std::decay_t<decltype(tensors)>>) \
            NASFAST_DISPATCH_BF16(op, function, params, tensors);   \
        else                                                        \
            NASFAST_DISPATCH(op, function, params, tensors);        \
    }
template <class Tensors>
constexpr bool is_bfloat16 = false;
template <template <class> class Tensors>
constexpr bool is_bfloat16<Tensors<nasfast::bfloat16>> = true;

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
    nasfast::isa();  // a processor or setting that cannot work fails the import, with the reason
    m.def("isa_level", [] { return nasfast::isa_name(nasfast::isa()); });
    using nasfast::bfloat16;
    m.def("deform_conv2d_forward",
          cpu_entry<dc::Params, dc::Forward, float, double, bfloat16>(NASFAST_KERNEL(dc, forward)));
    m.def("deform_conv2d_backward",
          cpu_entry<dc::Params, dc::Backward, float, double, bfloat16>(NASFAST_KERNEL(dc, backward)));
    m.def("feature_gather_forward",
          cpu_entry<fg::Params, fg::Call, float>([](const fg::Params& params, const fg::Pointers& pointers) {
              NASFAST_DISPATCH(fg, forward, params, pointers);
          }));
    m.def("mixed_op_forward",
          cpu_entry<mo::Params, mo::Forward, float, double, bfloat16>(NASFAST_KERNEL(mo, forward)));
    m.def("mixed_op_backward",
          cpu_entry<mo::Params, mo::Backward, float, double, bfloat16>(NASFAST_KERNEL(mo, backward)));
    nasfast::feature_cache::bind(m);
#ifdef NASFAST_CUDA
    m.def("cuda_info", &cuda_info);
    dc::cuda::bind_cuda(m);
    fg::cuda::bind_cuda(m);
    mo::cuda::bind_cuda(m);
#endif
}
