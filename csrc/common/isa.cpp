#include "common/isa.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nasfast {

#if defined(__x86_64__)
static int detect() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("x86-64-v2"))
        throw std::runtime_error("the processor must support x86-64-v2 (SSE4.2)");
    const int best = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 2;
    const char* wanted = std::getenv("NASFAST_ISA");
    if (!wanted) return best;
    for (int level = 2; level <= 4; ++level)
        if (wanted == "x86-64-v" + std::to_string(level)) return std::min(level, best);
    throw std::runtime_error("NASFAST_ISA must be x86-64-v2, x86-64-v3 or x86-64-v4, got '" +
                             std::string(wanted) + "'; unset it to use the best that the processor has");
}
#else
static int detect() { return 0; }
#endif

int isa_level() {
    static const int level = detect();
    return level;
}

}  // namespace nasfast
