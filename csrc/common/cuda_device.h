#pragma once

#include <string>
#include <vector>

namespace nasfast {

struct CudaDevice {
    std::string name;
    int major, minor;  // compute capability
};

struct CudaInfo {
    // 1000 * major + 10 * minor; runtime 0 where kernels are compiled when used, driver 0 where there is none
    int runtime = 0, driver = 0;
    std::vector<CudaDevice> devices;
    std::string error;  // why there is no device, or empty
};

// What CUDA finds on this machine. Never throws for a missing driver or device.
CudaInfo cuda_info();

// Makes a device this thread's current one, until it goes. Throws std::runtime_error.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;

private:
    int before_;
};

}  // namespace nasfast
