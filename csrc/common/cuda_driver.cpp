// Launches by the CUDA driver, of kernels that are compiled when they are first used.
#include "common/cuda_driver.hpp"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

#include "common/cuda_device.h"

namespace nasfast {
namespace {

// ---- the driver, as far as it is used here; the values are those of CUDA's cuda.h, whose binary interface
// stays

using Result = int;
constexpr Result kSuccess = 0, kInvalidValue = 1;
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                            // CUfunction_attribute

struct Driver {
    std::string error;  // why there is none, or empty
    Result (*get_error_string)(Result, const char**) = nullptr;
    Result (*init)(unsigned) = nullptr;
    Result (*get_version)(int*) = nullptr;
    Result (*device_count)(int*) = nullptr;
    Result (*device_name)(char*, int, int) = nullptr;
    Result (*device_attribute)(int*, int, int) = nullptr;
    Result (*retain_context)(void**, int) = nullptr;
    Result (*push_context)(void*) = nullptr;
    Result (*pop_context)(void**) = nullptr;
    Result (*is_capturing)(void*, int*) = nullptr;
    Result (*load_module)(void**, const void*) = nullptr;
    Result (*get_function)(void**, void*, const char*) = nullptr;
    Result (*parameter_info)(void*, size_t, size_t*, size_t*) = nullptr;
    Result (*set_attribute)(void*, int, int) = nullptr;
    Result (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                     void**, void**) = nullptr;

    Driver() {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            error = "no CUDA driver: libcuda.so.1 was not found";
            return;
        }
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            if (!function && error.empty())
                error = std::string("the CUDA driver is too old: it has no ") + name +
                        "; install one for CUDA 13";
        };
        find(get_error_string, "cuGetErrorString");
        find(init, "cuInit");
        find(get_version, "cuDriverGetVersion");
        find(device_count, "cuDeviceGetCount");
        find(device_name, "cuDeviceGetName");
        find(device_attribute, "cuDeviceGetAttribute");
        find(retain_context, "cuDevicePrimaryCtxRetain");
        find(push_context, "cuCtxPushCurrent_v2");
        find(pop_context, "cuCtxPopCurrent_v2");
        find(is_capturing, "cuStreamIsCapturing");
        find(load_module, "cuModuleLoadData");
        find(get_function, "cuModuleGetFunction");
        find(parameter_info, "cuFuncGetParamInfo");
        find(set_attribute, "cuFuncSetAttribute");
        find(launch, "cuLaunchKernel");
        if (error.empty()) error = said(init(0));
    }

    // What the driver says of a status, or nothing.
    std::string said(Result status) const {
        if (status == kSuccess) return "";
        const char* text = nullptr;
        if (get_error_string(status, &text) != kSuccess || !text)
            return "CUDA error " + std::to_string(status);
        return text;
    }
};

const Driver& driver() {
    static const Driver found;
    return found;
}

void check(const char* what, Result status) {
    if (status != kSuccess) throw std::runtime_error(std::string(what) + ": " + driver().said(status));
}

// ---- devices

struct Device {
    void* context = nullptr;  // the primary one, which torch uses
    int multiprocessors = 0, major = 0, minor = 0;
};

const Device& device_of(int index) {
    static std::mutex mutex;
    static Device devices[cuda::kMostDevices];
    if (!driver().error.empty()) throw std::runtime_error("device properties: " + driver().error);
    if (index < 0 || index >= cuda::kMostDevices)
        throw std::runtime_error("device properties: expected a device from 0 to " +
                                 std::to_string(cuda::kMostDevices - 1) + ", got " + std::to_string(index));
    const std::lock_guard<std::mutex> lock(mutex);
    Device& device = devices[index];
    if (!device.context) {
        const char* const what = "device properties";
        check(what, driver().device_attribute(&device.multiprocessors, kMultiprocessors, index));
        check(what, driver().device_attribute(&device.major, kMajor, index));
        check(what, driver().device_attribute(&device.minor, kMinor, index));
        check(what, driver().retain_context(&device.context, index));
    }
    return device;
}

thread_local int current = 0;  // device of this thread's CurrentDevice

}  // namespace

CudaInfo cuda_info() {
    CudaInfo info;
    const Driver& cuda = driver();
    if (cuda.get_version) cuda.get_version(&info.driver);
    info.error = cuda.error;
    int count = 0;
    if (info.error.empty()) info.error = cuda.said(cuda.device_count(&count));
    for (int device = 0; info.error.empty() && device < count; ++device) {
        char name[256] = "";
        int major = 0, minor = 0;
        Result status = cuda.device_name(name, sizeof name, device);
        if (status == kSuccess) status = cuda.device_attribute(&major, kMajor, device);
        if (status == kSuccess) status = cuda.device_attribute(&minor, kMinor, device);
        info.error = cuda.said(status);
        if (status == kSuccess) info.devices.push_back({name, major, minor});
    }
    return info;
}

CurrentDevice::CurrentDevice(int device) : before_(current) {
    check("device", driver().push_context(device_of(device).context));
    current = device;
}

CurrentDevice::~CurrentDevice() {
    void* popped = nullptr;
    driver().pop_context(&popped);
    current = before_;
}

namespace cuda {
namespace {

// Both are made before they are first used, by static objects of other files too, and never destroyed: the
// compiler belongs to Python, which may be gone by then.
std::vector<const Kernel*>& all_kernels() {
    static auto* const list = new std::vector<const Kernel*>();
    return *list;
}
Compiler& compiler() {
    static auto* const found = new Compiler();
    return *found;
}

// The kernel on the current device.
void* load(const char* name, Kernel& kernel, void* stream) {
    const Driver& cuda = driver();
    int capturing = 0;
    check(name, cuda.is_capturing(stream, &capturing));
    if (capturing)
        throw std::runtime_error(
            std::string(name) +
            ": expected a kernel that has run before, as its code cannot be loaded while a CUDA graph is "
            "captured; run the call once before the capture");
    const Device& device = device_of(current);
    const Code code = compiler()(name, kernel.name(), device.major, device.minor);
    static std::mutex mutex;  // not held while the compiler runs, which waits for Python's lock
    const std::lock_guard<std::mutex> lock(mutex);
    if (void* const loaded = kernel.functions[current].load()) return loaded;
    void *module = nullptr, *function = nullptr;  // stays loaded
    check(name, cuda.load_module(&module, code.cubin.data()));
    check(name, cuda.get_function(&function, module, code.symbol.c_str()));
    for (int64_t i = 0; i <= kernel.count; ++i) {
        size_t offset = 0, size = 0;
        const Result status = cuda.parameter_info(function, size_t(i), &offset, &size);
        const bool end = status == kInvalidValue;
        if (!end) check(name, status);
        if (end != (i == kernel.count) || (!end && int64_t(size) != kernel.parameters[i]))
            throw std::runtime_error(
                std::string(name) +
                ": the sources of the kernels are not those that the extension was built "
                "from; `pip install .` in the checkout builds it anew");
    }
    kernel.functions[current].store(function);
    return function;
}

}  // namespace

Kernel::Kernel(const char* mangled, const int64_t* parameters, int64_t count)
    : mangled(mangled), parameters(parameters), count(count) {
    all_kernels().push_back(this);
}

// "nasfast::cuda::Named<&(void kernel<..>(parameters))>", or "nasfast::cuda::Named<&kernel>" for no template.
std::string Kernel::name() const {
    int status = 0;
    char* const demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = demangled ? demangled : mangled;
    std::free(demangled);
    const std::string prefix = "nasfast::cuda::Named<&", result = "(void ";
    if (name.rfind(prefix, 0) != 0) throw std::runtime_error("expected the name of a kernel, got " + name);
    name = name.substr(prefix.size(), name.size() - prefix.size() - 1);
    if (name.rfind(result, 0) != 0) return name;
    name.erase(0, result.size());
    size_t end = 0;
    for (int depth = 0; end < name.size() && (name[end] != '(' || depth); ++end)
        depth += name[end] == '<' ? 1 : name[end] == '>' ? -1 : 0;
    return name.substr(0, end);
}

std::vector<const Kernel*> kernels() { return all_kernels(); }

void set_compiler(Compiler chosen) { compiler() = std::move(chosen); }

int multiprocessors() { return device_of(current).multiprocessors; }

void launch_kernel(const char* name, Kernel& kernel, dim3 grid, unsigned threads, int64_t shared_bytes,
                   void* stream, void** arguments) {
    const Driver& cuda = driver();
    void* function = kernel.functions[current].load(std::memory_order_acquire);
    if (!function) function = load(name, kernel, stream);
    if (shared_bytes > 48 << 10)
        check(name, cuda.set_attribute(function, kMaxDynamicShared, int(shared_bytes)));
    check(name, cuda.launch(function, grid.x, grid.y, grid.z, threads, 1, 1, unsigned(shared_bytes), stream,
                            arguments, nullptr));
}

}  // namespace cuda
}  // namespace nasfast
