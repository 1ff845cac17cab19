// What sep_conv does in pairs of bfloat16 on AVX512-BF16: each instruction multiplies two pixels of 16
// channels. AMX's processors are slower at it than at float32. Included by per-ISA sources.
#pragma once

#if defined(NASFAST_BF16) && !defined(__AMX_BF16__)
#define NASFAST_PAIRS

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"
#include "common/product.hpp"
#include "depthwise_conv2d/depthwise_conv2d.h"
#include "sep_conv/bands.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

// Of the 16 channels from c on, those that exist.
inline __mmask16 real_lanes(int64_t c, int64_t channels) {
    return channels - c >= 16 ? 0xffff : (1u << (channels - c)) - 1;
}

// 16 elements of each of two rows, side by side in 32 bits.
NASFAST_INLINE __m512i interleave(__m512i rows) {
    const auto order = (Vector<uint16_t, 32>){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_maskz_permutexvar_epi16(~0u, (__m512i)order, rows);
}
NASFAST_INLINE __m512i load_rows(const bfloat16* low, __mmask16 in_low, const bfloat16* high,
                                 __mmask16 in_high) {
    return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(in_low, low)),
                                    _mm256_maskz_loadu_epi16(in_high, high), 1);
}
// The 16 channels from c on, as far as they exist.
NASFAST_INLINE void store_row(bfloat16* to, int64_t c, int64_t channels, __m256i value) {
    if (channels - c >= 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
    else
        _mm256_mask_storeu_epi16(to, real_lanes(c, channels), value);
}
NASFAST_INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 16 channels of the rows that a band of a depthwise convolution reads. Pixels that neighbouring taps meet,
// `dilation` apart, lie together as a phase of the row, with the columns around the image, in pairs. A pair
// of neighbouring outputs reads the same pairs: the first of them with the taps in pairs (0, 1), (2, 3), ..,
// the second with (none, 0), (1, 2), ..
class PairSlice {
public:
    PairSlice() = default;
    PairSlice(Arena& arena, const depthwise_conv2d::Params& d, int64_t rows)
        : phases_(std::min(d.dilation_w, d.out_width)),
          length_(ceil_div(ceil_div(d.out_width, d.dilation_w), 2) + d.kernel_w / 2 + 1),
          row_(phases_ * length_ * kLanes),
          taps_(d.kernel_h * round_up(d.kernel_w, 2)),
          values_(arena.take<uint32_t>(std::min(d.height, rows + (d.kernel_h - 1) * d.dilation_h) * row_)),
          weights_(arena.take<uint32_t>(2 * (taps_ + d.kernel_h) * kLanes)),
          sums_(arena.take<float>(taps_ * kLanes)) {}

    // A band of the convolution with weights [taps, C].
    void convolve(const depthwise_conv2d::Params& d, const Band& band, const bfloat16* input,
                  const float* weights, bfloat16* output) {
        const int64_t image = band.image * d.height * d.width * d.channels;
        by_row(d, [&](auto taps) {
            for (int64_t c = 0; c < d.channels; c += kLanes) {
                read<decltype(taps)::value>(d, band, input + image, weights, c);
                by_tiles(d, band,
                         [&](auto pairs, int64_t y, int64_t phase, int64_t pair) NASFAST_INLINE_LAMBDA {
                             constexpr int count = decltype(pairs)::value;
                             __m512 sum[2 * count];
#pragma GCC unroll 8
                             for (int j = 0; j < 2 * count; ++j) sum[j] = _mm512_setzero_ps();
                             convolve_tile<decltype(taps)::value, count>(d, band.row + y, phase, pair, sum);
                             store<count>(d, y, phase, pair, c, sum, output + band.first * d.channels);
                         });
            }
        });
    }

    // A band of the gradient of the input, of that of the outputs through the convolution `d`, turned; null:
    // not wanted. And of the band the gradient of the weights, [taps, C], in reverse order.
    void differentiate(const depthwise_conv2d::Params& d, const Band& band, const bfloat16* grad,
                       const float* weights, const bfloat16* input, bfloat16* grad_input,
                       float* grad_weight) {
        by_row(d, [&](auto taps) {
            constexpr int at_once = decltype(taps)::value;
            const int64_t in_row = round_up(d.kernel_w, at_once);
            for (int64_t c = 0; c < d.channels; c += kLanes) {
                const __mmask16 real = real_lanes(c, d.channels);
                read<at_once>(d, band, grad, weights, c);
                std::fill_n(sums_, d.kernel_h * in_row * kLanes, 0.0f);
                by_tiles(
                    d, band, [&](auto pairs, int64_t y, int64_t phase, int64_t pair) NASFAST_INLINE_LAMBDA {
                        constexpr int count = decltype(pairs)::value;
                        const bfloat16* const from = input + (band.first + y * d.out_width) * d.channels + c;
                        __m512i own[count];
#pragma GCC unroll 4
                        for (int j = 0; j < count; ++j) {
                            const int64_t x = phase + 2 * (pair + j) * d.dilation_w, next = x + d.dilation_w;
                            if (c == 0) {
                                ask(from + (x + kAhead * d.dilation_w) * d.channels, d);
                                if (grad_input)
                                    ask(grad_input + (from - input) +
                                            (x + kAhead * d.dilation_w) * d.channels,
                                        d);
                            }
                            own[j] =
                                interleave(load_rows(from + x * d.channels, real, from + next * d.channels,
                                                     next < d.out_width ? real : 0));
                        }
                        __m512 sum[2 * count];
#pragma GCC unroll 8
                        for (int j = 0; j < 2 * count; ++j) sum[j] = _mm512_setzero_ps();
                        differentiate_tile<at_once, count>(d, band.row + y, phase, pair, own, sum);
                        if (grad_input)
                            store<count>(d, y, phase, pair, c, sum, grad_input + band.first * d.channels);
                    });
                for (int64_t tap = 0; tap < d.kernel_h * d.kernel_w; ++tap)
                    std::copy_n(sums_ + (tap / d.kernel_w * in_row + tap % d.kernel_w) * kLanes,
                                std::min(kLanes, d.channels - c), grad_weight + tap * d.channels + c);
            }
        });
    }

private:
    static constexpr int64_t kLanes = 16;
    static constexpr int kPairs = 4;           // of a tile, at most
    static constexpr int kAhead = 4 * kPairs;  // outputs: their memory is asked for

    // Asks for the memory of all channels of a pair of pixels.
    NASFAST_INLINE static void ask(const bfloat16* at, const depthwise_conv2d::Params& d) {
        for (int64_t c = 0; c < d.channels; c += Arena::kLine / 2)
            __builtin_prefetch(at + c), __builtin_prefetch(at + d.dilation_w * d.channels + c);
    }

    // Calls body(taps) with the number of taps that a tile takes at once: a row of the kernel, or two.
    template <class Body>
    static void by_row(const depthwise_conv2d::Params& d, const Body& body) {
        if (d.kernel_w == 3)
            body(std::integral_constant<int, 3>());
        else if (d.kernel_w == 5)
            body(std::integral_constant<int, 5>());
        else
            body(std::integral_constant<int, 2>());
    }

    // Calls body(pairs, y, phase, pair) for the tiles of a band.
    template <class Body>
    NASFAST_INLINE void by_tiles(const depthwise_conv2d::Params& d, const Band& band,
                                 const Body& body) const {
        for (int64_t y = 0; y < band.rows; ++y)
            for (int64_t phase = 0; phase < phases_; ++phase)
                by_vectors<kPairs>(ceil_div(ceil_div(d.out_width - phase, d.dilation_w), 2),
                                   [&](auto pairs, int64_t pair)
                                       NASFAST_INLINE_LAMBDA { body(pairs, y, phase, pair); });
    }

    // Pairs of weights for the first and the second of two outputs, [taps / Taps, Taps / 2 + 1, 2].
    template <int Taps>
    void arrange(const depthwise_conv2d::Params& d, const float* weights, __mmask16 real) {
        uint32_t* to = weights_;
        for (int64_t ky = 0; ky < d.kernel_h; ++ky)
            for (int64_t kx = 0; kx < d.kernel_w; kx += Taps) {
                const auto weight = [&](int64_t t) NASFAST_INLINE_LAMBDA {
                    const bool exists = t >= 0 && t < Taps && kx + t < d.kernel_w;
                    return _mm512_maskz_loadu_ps(exists ? real : 0,
                                                 weights + (ky * d.kernel_w + kx + t) * d.channels);
                };
                for (int64_t t = 0; t <= Taps; t += 2)
                    for (int64_t second = 0; second < 2; ++second, to += kLanes) {
                        const auto pair = _mm512_cvtne2ps_pbh(weight(t + 1 - second), weight(t - second));
                        NASFAST_ISA::store<16>(to, (Vector<uint32_t, 16>)interleave((__m512i)pair));
                    }
            }
    }

    template <int Taps>
    void read(const depthwise_conv2d::Params& d, const Band& band, const bfloat16* image,
              const float* weights, int64_t c) {
        const __mmask16 real = real_lanes(c, d.channels);
        const int64_t step = d.dilation_w;
        begin_ = std::max<int64_t>(0, band.row - d.pad_h);
        end_ = std::min(d.height, band.row + band.rows + (d.kernel_h - 1) * d.dilation_h - d.pad_h);
        uint32_t* to = values_;
        for (int64_t row = begin_; row < end_; ++row) {
            const bfloat16* const from = image + row * d.width * d.channels + c;
            for (int64_t phase = 0; phase < phases_; ++phase) {
                int64_t x = phase - d.pad_w;
                for (int64_t pair = 0; pair < length_; ++pair, x += 2 * step, to += kLanes) {
                    const bool low = x >= 0 && x < d.width, high = x + step >= 0 && x + step < d.width;
                    const auto rows = load_rows(from + (low ? x * d.channels : 0), low ? real : 0,
                                                from + (high ? (x + step) * d.channels : 0), high ? real : 0);
                    NASFAST_ISA::store<16>(to, (Vector<uint32_t, 16>)interleave(rows));
                }
            }
        }
        arrange<Taps>(d, weights + c, real);
    }

    // Calls body(pairs, weights, tap) for each run of taps of output row y whose inputs are in the image.
    template <int Taps, class Body>
    NASFAST_INLINE void by_taps(const depthwise_conv2d::Params& d, int64_t y, int64_t phase, int64_t pair,
                                const Body& body) const {
        const uint32_t* weights = weights_;
        const uint32_t* const first = values_ + (phase * length_ + pair) * kLanes;
        float* sums = sums_;
        int64_t at = y - d.pad_h;
        for (int64_t ky = 0; ky < d.kernel_h; ++ky, at += d.dilation_h)
            for (int64_t kx = 0; kx < d.kernel_w; kx += Taps) {
                if (at >= begin_ && at < end_)
                    body(first + (at - begin_) * row_ + kx / 2 * kLanes, weights, sums);
                weights += 2 * (Taps / 2 + 1) * kLanes, sums += Taps * kLanes;
            }
    }

    // Adds to sums the products of a pair of inputs with the taps of each output that reads it.
    template <int Taps, int Pairs>
    NASFAST_INLINE static void add(int i, __m512i value, const __m512i (&weight)[2 * (Taps / 2 + 1)],
                                   __m512 (&sum)[2 * Pairs]) {
#pragma GCC unroll 3
        for (int k = 0; k <= Taps / 2; ++k)
            if (i - k >= 0 && i - k < Pairs) {
                if (2 * k < Taps) sum[2 * (i - k)] = add_products(sum[2 * (i - k)], value, weight[2 * k]);
                sum[2 * (i - k) + 1] = add_products(sum[2 * (i - k) + 1], value, weight[2 * k + 1]);
            }
    }

    template <int Taps, int Pairs>
    NASFAST_INLINE void convolve_tile(const depthwise_conv2d::Params& d, int64_t y, int64_t phase,
                                      int64_t pair, __m512 (&sum)[2 * Pairs]) const {
        constexpr int k = Taps / 2 + 1;
        by_taps<Taps>(d, y, phase, pair,
                      [&](const uint32_t* from, const uint32_t* weights, const float*) NASFAST_INLINE_LAMBDA {
                          __m512i weight[2 * k];
#pragma GCC unroll 6
                          for (int i = 0; i < 2 * k; ++i) weight[i] = (__m512i)load<16>(weights + i * kLanes);
#pragma GCC unroll 8
                          for (int i = 0; i < Pairs + k - 1; ++i)
                              add<Taps, Pairs>(i, (__m512i)load<16>(from + i * kLanes), weight, sum);
                      });
    }

    // The same, and adds to the sums of the taps the products with what `own` has in the outputs' places. An
    // odd tap meets the second of one pair and the first of the next, which pair with `own` exchanged.
    template <int Taps, int Pairs>
    NASFAST_INLINE void differentiate_tile(const depthwise_conv2d::Params& d, int64_t y, int64_t phase,
                                           int64_t pair, const __m512i (&own)[Pairs],
                                           __m512 (&sum)[2 * Pairs]) const {
        constexpr int k = Taps / 2 + 1;
        __m512i exchanged[Pairs];
#pragma GCC unroll 4
        for (int j = 0; j < Pairs; ++j) exchanged[j] = _mm512_maskz_rol_epi32(0xffff, own[j], 16);
        by_taps<Taps>(d, y, phase, pair,
                      [&](const uint32_t* from, const uint32_t* weights, float* sums) NASFAST_INLINE_LAMBDA {
                          __m512i weight[2 * k], before;
                          __m512 product[Taps];
#pragma GCC unroll 6
                          for (int i = 0; i < 2 * k; ++i) weight[i] = (__m512i)load<16>(weights + i * kLanes);
#pragma GCC unroll 5
                          for (int t = 0; t < Taps; ++t) product[t] = (__m512)load<16>(sums + t * kLanes);
#pragma GCC unroll 8
                          for (int i = 0; i < Pairs + k - 1; ++i) {
                              const auto value = (__m512i)load<16>(from + i * kLanes);
                              add<Taps, Pairs>(i, value, weight, sum);
#pragma GCC unroll 5
                              for (int t = 0; t < Taps; ++t) {
                                  const int j = i - (t + 1) / 2;
                                  if (j < 0 || j >= Pairs) continue;
                                  if (t % 2)
                                      product[t] =
                                          add_products(product[t], exchanged[j],
                                                       _mm512_mask_blend_epi16(0xaaaaaaaa, value, before));
                                  else
                                      product[t] = add_products(product[t], own[j], value);
                              }
                              before = value;
                          }
#pragma GCC unroll 5
                          for (int t = 0; t < Taps; ++t)
                              NASFAST_ISA::store<16>(sums + t * kLanes, (Vector<float, 16>)product[t]);
                      });
    }

    template <int Pairs>
    NASFAST_INLINE static void store(const depthwise_conv2d::Params& d, int64_t y, int64_t phase,
                                     int64_t pair, int64_t c, const __m512 (&sum)[2 * Pairs],
                                     bfloat16* band) {
        bfloat16* const row = band + y * d.out_width * d.channels + c;
        const auto put = [&](int64_t x, __m256i value) NASFAST_INLINE_LAMBDA {
            if (x < d.out_width) store_row(row + x * d.channels, c, d.channels, value);
        };
#pragma GCC unroll 4
        for (int j = 0; j < Pairs; ++j) {
            const int64_t x = phase + 2 * (pair + j) * d.dilation_w;
            const auto both = (Vector<uint64_t, 8>)_mm512_cvtne2ps_pbh(sum[2 * j + 1], sum[2 * j]);
            put(x, (__m256i)__builtin_shufflevector(both, both, 0, 1, 2, 3));
            put(x + d.dilation_w, (__m256i)__builtin_shufflevector(both, both, 4, 5, 6, 7));
        }
    }

    int64_t phases_ = 0, length_ = 0, row_ = 0, taps_ = 0;  // phases; pairs of one; elements of a row
    int64_t begin_ = 0, end_ = 0;                           // rows [begin, end)
    uint32_t *values_ = nullptr, *weights_ = nullptr;
    float* sums_ = nullptr;
};

}  // namespace nasfast::sep_conv::NASFAST_ISA

#endif
