// nasfast's CUDA kernels as a Python module that runs them on the CPU. Pointers are of host memory.
#include "bindings_cuda.hpp"
#include "deform_conv2d/deform_conv2d_cuda.cu"
#include "feature_gather/feature_gather_cuda.cu"
#include "mixed_op/mixed_op_cuda.cu"

// The CPU is the only device.
nasfast::CurrentDevice::CurrentDevice(int device) : before_(device) {}
nasfast::CurrentDevice::~CurrentDevice() = default;

PYBIND11_MODULE(_C_emulated, m) {
    nasfast::bind_cuda(m);
    m.def("set_order", &nasfast::emulation::set_order);
    m.def("record", [](bool recording) {
        nasfast::emulation::launches.clear();
        nasfast::emulation::recording = recording;
    });
    m.def("launches",
          [] {  // (name, grid, threads, bytes of shared memory, bytes of the arguments, 0 where those pad)
              pybind11::list result;
              for (const auto& launch : nasfast::emulation::launches)
                  result.append(pybind11::make_tuple(
                      launch.name, pybind11::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z),
                      launch.threads, launch.shared_bytes, pybind11::bytes(launch.arguments),
                      pybind11::bytes(launch.padding)));
              return result;
          });
}
