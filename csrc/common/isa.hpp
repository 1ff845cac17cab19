// Instruction sets. A kernel source is compiled once per set, inside `namespace nasfast::NASFAST_ISA`,
// so that no inline function of one set can be linked into another (one-definition rule).
#pragma once

namespace nasfast {

enum class Isa { portable, v2, v3, v4, bf16, amx };

// The best of the processor: x86-64-v2, -v3 or -v4, the last also with AVX512-BF16 or with AMX for bfloat16;
// portable for any other architecture. The environment variable NASFAST_ISA lowers it to the set that it
// names. Throws std::runtime_error where the processor has not even x86-64-v2.
Isa isa();
const char* isa_name(Isa);

}  // namespace nasfast

#if defined(__x86_64__)
#define NASFAST_PER_ISA(...) \
    namespace v2 {           \
    __VA_ARGS__              \
    }                        \
    namespace v3 {           \
    __VA_ARGS__              \
    }                        \
    namespace v4 {           \
    __VA_ARGS__              \
    }
#define NASFAST_PER_BF16_ISA(...) \
    namespace bf16 {              \
    __VA_ARGS__                   \
    }                             \
    namespace amx {               \
    __VA_ARGS__                   \
    }
#define NASFAST_DISPATCH(op, function, ...)                                   \
    (::nasfast::isa() >= ::nasfast::Isa::v4   ? op::v4::function(__VA_ARGS__) \
     : ::nasfast::isa() == ::nasfast::Isa::v3 ? op::v3::function(__VA_ARGS__) \
                                              : op::v2::function(__VA_ARGS__))
// For functions that are compiled for the bfloat16 sets as well.
#define NASFAST_DISPATCH_BF16(op, function, ...)                                  \
    (::nasfast::isa() == ::nasfast::Isa::amx    ? op::amx::function(__VA_ARGS__)  \
     : ::nasfast::isa() == ::nasfast::Isa::bf16 ? op::bf16::function(__VA_ARGS__) \
                                                : NASFAST_DISPATCH(op, function, __VA_ARGS__))
#else
#define NASFAST_PER_ISA(...) \
    namespace portable {     \
    __VA_ARGS__              \
    }
#define NASFAST_PER_BF16_ISA(...)
#define NASFAST_DISPATCH(op, function, ...) op::portable::function(__VA_ARGS__)
#define NASFAST_DISPATCH_BF16 NASFAST_DISPATCH
#endif
