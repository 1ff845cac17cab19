#include <cuda_runtime_api.h>

#include <stdexcept>

#include "common/cuda_device.h"

namespace nasfast {

CudaInfo cuda_info() {
    CudaInfo info;
    int count = 0;
    cudaError_t status = cudaRuntimeGetVersion(&info.runtime);
    if (status == cudaSuccess) status = cudaDriverGetVersion(&info.driver);
    if (status == cudaSuccess) status = cudaGetDeviceCount(&count);
    for (int device = 0; status == cudaSuccess && device < count; ++device) {
        cudaDeviceProp properties;
        status = cudaGetDeviceProperties(&properties, device);
        if (status == cudaSuccess)
            info.devices.push_back({properties.name, properties.major, properties.minor});
    }
    if (status != cudaSuccess) {
        info.error = cudaGetErrorString(status);
        cudaGetLastError();  // a query must leave no error behind for the next launch to report
    }
    return info;
}

CurrentDevice::CurrentDevice(int device) : before_(0) {
    cudaError_t status = cudaGetDevice(&before_);
    if (status == cudaSuccess && before_ != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string("device: ") + cudaGetErrorString(status));
    }
    if (before_ == device) before_ = -1;  // nothing to restore
}

CurrentDevice::~CurrentDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace nasfast
