// Sums over pixels of the products of two maps' channels. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"
#include "common/product.hpp"
#include "sep_conv/bands.hpp"
#include "sep_conv/pairs.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

// Sums over pixels of the products of two maps' channels, sums [I, J padded], as a product of matrices.
template <class Product>
struct Outer;

template <class A>
struct Outer<VectorProduct<A>> {
    using Product = VectorProduct<A>;

    Outer(Arena& arena, int64_t, int64_t columns)
        : packed(arena.take<A>(kTile * Panels<A>(columns).padded())) {}

    // left [pixels, step], right [pixels, columns].
    template <class T>
    void add(int64_t pixels, int64_t rows, const A* left, int64_t step, int64_t columns, const T* right,
             A* sums) {
        const Panels<A> panels(columns);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
            const int64_t real = std::min(width, columns - begin);
            A* to = packed + pixels * begin;
            for (int64_t i = 0; i < pixels; ++i, to += width) {
                convert(right + i * columns + begin, real, to);
                std::fill(to + real, to + width, A(0));
            }
        }
        multiply(rows, pixels, left, 1, step, panels, packed, pixels, 0, Into::add, sums, panels.padded());
    }

    A* packed;
};

#ifdef NASFAST_PAIRS
// Both maps in pairs of pixels.
template <>
struct Outer<Bf16Product> {
    using Product = Bf16Product;

    Outer(Arena& arena, int64_t rows, int64_t columns)
        : right_(arena.take<uint32_t>(kTile / 2 * Product::Panels(columns).padded())),
          left_(arena.take<uint32_t>(kTile / 2 * round_up(rows, 16))) {}

    void add(int64_t pixels, int64_t rows, const bfloat16* left, int64_t step, int64_t columns,
             const bfloat16* right, float* sums) {
        const Product::Panels panels(columns);
        const int64_t depth = round_up(pixels, 2), left_row = round_up(rows, 16);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
            take(pixels, right + begin, columns, columns - begin, width, right_ + depth / 2 * begin);
        }
        take(pixels, left, step, rows, left_row, left_);
        Product::multiply_packed(rows, depth, reinterpret_cast<const bfloat16*>(left_), 2 * left_row, panels,
                                 reinterpret_cast<const bfloat16*>(right_), Into::add, sums, panels.padded());
    }

private:
    // Rows of `step` in pairs; of `width` channels those beyond `real` are zero.
    static void take(int64_t pixels, const bfloat16* from, int64_t step, int64_t real, int64_t width,
                     uint32_t* to) {
        for (int64_t i = 0; i < pixels; i += 2, to += width)
            for (int64_t c = 0; c < width; c += 16) {
                const __mmask16 mask = real_lanes(c, real);
                const bfloat16* const at = from + i * step + c;
                const auto rows = load_rows(at, mask, at + step, i + 1 < pixels ? mask : 0);
                store<16>(to + c, (Vector<uint32_t, 16>)interleave(rows));
            }
    }

    uint32_t *right_, *left_;
};
#elif defined(NASFAST_BF16)
// Pairs of pixels, one in each half of 32 bits: of the channels of a map [pixels, step], from c on.
NASFAST_INLINE Vector<uint32_t, 16> pairs(int64_t pixels, const bfloat16* from, int64_t step, int64_t pixel,
                                          int64_t c, int64_t channels) {
    const __mmask16 real = channels - c >= 16 ? 0xffff : (1u << (channels - c)) - 1;
    const auto row = [&](int64_t i) NASFAST_INLINE_LAMBDA {
        const __mmask16 mask = i < pixels ? real : 0;
        return (Vector<uint32_t, 16>)_mm512_maskz_cvtepu16_epi32(
            0xffff, _mm256_maskz_loadu_epi16(mask, from + i * step + c));
    };
    return row(pixel) | row(pixel + 1) << 16;
}

// A matrix [16, 16] of 32 bits, turned; rows of `to` are `step` apart.
inline void transpose(Vector<uint32_t, 16> (&v)[16], uint32_t* to, int64_t step) {
    // of the rows' indices and the lanes', one bit each is exchanged in turn
    const auto exchange = [&](auto bit) NASFAST_INLINE_LAMBDA {
        constexpr int b = decltype(bit)::value;
        const auto lanes = (Vector<uint32_t, 16>){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const auto low = (lanes & b) ? (lanes - b + 16) : lanes;
        const auto high = (lanes & b) ? (lanes + 16) : (lanes + b);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            if (!(i & b)) {
                const auto a = (__m512i)v[i], z = (__m512i)v[i | b];
                v[i] = (Vector<uint32_t, 16>)_mm512_permutex2var_epi32(a, (__m512i)low, z);
                v[i | b] = (Vector<uint32_t, 16>)_mm512_permutex2var_epi32(a, (__m512i)high, z);
            }
    };
    exchange(std::integral_constant<int, 1>());
    exchange(std::integral_constant<int, 2>());
    exchange(std::integral_constant<int, 4>());
    exchange(std::integral_constant<int, 8>());
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store<16>(to + i * step, v[i]);
}

template <>
struct Outer<Bf16Product> {
    using Product = Bf16Product;
    static constexpr int64_t kDepth = round_up(kTile, 32);  // pixels

    Outer(Arena& arena, int64_t rows, int64_t columns)
        : packed(arena.take<bfloat16>(kDepth * Product::Panels(columns).padded())),
          turned(arena.take<bfloat16>(round_up(rows, 32) * kDepth)) {}

    void add(int64_t pixels, int64_t rows, const bfloat16* left, int64_t step, int64_t columns,
             const bfloat16* right, float* sums) {
        const Product::Panels panels(columns);
        const int64_t depth = round_up(pixels, 32);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
            uint32_t* const to = reinterpret_cast<uint32_t*>(packed + depth * begin);
            for (int64_t i = 0; i < depth; i += 2)
                for (int64_t c = 0; c < width; c += 16)
                    store<16>(to + i / 2 * width + c, pairs(pixels, right, columns, i, begin + c, columns));
        }
        for (int64_t i = 0; i < depth; i += 32)
            for (int64_t c = 0; c < rows; c += 16) {
                Vector<uint32_t, 16> v[16];
#pragma GCC unroll 16
                for (int j = 0; j < 16; ++j) v[j] = pairs(pixels, left, step, i + 2 * j, c, rows);
                transpose(v, reinterpret_cast<uint32_t*>(turned + c * depth + i), depth / 2);
            }
        Product::multiply(rows, depth, turned, depth, panels, packed, depth, 0, Into::add, sums,
                          panels.padded());
    }

    bfloat16 *packed, *turned;
};
#endif

}  // namespace nasfast::sep_conv::NASFAST_ISA
