// Instruction sets. A kernel source is compiled once per set, inside `namespace nasfast::NASFAST_ISA`,
// so that no inline function of one set can be linked into another (one-definition rule).
#pragma once

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
#define NASFAST_DISPATCH(op, function, ...)                        \
    (::nasfast::isa_level() == 4   ? op::v4::function(__VA_ARGS__) \
     : ::nasfast::isa_level() == 3 ? op::v3::function(__VA_ARGS__) \
                                   : op::v2::function(__VA_ARGS__))
#else
#define NASFAST_PER_ISA(...) \
    namespace portable {     \
    __VA_ARGS__              \
    }
#define NASFAST_DISPATCH(op, function, ...) op::portable::function(__VA_ARGS__)
#endif

namespace nasfast {

// 2, 3 or 4 for x86-64-v2, -v3 or -v4; 0 for any other processor. The environment variable NASFAST_ISA
// ("x86-64-v2", ...) lowers it. Throws std::runtime_error where the processor has not even v2.
int isa_level();

}  // namespace nasfast
