// The pointwise convolution of sep_conv, a tile of pixels at a time. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "batch_norm_relu/batch_norm_relu.hpp"
#include "common/parallel.hpp"
#include "common/product.hpp"
#include "sep_conv/bands.hpp"
#include "sep_conv/pairs.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;
namespace bn = batch_norm_relu::NASFAST_ISA;

// The total of a channel in a tile, and the sum of squares around its own mean, from the sums around its
// first pixel. That is within the root of the number of pixels of standard deviations from the mean: few
// digits are lost.
template <class A, class V>
NASFAST_INLINE void finish_sums(int64_t pixels, const V& first, const V& sum, const V& squares, V& total,
                                V& around) {
    around = squares - sum * sum / static_cast<A>(pixels);
    around = around < 0 ? V{} : around;
    total = sum + first * static_cast<A>(pixels);
}

// to [pixels, channels] = a tile of a product, rows of `step`.
template <class T, class A>
void store_product(int64_t pixels, int64_t channels, const A* from, int64_t step, T* to) {
    if (step == channels) return convert(from, pixels * channels, to);
    for (int64_t i = 0; i < pixels; ++i) convert(from + i * step, channels, to + i * channels);
}

// The same; and of what is stored its sum and the sum of squares around its own mean, [2, C].
template <class T, class A>
void store_product(int64_t pixels, int64_t channels, const A* from, int64_t step, T* to, A* sums) {
    by_vectors<kWidth<A>>(channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
        constexpr int w = decltype(width)::value;
        const auto value = [&](int64_t i) NASFAST_INLINE_LAMBDA {
            store_as<T, w>(to + i * channels + c, load<w>(from + i * step + c));
            return load_as<A, w>(to + i * channels + c);
        };
        const Vector<A, w> first = value(0);
        Vector<A, w> sum[bn::kLanes] = {}, squares[bn::kLanes] = {}, total, around;
        bn::by_lanes(0, pixels, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
            const Vector<A, w> d = value(i) - first;
            sum[lane] += d, squares[lane] += d * d;
        });
        finish_sums<A>(pixels, first, bn::total(sum), bn::total(squares), total, around);
        store<w>(sums + c, total), store<w>(sums + channels + c, around);
    });
}

#ifdef NASFAST_PAIRS
// A block of a product in bfloat16, and what that is in float32 to seen(row, vector, value).
template <int Rows, int Vectors, class Seen>
NASFAST_INLINE void store_block(const __m512 (&block)[Rows][Vectors], int64_t channels, int64_t column,
                                bfloat16* to, const Seen& seen) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
        const int64_t c = column + j * 16;
        const auto put = [&](int row, __m256i value) NASFAST_INLINE_LAMBDA {
            store_row(to + row * channels + c, c, channels, value);
            seen(row, j,
                 (__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, value), 16));
        };
#pragma GCC unroll 8
        for (int i = 0; i + 1 < Rows; i += 2) {
            const auto both = (Vector<uint64_t, 8>)_mm512_cvtne2ps_pbh(block[i + 1][j], block[i][j]);
            put(i, (__m256i)__builtin_shufflevector(both, both, 0, 1, 2, 3));
            put(i + 1, (__m256i)__builtin_shufflevector(both, both, 4, 5, 6, 7));
        }
        if constexpr (Rows % 2) put(Rows - 1, (__m256i)_mm512_cvtneps_pbh(block[Rows - 1][j]));
    }
}

// Of each column of a tile: its first pixel, and the sums around that, [3, padded columns].
struct BlockSums {
    float* values;
    int64_t padded;

    // Stores a block, from that row and column of the tile on, and adds what is stored.
    template <int Rows, int Vectors>
    NASFAST_INLINE void store(int64_t row, int64_t column, const __m512 (&block)[Rows][Vectors],
                              int64_t channels, bfloat16* to) const {
        __m512 first[Vectors], sum[Vectors], squares[Vectors];
        float* const own = values + column;
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) {
            sum[j] = squares[j] = _mm512_setzero_ps();
            if (row == 0) continue;
            first[j] = _mm512_loadu_ps(own + j * 16);
            sum[j] = _mm512_loadu_ps(own + padded + j * 16);
            squares[j] = _mm512_loadu_ps(own + 2 * padded + j * 16);
        }
        store_block(block, channels, column, to, [&](int i, int j, __m512 value) NASFAST_INLINE_LAMBDA {
            if (i == 0 && row == 0) first[j] = value;
            const __m512 d = value - first[j];
            sum[j] += d, squares[j] += d * d;
        });
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) {
            _mm512_storeu_ps(own + j * 16, first[j]);
            _mm512_storeu_ps(own + padded + j * 16, sum[j]);
            _mm512_storeu_ps(own + 2 * padded + j * 16, squares[j]);
        }
    }
    // sums [2, C] of a tile of so many pixels.
    void finish(int64_t pixels, int64_t channels, float* sums) const {
        for (int64_t c = 0; c < channels; ++c)
            finish_sums<float>(pixels, values[c], values[padded + c], values[2 * padded + c], sums[c],
                               sums[channels + c]);
    }
};
#endif

// The pointwise weights as the right operand of a product, element (k, j) at weight[k * row + j * column].
template <class Product, class A>
class Weights {
public:
    using Operand = typename Product::Operand;
    static constexpr int64_t kRowMultiple = Product::kRowMultiple;

    Weights(const A* weight, int64_t depth, int64_t columns, int64_t row, int64_t column)
        : panels(columns),
          depth_(round_up(depth, Product::kDepthMultiple)),
          packed_(depth_ * panels.padded()) {
        const Array<Operand> converted(depth * columns);
        convert(weight, depth * columns, converted.get());
        Product::pack(panels, depth_, 0, depth, converted.get(), row, column, packed_.get());
        Product::clear(panels, depth_, depth, depth_, packed_.get());
    }
    int64_t depth() const { return depth_; }  // elements of a row of the left operand
    // Elements of the scratch memory of a product.
    int64_t scratch() const { return round_up(kTile, Product::kRowMultiple) * panels.padded(); }
    // to [pixels, columns] = a @ weights.
    template <class T>
    void multiply(int64_t pixels, const Operand* a, A* scratch, T* to, Ahead ahead) const {
#ifdef NASFAST_PAIRS
        if constexpr (std::is_same_v<T, Operand>)
            return by_blocks(pixels, a, ahead,
                             [&](int64_t row, int64_t column, const auto& block) NASFAST_INLINE_LAMBDA {
                                 store_block(block, panels.columns, column, to + row * panels.columns,
                                             [](int, int, __m512) NASFAST_INLINE_LAMBDA {});
                             });
#endif
        product(pixels, a, scratch, ahead);
        store_product(pixels, panels.columns, scratch, panels.padded(), to);
    }
    // The same; and of what is stored its sum and the sum of squares around its own mean, [2, columns].
    template <class T>
    void multiply(int64_t pixels, const Operand* a, A* scratch, T* to, A* sums, Ahead ahead) const {
#ifdef NASFAST_PAIRS
        if constexpr (std::is_same_v<T, Operand>) {
            const BlockSums own = {scratch, panels.padded()};
            by_blocks(pixels, a, ahead,
                      [&](int64_t row, int64_t column, const auto& block) NASFAST_INLINE_LAMBDA {
                          own.store(row, column, block, panels.columns, to + row * panels.columns);
                      });
            return own.finish(pixels, panels.columns, sums);
        }
#endif
        product(pixels, a, scratch, ahead);
        store_product(pixels, panels.columns, scratch, panels.padded(), to, sums);
    }

    const typename Product::Panels panels;

private:
    // c [pixels, padded columns] = a @ weights.
    void product(int64_t pixels, const Operand* a, A* c, Ahead ahead) const {
        const int64_t rows = panel_rows(ceil_div(panels.vectors, panels.count));
        const int64_t step = round_up(rows, Product::kRowMultiple);
        ahead.divide(ceil_div(pixels, step));
        for (int64_t i = 0; i < pixels; i += step) {
            ahead();
            for (int64_t k = 0; k < depth_; k += Product::kDepth)
                Product::multiply(std::min(step, pixels - i), std::min(Product::kDepth, depth_ - k),
                                  a + i * depth_ + k, depth_, panels, packed_.get(), depth_, k,
                                  k ? Into::add : Into::assign, c + i * panels.padded(), panels.padded());
        }
    }
#ifdef NASFAST_PAIRS
    template <class Put>
    void by_blocks(int64_t pixels, const Operand* a, Ahead ahead, const Put& put) const {
        const int64_t rows = panel_rows(ceil_div(panels.vectors, panels.count));
        ahead.divide(std::max<int64_t>(1, panels.count * (pixels / rows)));
        Product::multiply(pixels, depth_, a, depth_, panels, packed_.get(),
                          [&](int64_t row, int64_t column, const auto& block)
                              NASFAST_INLINE_LAMBDA { put(row, column, block), ahead(); });
    }
#endif

    int64_t depth_;
    Array<Operand> packed_;
};

// Rows of a left operand with room for what the product reads beyond them.
template <class Product>
auto take_rows(Arena& arena, int64_t depth) {
    return arena.take<typename Product::Operand>(round_up(kTile, Product::kRowMultiple) * depth);
}

template <class Operand>
void clear_columns(int64_t pixels, int64_t begin, int64_t end, Operand* rows) {
    if (begin < end)
        for (int64_t i = 0; i < pixels; ++i)
            std::fill(rows + i * end + begin, rows + (i + 1) * end, Operand());
}

// A tile of a map as the left operand of a product: where it is, or in `rows`.
template <class T, class Weights, class Operand>
const Operand* operand(int64_t pixels, int64_t channels, const T* from, const Weights& weights,
                       Operand* rows) {
    if constexpr (std::is_same_v<T, Operand>)
        if (weights.depth() == channels && Weights::kRowMultiple == 1) return from;
    for (int64_t i = 0; i < pixels; ++i) convert(from + i * channels, channels, rows + i * weights.depth());
    clear_columns(pixels, channels, weights.depth(), rows);
    return rows;
}

}  // namespace nasfast::sep_conv::NASFAST_ISA
