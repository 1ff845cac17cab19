#include "common/isa.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nasfast {

#if defined(__x86_64__)
// By feature: only GCC 12 knows the levels by name.
static int best_level() {
    __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
    if (!HAS("sse4.2") || !HAS("popcnt")) return 0;
    if (!HAS("avx2") || !HAS("bmi") || !HAS("bmi2") || !HAS("f16c") || !HAS("fma") || !HAS("lzcnt") ||
        !HAS("movbe"))
        return 2;
    if (!HAS("avx512f") || !HAS("avx512bw") || !HAS("avx512cd") || !HAS("avx512dq") || !HAS("avx512vl"))
        return 3;
#undef HAS
    return 4;
}

static int detect() {
    const int best = best_level();
    if (!best) throw std::runtime_error("the processor must support x86-64-v2 (SSE4.2)");
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
