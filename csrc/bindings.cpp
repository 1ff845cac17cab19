// nasfast._C: one entry per kernel. Sizes and pointers arrive as tuples of integers in the order of the
// struct's fields; nasfast/ops has checked what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "batch_norm_relu/batch_norm_relu.h"
#include "common/fields.hpp"
#include "common/fork.hpp"
#include "common/isa.hpp"
#include "deform_conv2d/deform_conv2d.h"
#include "depthwise_conv2d/depthwise_conv2d.h"
#include "feature_cache/bindings_cpu.hpp"
#include "feature_gather/feature_gather.h"
#include "mixed_op/mixed_op.h"
#include "sep_conv/sep_conv.h"
#ifdef NASFAST_CUDA
#include "bindings_cuda.hpp"
#include "bindings_device.hpp"
#endif

namespace py = pybind11;
using namespace nasfast;

namespace {

// Python's entry for a CPU kernel: (dtype, sizes, pointers); runs without the GIL. The types are those that
// the kernel stores.
template <class Params, template <class> class Tensors, class... Types, class Function>
auto cpu_entry(Function function) {
    return [function](int64_t dtype, const Fields<Params>& sizes, const Fields<Tensors<float>>& pointers) {
        const auto params = unpack<Params>(sizes);
        const auto run = [&](auto type) {
            using T = decltype(type);
            if (dtype_of<T> != static_cast<DType>(dtype)) return false;
            function(params, unpack<Tensors<T>>(pointers));
            return true;
        };
        py::gil_scoped_release release;
        if (!(run(Types()) || ...))
            throw std::invalid_argument("no CPU kernel for dtype " + std::to_string(dtype));
    };
}

// Binds the kernels of an op for the processor's instruction set.
#define NASFAST_BIND(op, way, Tensors)                                                      \
    m.def(#op "_" #way, cpu_entry<op::Params, op::Tensors, float, double, bfloat16>(        \
                            [](const auto& params, const auto& tensors) {                   \
                                if constexpr (is_bfloat16<std::decay_t<decltype(tensors)>>) \
                                    NASFAST_DISPATCH_BF16(op, way, params, tensors);        \
                                else                                                        \
                                    NASFAST_DISPATCH(op, way, params, tensors);             \
                            }))
template <class Tensors>
constexpr bool is_bfloat16 = false;
template <template <class> class Tensors>
constexpr bool is_bfloat16<Tensors<bfloat16>> = true;

}  // namespace

PYBIND11_MODULE(_C, m) {
    isa();  // a processor or setting that cannot work fails the import, with the reason
    m.def("isa_level", [] { return isa_name(isa()); });
    m.def("end_threads", &end_threads, py::call_guard<py::gil_scoped_release>());
    NASFAST_BIND(batch_norm_relu, forward, Forward);
    NASFAST_BIND(batch_norm_relu, backward, Backward);
    NASFAST_BIND(deform_conv2d, forward, Forward);
    NASFAST_BIND(deform_conv2d, backward, Backward);
    NASFAST_BIND(depthwise_conv2d, forward, Forward);
    NASFAST_BIND(depthwise_conv2d, backward, Backward);
    NASFAST_BIND(mixed_op, forward, Forward);
    NASFAST_BIND(mixed_op, backward, Backward);
    NASFAST_BIND(sep_conv, forward, Forward);
    NASFAST_BIND(sep_conv, backward, Backward);
    m.def("feature_gather_forward", cpu_entry<feature_gather::Params, feature_gather::Call, float>(
                                        [](const auto& params, const auto& pointers) {
                                            NASFAST_DISPATCH(feature_gather, forward, params, pointers);
                                        }));
    feature_cache::bind(m);
#ifdef NASFAST_CUDA
    bind_cuda(m);
    bind_device(m);
#endif
}
