// CPU kernel of feature_gather, compiled once per instruction set. It is bound by memory. Which way of
// writing a large batch is the fastest depends on the processor, on its caches and on the batch: the first
// one of a size is written in every way, and that size keeps the best. All write the same bytes.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>

#include "common/gemm.hpp"
#include "feature_gather/feature_gather.h"

namespace nasfast::feature_gather::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

namespace {

constexpr int64_t kLine = Arena::kLine, kPage = 4096;
constexpr int64_t kLarge = 4 << 20;  // bytes from which a batch may be written past the caches
constexpr int64_t kUnit = 32;        // elements that are converted together
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
using Stored = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>;

// Values as they are stored in a T.
template <class T>
NASFAST_INLINE auto narrow(Vector<float, kLanes> value) {
    if constexpr (std::is_same_v<T, float16>)
        return to_half(value);
    else if constexpr (std::is_same_v<T, bfloat16>)
        return __builtin_convertvector(bf16_bits(value) >> 16, Vector<uint16_t, kLanes>);
    else
        return value;
}

// ---- ways of writing

// Through the caches, where a batch that fits stays.
struct Cached {
    static constexpr int kPages = 0;
    template <int Width, class T>
    NASFAST_INLINE static void write(T* to, Vector<T, Width> value) {
        store<Width>(to, value);
    }
    NASFAST_INLINE static void finish() {}
};

// Past the caches, which would read first what is overwritten, and drop what they hold. A processor foresees
// no read beyond the page: so many pages are read side by side, and the next ones are fetched.
template <int Pages>
struct Streamed {
    static constexpr int kPages = Pages;
    template <int Width, class T>
    NASFAST_INLINE static void write(T* to, Vector<T, Width> value) {  // at a multiple of its size
        [[maybe_unused]] constexpr int bytes = Width * sizeof(T);
#if defined(__AVX512F__)
        if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#endif
#if defined(__AVX2__)
        if constexpr (bytes == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#endif
#if defined(__x86_64__)
        if constexpr (bytes == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)value);
        if constexpr (bytes == 8) return _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)value);
#endif
        store<Width>(to, value);
    }
    // Makes what was streamed visible before what is stored afterwards.
    NASFAST_INLINE static void finish() {
#if defined(__x86_64__)
        _mm_sfence();
#endif
    }
};

// Calls body(i) for i = 0, step, ... below count, which reads from[i : i + step]: `Pages` side by side.
template <int Pages, class T, class Body>
NASFAST_INLINE void side_by_side(const T* from, int64_t count, int64_t step, const Body& body) {
    constexpr int64_t page = kPage / sizeof(T), line = kLine / sizeof(T);
    constexpr int level =
        Pages == 1 ? 0 : 2;  // of the caches: what lies far ahead would not stay in the first
    int64_t i = 0;
    for (; i + Pages * page <= count; i += Pages * page)
        for (int64_t j = i; j < i + page; j += step)
#pragma GCC unroll 4
            for (int64_t k = j; k < j + Pages * page; k += page) {
                for (int64_t next = k + Pages * page, end = next + step; next < end; next += line)
                    __builtin_prefetch(from + next, 0, level);
                body(k);
            }
    for (; i < count; i += step) body(i);
}

// ---- runs of elements

// Bytes up to the first line that begins at or behind `to`.
NASFAST_INLINE int64_t to_line(const void* to) {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
}

template <class Way>
void copy(const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t done = 0;
    if constexpr (Way::kPages > 0) {
        const int64_t head = std::min(count, to_line(to)), lines = (count - head) / kLine * kLine;
        std::memcpy(to, from, static_cast<size_t>(head));
        side_by_side<Way::kPages>(from + head, lines, kLine, [&](int64_t i) NASFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int64_t k = head + i; k < head + i + kLine; k += kVectorBytes)
                Way::template write<kVectorBytes>(to + k, load<kVectorBytes>(from + k));
        });
        done = head + lines;
    }
    std::memcpy(to + done, from + done, static_cast<size_t>(count - done));
}

// to[0:kUnit] = from[0:kUnit]
template <class Way, class From, class To>
NASFAST_INLINE void convert_unit(const From* from, To* to) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kUnit; i += kLanes)
        Way::template write<kLanes>(reinterpret_cast<Stored<To>*>(to + i), narrow<To>(read(from + i)));
}

template <class Way, class From, class To>
void convert(const From* from, int64_t count, To* to) {
    const auto part = [&](int64_t begin, int64_t size) NASFAST_INLINE_LAMBDA {
        From source[kUnit] = {};
        To target[kUnit];
        std::copy_n(from + begin, size, source);
        convert_unit<Cached>(source, target);
        std::copy_n(target, size, to + begin);
    };
    int64_t i = 0;
    if (Way::kPages > 0 && reinterpret_cast<uintptr_t>(to) % sizeof(To) == 0) {
        if (const int64_t head = std::min<int64_t>(count, to_line(to) / sizeof(To))) part(0, head), i = head;
        const int64_t whole = (count - i) / kUnit * kUnit;
        side_by_side<std::max(Way::kPages, 1)>(from + i, whole, kUnit, [&](int64_t j) NASFAST_INLINE_LAMBDA {
            convert_unit<Way>(from + i + j, to + i + j);
        });
        i += whole;
    }
    for (; i + kUnit <= count; i += kUnit) convert_unit<Cached>(from + i, to + i);
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

template <class Way>
void gather_field(const Field& field, const uint8_t* block, int64_t row, void* out) {
    const uint8_t* const from = block + field.offset;
    if (field.to == Kind::bytes)
        return copy<Way>(from, field.elements, static_cast<uint8_t*>(out) + row * field.elements);
    with_float(field.to, [&](auto to) {
        auto* const target = static_cast<decltype(to)*>(out) + row * field.elements;
        with_float(field.from, [&](auto type) {
            convert<Way>(reinterpret_cast<const decltype(type)*>(from), field.elements, target);
        });
    });
}

template <class Way>
void gather(const Params& p, const Pointers& t) {
    const int64_t threads = std::max<int64_t>(std::min(p.threads, p.rows), 1);
#pragma omp parallel for num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t index = t.indices[row];
        if (index < 0 || index >= p.samples) continue;
        const uint8_t* const block = t.data + index * p.stride;
        for (int64_t i = 0; i < p.count; ++i) gather_field<Way>(p.fields[i], block, row, t.out[i]);
        Way::finish();
    }
}

// ---- the choice of a way

using Gather = void(const Params&, const Pointers&);
constexpr Gather* kWays[] = {gather<Cached>, gather<Streamed<1>>, gather<Streamed<4>>};
constexpr int kWayCount = sizeof(kWays) / sizeof(*kWays);

int64_t size_of(Kind kind) { return kind == Kind::float32 ? 4 : kind == Kind::bytes ? 1 : 2; }

// Bytes of a batch in the kinds that its fields have before or after.
int64_t bytes_of(const Params& p, Kind Field::* kind) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.count; ++i) bytes += p.rows * p.fields[i].elements * size_of(p.fields[i].*kind);
    return bytes;
}

// Drops the samples from the caches, where none of a cache that is larger than they are will be.
void forget(const Params& p, const Pointers& t) {
#if defined(__x86_64__)
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t index = t.indices[row];
        if (index < 0 || index >= p.samples) continue;
        for (int64_t i = 0; i < p.count; ++i) {
            const Field& field = p.fields[i];
            const uint8_t* const from = t.data + index * p.stride + field.offset;
            for (int64_t at = 0, end = field.elements * size_of(field.from); at < end; at += kLine)
                _mm_clflush(from + at);
        }
    }
    _mm_mfence();
#endif
}

// Seconds that a way takes for the batch: the least of some runs, after one that leaves the caches as it
// does.
double seconds(int way, const Params& p, const Pointers& t) {
    using Clock = std::chrono::steady_clock;
    constexpr int kRepeats = 3;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= kRepeats; ++i) {
        forget(p, t);
        const auto start = Clock::now();
        kWays[way](p, t);
        const std::chrono::duration<double> spent = Clock::now() - start;
        if (i > 0) least = std::min(least, spent.count());
    }
    return least;
}

// The way for batches of this size: the first one decides.
int fastest(const Params& p, const Pointers& t) {
    constexpr int most_threads = 8;
    // by the bits of the bytes written, whether more or less is read, and the threads; 0: not known yet
    static std::atomic<int> known[64][3][most_threads];
    const int64_t written = bytes_of(p, &Field::to), read = bytes_of(p, &Field::from);
    const int64_t threads = std::clamp<int64_t>(p.threads, 1, most_threads);
    auto& found = known[63 - __builtin_clzll(written)][1 + (written < read) - (written > read)][threads - 1];
    if (found == 0) {
        int best = 0;
        double least = seconds(0, p, t);
        for (int way = 1; way < kWayCount; ++way)
            if (const double spent = seconds(way, p, t); spent < least) least = spent, best = way;
        found = best + 1;
    }
    return found;
}

}  // namespace

void forward(const Params& p, const Pointers& t) {
    int64_t way = p.way;
    if (way == 0) way = bytes_of(p, &Field::to) < kLarge ? 1 : fastest(p, t);
    kWays[way - 1](p, t);
}

}  // namespace nasfast::feature_gather::NASFAST_ISA
