// CPU kernel of feature_gather, compiled once per instruction set. It is bound by memory. A large batch is
// written past the caches, which would only read it first, and drop what they hold; four pages are read side
// by side, since a processor foresees no read beyond the page.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>

#include "common/gemm.hpp"
#include "feature_gather/feature_gather.h"

namespace nasfast::feature_gather::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

namespace {

constexpr int64_t kLine = Arena::kLine, kPage = 4096, kPages = 4;
constexpr int64_t kStreamed = 4 << 20;  // bytes of a batch from which it is written past the caches
constexpr int64_t kUnit = 32;           // elements that are converted together
constexpr int kLanes = kWidth<float>;

// ---- float16

#if defined(__AVX512F__)
NASFAST_INLINE Vector<float, 16> from_half(Vector<uint16_t, 16> bits) {
    return (Vector<float, 16>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
NASFAST_INLINE Vector<uint16_t, 16> to_half(Vector<float, 16> value) {
    return (Vector<uint16_t, 16>)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
NASFAST_INLINE Vector<float, 8> from_half(Vector<uint16_t, 8> bits) {
    return (Vector<float, 8>)_mm256_cvtph_ps((__m128i)bits);
}
NASFAST_INLINE Vector<uint16_t, 8> to_half(Vector<float, 8> value) {
    return (Vector<uint16_t, 8>)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
#else
using Bits = Vector<uint32_t, kLanes>;
using Floats = Vector<float, kLanes>;

NASFAST_INLINE Floats from_half(Vector<uint16_t, kLanes> half) {
    const Bits bits = __builtin_convertvector(half, Bits), size = bits & 0x7fff;
    const Floats subnormal = __builtin_convertvector((Vector<int32_t, kLanes>)size, Floats) * 0x1p-24f;
    const Bits normal = (size << 13) + (112 << 23);
    const Bits special = normal + (112 << 23);  // infinity, NaN
    const Bits value = size < 0x400 ? (Bits)subnormal : size < 0x7c00 ? normal : special;
    return (Floats)(value | (bits & 0x8000) << 16);
}
NASFAST_INLINE Vector<uint16_t, kLanes> to_half(Floats value) {
    const Bits bits = (Bits)value, size = bits & 0x7fffffff;
    // the sum rounds to a multiple of 2^-24, the spacing of subnormal float16
    const Bits subnormal = (Bits)((Floats)size + 0.5f) - 0x3f000000;
    const Bits normal = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112 << 10);
    const Bits special = size > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;  // NaN, infinity
    const Bits half = size < 0x38800000 ? subnormal : size < 0x477ff000 ? normal : special;
    return __builtin_convertvector(half | (bits & 0x80000000) >> 16, Vector<uint16_t, kLanes>);
}
#endif

template <class T>
NASFAST_INLINE Vector<float, kLanes> read(const T* from) {
    if constexpr (std::is_same_v<T, float16>)
        return from_half(load<kLanes>(reinterpret_cast<const uint16_t*>(from)));
    else
        return load_as<float, kLanes>(from);
}
template <class T>
NASFAST_INLINE void write(T* to, Vector<float, kLanes> value) {
    if constexpr (std::is_same_v<T, float16>)
        store<kLanes>(reinterpret_cast<uint16_t*>(to), to_half(value));
    else
        store_as<T, kLanes>(to, value);
}

// ---- runs of elements

// A line of a cache, which both begin with.
NASFAST_INLINE void stream_line(void* to, const void* from) {
    auto* target = static_cast<char*>(to);
    const auto* source = static_cast<const char*>(from);
    for (int64_t i = 0; i < kLine; i += kVectorBytes) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX2__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#elif defined(__x86_64__)
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#else
        std::memcpy(target + i, source + i, kVectorBytes);
#endif
    }
}

// Makes what was streamed visible before what is stored afterwards.
NASFAST_INLINE void finish_stream() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Calls body(i) for i = 0, step, ... below count, which reads from[i : i + step]: four pages side by side,
// and fetches the next four.
template <class T, class Body>
NASFAST_INLINE void side_by_side(const T* from, int64_t count, int64_t step, const Body& body) {
    constexpr int64_t page = kPage / sizeof(T), line = kLine / sizeof(T);
    int64_t i = 0;
    for (; i + kPages * page <= count; i += kPages * page)
        for (int64_t j = i; j < i + page; j += step)
#pragma GCC unroll 4
            for (int64_t k = j; k < j + kPages * page; k += page) {
                for (int64_t next = k + kPages * page, end = next + step; next < end; next += line)
                    __builtin_prefetch(from + next, 0, 2);
                body(k);
            }
    for (; i < count; i += step) body(i);
}

// Bytes up to the first line that begins at or behind `to`.
NASFAST_INLINE int64_t to_line(const void* to) {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
}

void copy(const uint8_t* from, int64_t count, uint8_t* to, bool streamed) {
    if (!streamed) {
        std::memcpy(to, from, static_cast<size_t>(count));
        return;
    }
    const int64_t head = std::min(count, to_line(to)), lines = (count - head) / kLine * kLine;
    std::memcpy(to, from, static_cast<size_t>(head));
    side_by_side(from + head, lines, kLine,
                 [&](int64_t i) NASFAST_INLINE_LAMBDA { stream_line(to + head + i, from + head + i); });
    const int64_t done = head + lines;
    std::memcpy(to + done, from + done, static_cast<size_t>(count - done));
}

// to[0:kUnit] = from[0:kUnit]
template <class From, class To>
NASFAST_INLINE void convert_unit(const From* from, To* to) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kUnit; i += kLanes) write(to + i, read(from + i));
}

template <class From, class To>
void convert(const From* from, int64_t count, To* to, bool streamed) {
    const auto part = [&](int64_t begin, int64_t size) NASFAST_INLINE_LAMBDA {
        From source[kUnit] = {};
        To target[kUnit];
        std::copy_n(from + begin, size, source);
        convert_unit(source, target);
        std::copy_n(target, size, to + begin);
    };
    int64_t i = 0;
    if (streamed) {
        if (const int64_t head = std::min<int64_t>(count, to_line(to) / sizeof(To))) part(0, head), i = head;
        const int64_t whole = (count - i) / kUnit * kUnit;
        side_by_side(from + i, whole, kUnit, [&](int64_t j) NASFAST_INLINE_LAMBDA {
            alignas(kLine) To unit[kUnit];
            convert_unit(from + i + j, unit);
            for (int64_t k = 0; k < kUnit; k += kLine / sizeof(To)) stream_line(to + i + j + k, unit + k);
        });
        i += whole;
    }
    for (; i + kUnit <= count; i += kUnit) convert_unit(from + i, to + i);
    if (i < count) part(i, count - i);
}

// ---- fields

// Calls function(T()) with the element type of the kind.
template <class Function>
void with_float(Kind kind, const Function& function) {
    if (kind == Kind::float32)
        function(float());
    else if (kind == Kind::bfloat16)
        function(bfloat16());
    else
        function(float16());
}

void gather(const Field& field, const uint8_t* block, int64_t row, void* out, bool streamed) {
    const uint8_t* const from = block + field.offset;
    if (field.to == Kind::bytes)
        return copy(from, field.elements, static_cast<uint8_t*>(out) + row * field.elements, streamed);
    with_float(field.to, [&](auto to) {
        auto* const target = static_cast<decltype(to)*>(out) + row * field.elements;
        with_float(field.from, [&](auto type) {
            convert(reinterpret_cast<const decltype(type)*>(from), field.elements, target, streamed);
        });
    });
}

int64_t size_of(Kind kind) { return kind == Kind::float32 ? 4 : kind == Kind::bytes ? 1 : 2; }

}  // namespace

void forward(const Params& p, const Pointers& t) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.count; ++i) bytes += p.rows * p.fields[i].elements * size_of(p.fields[i].to);
    const bool streamed = bytes >= kStreamed;
    const int64_t threads = std::max<int64_t>(std::min(p.threads, p.rows), 1);
#pragma omp parallel for num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t index = t.indices[row];
        if (index < 0 || index >= p.samples) continue;
        const uint8_t* const block = t.data + index * p.stride;
        for (int64_t i = 0; i < p.count; ++i) gather(p.fields[i], block, row, t.out[i], streamed);
        if (streamed) finish_stream();
    }
}

}  // namespace nasfast::feature_gather::NASFAST_ISA
