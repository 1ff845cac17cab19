// Matrix product on GNU vector extensions, near the peak of one core. Included by per-ISA sources.
//
// C [rows, columns] = A [rows, depth] @ B [depth, columns]. A is read in place, with any strides, and
// broadcast; B is packed into panels of a few vectors; a block of C stays in registers over the whole depth.
// Every element of C is summed in the order of k from zero, whatever the shape of its block: results do not
// depend on how the rows are divided among calls.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/dtype.hpp"
#include "common/parallel.hpp"

#define NASFAST_INLINE inline __attribute__((always_inline))
#define NASFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace nasfast::NASFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPanelVectors = 4;  // 32 registers: 6x4, 8x3 or 12x2 sums, the vectors of B, a broadcast
constexpr int panel_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPanelVectors = 3;  // 16 registers
constexpr int panel_rows(int vectors) { return vectors == 3 ? 4 : 6; }
#else
constexpr int kVectorBytes = 16;
constexpr int kPanelVectors = 3;
constexpr int panel_rows(int vectors) { return vectors == 3 ? 4 : 6; }
#endif

template <class T, int Width>
struct VectorOf {
    typedef T type __attribute__((vector_size(Width * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int Width>
using Vector = typename VectorOf<T, Width>::type;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <int Width, class T>
NASFAST_INLINE Vector<T, Width> load(const T* from) {
    return *reinterpret_cast<const Vector<T, Width>*>(from);
}
template <int Width, class T>
NASFAST_INLINE void store(T* to, Vector<T, Width> value) {
    *reinterpret_cast<Vector<T, Width>*>(to) = value;
}

// Parts of two vectors side by side: [a0 b0], [a1 b1] by halves; [a0 a2 b0 b2], [a1 a3 b1 b3] by quarters.
template <class V, size_t... I>
NASFAST_INLINE V low_halves(V a, V b, std::index_sequence<I...>) {
    constexpr size_t half = sizeof...(I) / 2;
    return __builtin_shufflevector(a, b, (I < half ? I : I + half)...);
}
template <class V, size_t... I>
NASFAST_INLINE V high_halves(V a, V b, std::index_sequence<I...>) {
    constexpr size_t half = sizeof...(I) / 2;
    return __builtin_shufflevector(a, b, (I < half ? I + half : I + 2 * half)...);
}
template <class V, size_t... I>
NASFAST_INLINE V even_quarters(V a, V b, std::index_sequence<I...>) {
    constexpr size_t quarter = sizeof...(I) / 4;
    return __builtin_shufflevector(a, b, (I + I / quarter * quarter)...);
}
template <class V, size_t... I>
NASFAST_INLINE V odd_quarters(V a, V b, std::index_sequence<I...>) {
    constexpr size_t quarter = sizeof...(I) / 4;
    return __builtin_shufflevector(a, b, (I + I / quarter * quarter + quarter)...);
}
// Lane i + By in place of lane i.
template <int By, class V, size_t... I>
NASFAST_INLINE V rotated(V a, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, a, ((I + By) % sizeof...(I))...);
}

// Elements in the type A that they are computed in.
template <class A, int Width, class T>
NASFAST_INLINE Vector<A, Width> load_as(const T* from) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        const auto bits = load<Width>(reinterpret_cast<const uint16_t*>(from));
#if defined(__AVX512F__)  // what GCC 12 makes of the conversion takes three times as long
        if constexpr (Width == 16)
            return (Vector<A, Width>)((Vector<uint32_t, 16>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits)
                                      << 16);
#endif
        return (Vector<A, Width>)(__builtin_convertvector(bits, Vector<uint32_t, Width>) << 16);
    } else {
        return load<Width>(from);
    }
}

template <class T>
NASFAST_INLINE Accumulate<T> widen(T value) {
    return load_as<Accumulate<T>, 1>(&value)[0];
}

// A bfloat16 in the upper half of each lane, rounded to nearest even; the lower half is left over.
template <class V>
NASFAST_INLINE auto bf16_bits(V value) {
    using U = Vector<uint32_t, sizeof(V) / sizeof(float)>;
    const U bits = (U)value;
    return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : U{} + 0x7fc00000;  // a NaN stays one
}

// Elements back in their own type.
template <class T, int Width, class V>
NASFAST_INLINE void store_as(T* to, V value) {
    if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BF16__)
        if constexpr (Width == 16) {
            const auto rounded = _mm512_cvtneps_pbh((__m512)value);
            return store<Width>(reinterpret_cast<uint16_t*>(to), (Vector<uint16_t, Width>)rounded);
        }
#endif
        const Vector<uint32_t, Width> bits = bf16_bits(value) >> 16;
        store<Width>(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(bits, Vector<uint16_t, Width>));
    } else {
        store<Width>(to, value);
    }
}

// Calls body(width, i) so that the runs [i, i + width) cover [0, count): full vectors, then halves of them.
template <int Width, class Body>
NASFAST_INLINE void by_vectors(int64_t count, const Body& body, int64_t i = 0) {
    for (; i + Width <= count; i += Width) body(std::integral_constant<int, Width>(), i);
    if constexpr (Width > 1) by_vectors<Width / 2>(count, body, i);
}

// to[0:count] = from[0:count] in another type.
template <class From, class To>
NASFAST_INLINE void convert(const From* from, int64_t count, To* to) {
    using A = Accumulate<From>;
    by_vectors<kWidth<A>>(count, [&](auto width, int64_t i) NASFAST_INLINE_LAMBDA {
        constexpr int w = decltype(width)::value;
        store_as<To, w>(to + i, load_as<A, w>(from + i));
    });
}

// How the columns of B are divided into panels of nearly equal numbers of vectors.
template <class T, int Most = kPanelVectors>
struct Panels {
    int64_t columns, vectors, count;

    explicit Panels(int64_t columns)
        : columns(columns), vectors(ceil_div(columns, kWidth<T>)), count(ceil_div(vectors, Most)) {}
    int64_t begin(int64_t panel) const { return panel * vectors / count * kWidth<T>; }  // first column
    int64_t padded() const { return vectors * kWidth<T>; }
};

// Calls body(vectors, begin) for each panel: its number of vectors, at compile time, and its first column.
template <class T, int Most, class Body>
NASFAST_INLINE void by_panel(const Panels<T, Most>& panels, const Body& body) {
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel);
        const int64_t vectors = (panels.begin(panel + 1) - begin) / kWidth<T>;
        if (vectors == 1)
            body(std::integral_constant<int, 1>(), begin);
        else if (vectors == 2)
            body(std::integral_constant<int, std::min(2, Most)>(), begin);
        else if (vectors == 3)
            body(std::integral_constant<int, std::min(3, Most)>(), begin);
        else
            body(std::integral_constant<int, Most>(), begin);
    }
}

// Writes rows [0, depth) of `b`, element (k, j) at b[k * b_row + j * b_column], into the packed matrix of
// `total` rows, from row `at` on. Columns beyond the last are zero.
template <class T, class S>
void pack(const Panels<T>& panels, int64_t total, int64_t at, int64_t depth, const S* b, int64_t b_row,
          int64_t b_column, T* packed) {
    constexpr int64_t stripe = kWidth<T>;  // few columns at a time: their lines stay in the cache
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
        for (int64_t j = 0; j < width; j += stripe) {
            T* const to = packed + total * begin + at * width + j;
            const S* const from = b + (begin + j) * b_column;
            const int64_t real = std::min(stripe, panels.columns - begin - j);
            for (int64_t k = 0; k < depth; ++k) {
                if (real == stripe)
                    for (int64_t i = 0; i < stripe; ++i)
                        to[k * width + i] = widen(from[k * b_row + i * b_column]);
                else
                    for (int64_t i = 0; i < stripe; ++i)
                        to[k * width + i] = i < real ? widen(from[k * b_row + i * b_column]) : T(0);
            }
        }
    }
}

enum class Into { assign, add };

// c[0:Rows, 0:Vectors * width] = or += a @ b.
template <int Rows, int Vectors, class T>
NASFAST_INLINE void multiply_block(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                   Into into, T* c, int64_t c_row) {
    constexpr int width = kWidth<T>;
    using V = Vector<T, width>;
    V sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] = V{};
    for (int64_t k = 0; k < depth; ++k) {
        V row[Vectors];
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) row[j] = load<width>(b + (k * Vectors + j) * width);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const T factor = a[i * a_row + k * a_column];
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) sum[i][j] += factor * row[j];
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            T* const to = c + i * c_row + j * width;
            store<width>(to, sum[i][j] + (into == Into::add ? load<width>(to) : V{}));
        }
    }
}

template <int Vectors, int Rows, class T>
NASFAST_INLINE int64_t multiply_rows(int64_t row, int64_t rows, int64_t depth, const T* a, int64_t a_row,
                                     int64_t a_column, const T* b, Into into, T* c, int64_t c_row) {
    for (; row + Rows <= rows; row += Rows)
        multiply_block<Rows, Vectors>(depth, a + row * a_row, a_row, a_column, b, into, c + row * c_row,
                                      c_row);
    return row;
}

template <int Vectors, class T>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t depth, const T* a, int64_t a_row,
                                              int64_t a_column, const T* b, Into into, T* c, int64_t c_row) {
    constexpr int full = panel_rows(Vectors);
    int64_t row = multiply_rows<Vectors, full>(0, rows, depth, a, a_row, a_column, b, into, c, c_row);
    row = multiply_rows<Vectors, full / 2>(row, rows, depth, a, a_row, a_column, b, into, c, c_row);
    multiply_rows<Vectors, 1>(row, rows, depth, a, a_row, a_column, b, into, c, c_row);
}

// Rows [first, first + depth) of the packed B, of `total` rows, times A [rows, depth], into the padded
// columns of C: c_row is at least panels.padded().
template <class T>
void multiply(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
              const Panels<T>& panels, const T* packed, int64_t total, int64_t first, Into into, T* c,
              int64_t c_row) {
    by_panel(panels, [&](auto vectors, int64_t begin) {
        constexpr int count = decltype(vectors)::value;
        const T* const b = packed + total * begin + first * count * kWidth<T>;
        multiply_panel<count>(rows, depth, a, a_row, a_column, b, into, c + begin, c_row);
    });
}

// Sums of the products of two tiles over their pixels: sum(i, j) of columns[pixel, i] * grad[pixel, j].
template <class T>
class VectorOuter {
public:
    VectorOuter() = default;
    VectorOuter(Arena& arena, int64_t most_rows, int64_t most_columns, int64_t pixels) {
        const int64_t padded = Panels<T>(most_columns).padded();
        packed_ = arena.take<T>(pixels * padded), own_ = arena.take<T>(most_rows * padded);
    }
    // Elements of the sums.
    static int64_t size(int64_t rows, int64_t columns) { return rows * Panels<T>(columns).padded(); }
    // Begins with sums of zero.
    void start(int64_t rows, int64_t columns) {
        resume(rows, columns, own_);
        std::fill_n(sums_, size(rows, columns), T(0));
    }
    // Goes on with sums that are kept elsewhere.
    void resume(int64_t rows, int64_t columns, T* sums) {
        rows_ = rows, columns_ = columns, padded_ = Panels<T>(columns).padded(), sums_ = sums;
    }
    void add(int64_t pixels, const T* columns, int64_t columns_row, const T* grad, int64_t grad_row) {
        const Panels<T> panels(columns_);
        const bool is_packed = panels.count == 1 && grad_row == padded_ && columns_ == padded_;
        if (!is_packed) pack(panels, pixels, 0, pixels, grad, grad_row, 1, packed_);
        multiply(rows_, pixels, columns, 1, columns_row, panels, is_packed ? grad : packed_, pixels, 0,
                 Into::add, sums_, padded_);
    }
    T sum(int64_t i, int64_t j) const { return sums_[i * padded_ + j]; }

private:
    T *packed_ = nullptr, *own_ = nullptr, *sums_ = nullptr;
    int64_t rows_ = 0, columns_ = 0, padded_ = 0;
};

// A kind of matrix product: C [rows, padded columns] = or += A [rows, depth] @ packed B.
template <class T>
struct VectorProduct {
    using Operand = T;  // of A and B
    using Panels = NASFAST_ISA::Panels<T>;
    using Outer = VectorOuter<T>;
    static constexpr int64_t kDepthMultiple = 1;  // of the rows of B
    static constexpr int64_t kDepth = 144;        // rows at a time: a panel stays in the L1 cache
    static constexpr int64_t kRowMultiple = 1;    // A and C have memory for so many rows

    template <class S>
    static void pack(const Panels& panels, int64_t total, int64_t at, int64_t depth, const S* b,
                     int64_t b_row, int64_t b_column, T* packed) {
        NASFAST_ISA::pack(panels, total, at, depth, b, b_row, b_column, packed);
    }
    static void clear(const Panels&, int64_t, int64_t, int64_t, T*) {}  // rows [begin, end) that fill up
    static void multiply(int64_t rows, int64_t depth, const T* a, int64_t a_row, const Panels& panels,
                         const T* packed, int64_t total, int64_t first, Into into, T* c, int64_t c_row) {
        NASFAST_ISA::multiply(rows, depth, a, a_row, 1, panels, packed, total, first, into, c, c_row);
    }
};

}  // namespace nasfast::NASFAST_ISA
