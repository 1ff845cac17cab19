#include "common/isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nasfast {

static constexpr const char* kNames[] = {"portable",  "x86-64-v2",      "x86-64-v3",
                                         "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"};

#if defined(__x86_64__)

// AMX-BF16, and the kernel's permission to use its registers.
static bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // leaf 7, edx
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// By feature: only GCC 12 knows the levels by name.
static Isa best() {
    __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
    if (!HAS("sse4.2") || !HAS("popcnt")) return Isa::portable;
    if (!HAS("avx2") || !HAS("bmi") || !HAS("bmi2") || !HAS("f16c") || !HAS("fma") || !HAS("lzcnt") ||
        !HAS("movbe"))
        return Isa::v2;
    if (!HAS("avx512f") || !HAS("avx512bw") || !HAS("avx512cd") || !HAS("avx512dq") || !HAS("avx512vl"))
        return Isa::v3;
    if (!HAS("avx512bf16")) return Isa::v4;
#undef HAS
    return has_amx() ? Isa::amx : Isa::bf16;
}

static Isa detect() {
    const Isa most = best();
    if (most == Isa::portable) throw std::runtime_error("the processor must support x86-64-v2 (SSE4.2)");
    const char* wanted = std::getenv("NASFAST_ISA");
    if (!wanted) {
        // Intel's processors multiply bfloat16 in AMX; their AVX512-BF16 takes four times as long as a
        // float32 multiply-add for twice the products (measured on Sapphire Rapids)
        return most == Isa::bf16 && __builtin_cpu_is("intel") ? Isa::v4 : most;
    }
    std::string names;
    for (Isa isa : {Isa::v2, Isa::v3, Isa::v4, Isa::bf16, Isa::amx}) {
        if (wanted == std::string(isa_name(isa))) return isa < most ? isa : most;
        names += (names.empty() ? "" : isa == Isa::amx ? " or " : ", ") + std::string(isa_name(isa));
    }
    throw std::runtime_error("NASFAST_ISA must be " + names + ", got '" + wanted +
                             "'; unset it to use the best that the processor has");
}

#else
static Isa detect() { return Isa::portable; }
#endif

Isa isa() {
    static const Isa found = detect();
    return found;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace nasfast
