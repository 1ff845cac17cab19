// Matrix product of bfloat16 operands into float32, on AVX512-BF16 or AMX. Included by sources of those
// instruction sets; see gemm.hpp for its arrangement. B is packed in pairs of rows, as both want it.
#pragma once

#include <immintrin.h>

#include "common/gemm.hpp"

namespace nasfast::NASFAST_ISA {

// How B is packed, into panels of at most `Most` vectors of sums.
template <int Most>
struct PairPacking {
    using Operand = bfloat16;
    using Panels = NASFAST_ISA::Panels<float, Most>;

    // Writes rows [0, depth) of `b` into the packed matrix, pairs of rows interleaved.
    static void pack(const Panels& panels, int64_t total, int64_t at, int64_t depth, const bfloat16* b,
                     int64_t b_row, int64_t b_column, bfloat16* packed) {
        for (int64_t panel = 0; panel < panels.count; ++panel) {
            const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
            for (int64_t j = 0; j < width; ++j) {
                const bfloat16* const from = b + (begin + j) * b_column;
                const bool real = begin + j < panels.columns;
                for (int64_t k = at; k < at + depth; ++k)
                    packed[total * begin + (k / 2 * width + j) * 2 + k % 2] =
                        real ? from[(k - at) * b_row] : bfloat16();
            }
        }
    }
    // Sets rows [begin, end) of the packed matrix to zero.
    static void clear(const Panels& panels, int64_t total, int64_t begin, int64_t end, bfloat16* packed) {
        const bfloat16 zero = bfloat16();
        for (int64_t k = begin; k < end; ++k) pack(panels, total, k, 1, &zero, 0, 0, packed);
    }
};

// Sums of the products of two tiles over their pixels: sum(i, j) of columns[pixel, i] * grad[pixel, j].
template <class Product>
class Bf16Outer {
public:
    Bf16Outer() = default;
    Bf16Outer(Arena& arena, int64_t most_rows, int64_t most_columns, int64_t pixels) {
        const int64_t padded = typename Product::Panels(most_rows).padded();
        const int64_t depth = round_up(pixels, Product::kDepthMultiple);
        const int64_t columns = round_up(most_columns, Product::kRowMultiple);
        packed_ = arena.take<bfloat16>(depth * padded), transposed_ = arena.take<bfloat16>(columns * depth);
        own_ = arena.take<float>(columns * padded);
    }
    // Elements of the sums.
    static int64_t size(int64_t rows, int64_t columns) {
        return round_up(columns, Product::kRowMultiple) * typename Product::Panels(rows).padded();
    }
    // Begins with sums of zero.
    void start(int64_t rows, int64_t columns) {
        resume(rows, columns, own_);
        std::fill_n(sums_, size(rows, columns), 0.0f);
    }
    // Goes on with sums that are kept elsewhere.
    void resume(int64_t rows, int64_t columns, float* sums) {
        rows_ = rows, columns_ = columns, padded_ = typename Product::Panels(rows).padded(), sums_ = sums;
    }
    void add(int64_t pixels, const float* columns, int64_t columns_row, const bfloat16* grad,
             int64_t grad_row) {
        const typename Product::Panels panels(rows_);
        const int64_t depth = round_up(pixels, Product::kDepthMultiple);
        for (int64_t pixel = 0; pixel < depth; pixel += 2)
            for (int64_t panel = 0; panel < panels.count; ++panel) {
                const int64_t begin = panels.begin(panel), width = panels.begin(panel + 1) - begin;
                const float* const from = columns + pixel * columns_row + begin;
                bfloat16* const to = packed_ + depth * begin + pixel * width;
                for (int64_t i = 0; i < width; i += 16) {
                    const auto row = [&](int64_t k) NASFAST_INLINE_LAMBDA {
                        return pixel + k < pixels ? bf16_bits(load<16>(from + k * columns_row + i))
                                                  : Vector<uint32_t, 16>{};
                    };
                    const auto pair = row(0) >> 16 | (row(1) & 0xffff0000);
                    store<16>(reinterpret_cast<uint32_t*>(to) + i, pair);
                }
            }
        for (int64_t j = 0; j < columns_; ++j)
            for (int64_t pixel = 0; pixel < depth; ++pixel)
                transposed_[j * depth + pixel] = pixel < pixels ? grad[pixel * grad_row + j] : bfloat16();
        for (int64_t k = 0; k < depth; k += Product::kDepth)
            Product::multiply(columns_, std::min(Product::kDepth, depth - k), transposed_ + k, depth, panels,
                              packed_, depth, k, Into::add, sums_, padded_);
    }
    float sum(int64_t i, int64_t j) const { return sums_[j * padded_ + i]; }

private:
    bfloat16 *packed_ = nullptr, *transposed_ = nullptr;
    float *own_ = nullptr, *sums_ = nullptr;
    int64_t rows_ = 0, columns_ = 0, padded_ = 0;
};

#if defined(__AMX_BF16__)

// Tiles of 16 x 16 sums; each instruction multiplies 16 x 32 by 32 x 16. Blocks of 2 x 2 tiles.
struct Bf16Product : PairPacking<2> {
    using Outer = Bf16Outer<Bf16Product>;
    static constexpr int64_t kDepthMultiple = 32, kDepth = 1024, kRowMultiple = 32;

    // The tile registers belong to the thread; its configuration is restored to none, as others expect it.
    static void multiply(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_row, const Panels& panels,
                         const bfloat16* packed, int64_t total, int64_t first, Into into, float* c,
                         int64_t c_row) {
        _tile_loadconfig(&kConfig);
        asm volatile("" ::: "memory");  // GCC 12 does not know how much the tile instructions read
        by_panel(panels, [&](auto vectors, int64_t begin) {
            constexpr int count = decltype(vectors)::value;
            const bfloat16* const b = packed + total * begin + first * count * 16;
            for (int64_t row = 0; row < rows; row += kRowMultiple)
                block<count>(depth, a + row * a_row, a_row, b, into, c + row * c_row + begin, c_row);
        });
        asm volatile("" ::: "memory");
        _tile_release();
    }

private:
    struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static constexpr Config kConfig = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

    template <int Vectors>
    static void block(int64_t depth, const bfloat16* a, int64_t a_row, const bfloat16* b, Into into, float* c,
                      int64_t c_row) {
        const int64_t a_bytes = a_row * 2, b_bytes = Vectors * 64, c_bytes = c_row * 4;
        float* const lower = c + 16 * c_row;
        if (into == Into::assign) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (Vectors == 2) {
                _tile_zero(2);
                _tile_zero(3);
            }
        } else {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, lower, c_bytes);
            if constexpr (Vectors == 2) {
                _tile_loadd(2, c + 16, c_bytes);
                _tile_loadd(3, lower + 16, c_bytes);
            }
        }
        for (int64_t k = 0; k < depth; k += 32) {
            const bfloat16* const pairs = b + k * Vectors * 16;
            _tile_loadd(4, a + k, a_bytes);
            _tile_loadd(6, pairs, b_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + 16 * a_row + k, a_bytes);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (Vectors == 2) {
                _tile_loadd(7, pairs + 32, b_bytes);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, lower, c_bytes);
        if constexpr (Vectors == 2) {
            _tile_stored(2, c + 16, c_bytes);
            _tile_stored(3, lower + 16, c_bytes);
        }
    }
};

#else

// As VectorProduct, with two rows of B in each instruction.
struct Bf16Product : PairPacking<kPanelVectors> {
    using Outer = Bf16Outer<Bf16Product>;
    static constexpr int64_t kDepthMultiple = 2, kDepth = 256, kRowMultiple = 1;

    static void multiply(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_row, const Panels& panels,
                         const bfloat16* packed, int64_t total, int64_t first, Into into, float* c,
                         int64_t c_row) {
        multiply(rows, depth, a, a_row, kTogether, panels, packed, total, first, Write{into, c, c_row});
    }
    // The same of an A that is packed in pairs as well, pairs of columns interleaved, `a_pair` elements a
    // pair.
    static void multiply_packed(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_pair,
                                const Panels& panels, const bfloat16* packed, Into into, float* c,
                                int64_t c_row) {
        multiply(rows, depth, a, kTogether, a_pair, panels, packed, depth, 0, Write{into, c, c_row});
    }
    // All of B. Calls put(row, column, sums) with blocks [rows][vectors] of the product, from that row and
    // column on.
    template <class Put>
    static void multiply(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_row, const Panels& panels,
                         const bfloat16* packed, const Put& put) {
        multiply(rows, depth, a, a_row, kTogether, panels, packed, depth, 0, put);
    }

private:
    static constexpr std::integral_constant<int64_t, 2> kTogether = {};

    // Element (i, k) of A is at a[i * a_row + k / 2 * a_pair + k % 2].
    template <class Row, class Pair, class Put>
    static void multiply(int64_t rows, int64_t depth, const bfloat16* a, Row a_row, Pair a_pair,
                         const Panels& panels, const bfloat16* packed, int64_t total, int64_t first,
                         const Put& put) {
        by_panel(panels, [&](auto vectors, int64_t begin) {
            constexpr int count = decltype(vectors)::value, full = panel_rows(count);
            const bfloat16* const b = packed + total * begin + first * count * 16;
            int64_t row = 0;
            for (; row + full <= rows; row += full)
                block<full, count>(depth, a + row * a_row, a_row, a_pair, b, row, begin, put);
            for (; row < rows; ++row)
                block<1, count>(depth, a + row * a_row, a_row, a_pair, b, row, begin, put);
        });
    }
    template <int Rows, int Vectors, class Row, class Pair, class Put>
    NASFAST_INLINE static void block(int64_t depth, const bfloat16* a, Row a_row, Pair a_pair,
                                     const bfloat16* b, int64_t at_row, int64_t at_column, const Put& put) {
        __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < depth; k += 2) {
            __m512bh row[Vectors];
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j)
                row[j] = (__m512bh)_mm512_loadu_si512(b + (k * Vectors + 2 * j) * 16);
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i) {
                int32_t pair;
                __builtin_memcpy(&pair, a + i * a_row + k / 2 * a_pair, sizeof(pair));
                const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, row[j]);
            }
        }
        put(at_row, at_column, sum);
    }
    // Puts blocks into C.
    struct Write {
        Into into;
        float* c;
        int64_t c_row;

        template <int Rows, int Vectors>
        NASFAST_INLINE void operator()(int64_t row, int64_t column,
                                       const __m512 (&sum)[Rows][Vectors]) const {
#pragma GCC unroll 16
            for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < Vectors; ++j) {
                    float* const to = c + (row + i) * c_row + column + j * 16;
                    const __m512 start = into == Into::add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                    _mm512_storeu_ps(to, _mm512_add_ps(start, sum[i][j]));
                }
        }
    };
};

#endif

}  // namespace nasfast::NASFAST_ISA
