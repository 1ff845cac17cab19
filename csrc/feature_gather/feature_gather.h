// Copies arrays out of the blocks of samples into a batch, and converts them on the way.
#pragma once

#include <cstdint>

#include "common/dtype.hpp"
#include "common/isa.hpp"

namespace nasfast::feature_gather {

constexpr int kFields = 16;  // of a call, at most

// What a field consists of; codes of nasfast.ops.feature_gather. Bytes are copied as they are.
enum class Kind : int64_t { float32, bfloat16, float16, bytes };

// Offsets are multiples of 16.
struct Field {
    Kind from, to;  // both bytes, or a float kind for `to`
    int64_t offset;
    int64_t elements;  // of a sample
};

// Fields in the order of nasfast.ops.feature_gather. Blocks begin at multiples of 16.
struct Params {
    int64_t rows;     // of the batch: N
    int64_t samples;  // S
    int64_t stride;   // bytes from block to block
    int64_t threads;  // CPU: at most
    int64_t way;      // CPU, of writing: 0 is the fastest, 1 to 3 those of feature_gather_cpu.cpp
    int64_t count;    // of the fields below
    Field fields[kFields];
};

struct Pointers {
    const uint8_t* data;     // [S, stride]
    const int64_t* indices;  // [N]; a row whose index is not one of the S samples is left as it is
    void* out[kFields];      // [N, elements] each
};
// The kinds stand in Params: there is nothing to choose by the type that calls are made with.
template <class>
using Call = Pointers;

NASFAST_PER_ISA(void forward(const Params&, const Pointers&);)

namespace cuda {
// As the macros of common/kernels.hpp declare it.
template <class T>
int64_t forward_workspace(const Params&) {
    return 0;
}
void forward(const Params&, const Pointers&, void* workspace, void* stream);
}  // namespace cuda

}  // namespace nasfast::feature_gather
