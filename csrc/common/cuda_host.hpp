// Host code of CUDA kernels, whatever launches them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nasfast::cuda {

// Sizes that a kernel does not count so far.
[[noreturn]] inline void refuse(const char* what, int64_t got, const char* remedy) {
    throw std::invalid_argument(std::string(what) + ", got " + std::to_string(got) + "; " + remedy);
}

}  // namespace nasfast::cuda
