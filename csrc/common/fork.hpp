// Kernels in a process that was forked.
#pragma once

#include <dlfcn.h>

namespace nasfast {

// Ends the threads with which OpenMP serves the calling one, of torch too; the next parallel loop begins new
// ones. False where the library is too old for it (GCC 8).
//
// A child of `fork` has the calling thread alone, but believes in those that served it, and would wait for
// them for ever.
inline bool end_threads() {
    // looked up, as torch brings a library of its own
    const auto pause = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    constexpr int hard = 2;
    return pause && pause(hard) == 0;
}

}  // namespace nasfast
