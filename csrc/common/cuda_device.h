#pragma once

#include <string>
#include <vector>

namespace nasfast {

struct CudaDevice {
    std::string name;
    int major, minor;  // compute capability
};

struct CudaInfo {
    int runtime = 0, driver = 0;  // 1000 * major + 10 * minor; driver 0 where none is installed
    std::vector<CudaDevice> devices;
    std::string error;  // why there is no device, or empty
};

// What CUDA finds on this machine. Never throws for a missing driver or device.
CudaInfo cuda_info();

}  // namespace nasfast
