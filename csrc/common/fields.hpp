// How a call arrives from Python: a code for the element type, and structs as one integer for each field.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/dtype.hpp"

namespace nasfast {

// Of a struct whose fields are all int64_t, pointers or doubles (which arrive as their bits).
template <class Struct>
using Fields = std::array<int64_t, sizeof(Struct) / sizeof(int64_t)>;

template <class Struct>
Struct unpack(const Fields<Struct>& fields) {
    Struct result;
    std::memcpy(&result, fields.data(), sizeof(Struct));
    return result;
}

// Calls function(T()) with the type of the code.
template <class Function>
auto with_type(int64_t dtype, const Function& function) {
    switch (DType(dtype)) {
        case DType::float32:
            return function(float());
        case DType::float64:
            return function(double());
        case DType::bfloat16:
            return function(bfloat16());
        case DType::float16:
            return function(float16());
    }
    throw std::invalid_argument("dtype must be a code from 0 to 3, got " + std::to_string(dtype));
}

}  // namespace nasfast
