// Both passes of sep_conv on the CPU. Included by per-ISA sources.
//
// Forward: a tile of pixels of the depthwise convolution is multiplied by the pointwise weights while it is
// in the cache, and the sums of the batch normalisation are taken of the product before it leaves; then
// batch_norm_relu's second pass. Backward: batch_norm_relu's sums; then the gradient of the product is made a
// tile at a time and multiplied at once by the weights and by the tile of the depthwise convolution; then
// both gradients of the depthwise convolution in one pass. The order of every sum is fixed by the sizes:
// results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "batch_norm_relu/batch_norm_relu.hpp"
#include "common/parallel.hpp"
#include "common/product.hpp"
#include "depthwise_conv2d/depthwise_conv2d.hpp"
#include "sep_conv/sep_conv.h"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;
namespace bn = batch_norm_relu::NASFAST_ISA;
namespace dw = depthwise_conv2d::NASFAST_ISA;

constexpr int64_t kTile = 64;    // pixels of a tile of a product
constexpr int64_t kBand = 512;   // pixels of a band of the depthwise convolution, about
constexpr int64_t kRows = 4;     // of a band, at least: the rows around it are read as well
constexpr int64_t kPart = 2048;  // pixels that one partial sum of the pointwise weights' gradient covers

inline batch_norm_relu::Params norm_params(const Params& p) {
    return {p.batch * p.out_height * p.out_width, p.out_channels, p.eps};
}

inline depthwise_conv2d::Params depthwise_params(const Params& p) {
    return {p.batch,    p.channels, p.height, p.width, p.out_height, p.out_width,
            p.kernel_h, p.kernel_w, p.pad_h,  p.pad_w, p.dilation_h, p.dilation_w};
}

// The same with input and output in each other's place: that whose output is the gradient of the input.
inline depthwise_conv2d::Params turned(depthwise_conv2d::Params d) {
    std::swap(d.height, d.out_height), std::swap(d.width, d.out_width);
    d.pad_h = d.dilation_h * (d.kernel_h - 1) - d.pad_h;
    d.pad_w = d.dilation_w * (d.kernel_w - 1) - d.pad_w;
    return d;
}

// Rows of an image, whose pixels lie together.
struct Band {
    int64_t image, row, rows;
    int64_t first, pixels;  // of the map
    int64_t tile;           // the first of its tiles among those of all bands
};

// A map divided into bands, and these into tiles.
class Bands {
public:
    Bands(int64_t batch, int64_t height, int64_t width) : height_(height), width_(width) {
        rows_ = std::clamp(kBand / width, std::min(kRows, height), height);
        per_image_ = ceil_div(height, rows_), full_ = ceil_div(rows_ * width, kTile);
        const int64_t last = (height - (per_image_ - 1) * rows_) * width;
        tiles_ = (per_image_ - 1) * full_ + ceil_div(last, kTile);
        count = batch * per_image_, tiles = batch * tiles_;
    }
    Band operator[](int64_t i) const {
        const int64_t image = i / per_image_, in_image = i % per_image_, row = in_image * rows_;
        const int64_t rows = std::min(rows_, height_ - row);
        return {image,         row,
                rows,          (image * height_ + row) * width_,
                rows * width_, image * tiles_ + in_image * full_};
    }
    // Pixels of a tile.
    int64_t pixels(int64_t tile) const {
        const int64_t in_image = tile % tiles_, band = in_image / full_;
        const int64_t rows = std::min(rows_, height_ - band * rows_);
        return std::min(kTile, rows * width_ - in_image % full_ * kTile);
    }
    int64_t most_rows() const { return rows_; }

    int64_t count, tiles;

private:
    int64_t height_, width_, rows_, per_image_, full_, tiles_;
};

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
    // c [pixels, padded columns] = a @ weights.
    void multiply(int64_t pixels, const Operand* a, A* c) const {
        for (int64_t k = 0; k < depth_; k += Product::kDepth)
            Product::multiply(pixels, std::min(Product::kDepth, depth_ - k), a + k, depth_, panels,
                              packed_.get(), depth_, k, k ? Into::add : Into::assign, c, panels.padded());
    }

    const typename Product::Panels panels;

private:
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

// The first `real` of Width elements, zeros behind them.
template <class A, int Width, class T>
NASFAST_INLINE Vector<A, Width> load_part(const T* from, int64_t real) {
    if (real == Width) return load_as<A, Width>(from);
    alignas(64) T part[Width] = {};
    for (int64_t i = 0; i < real; ++i) part[i] = from[i];
    return load_as<A, Width>(part);
}
template <int Width, class T, class V>
NASFAST_INLINE void store_part(T* to, V value, int64_t real) {
    if (real == Width) return store_as<T, Width>(to, value);
    alignas(64) T part[Width];
    store_as<T, Width>(part, value);
    for (int64_t i = 0; i < real; ++i) to[i] = part[i];
}

// A vector of channels of the rows that a band of a depthwise convolution reads, in the type of the sums,
// with the columns around the image: each element is converted once for all taps, and no tap needs a check.
// Channels beyond the last are zero.
template <class A>
class Slice {
public:
    static constexpr int kVector = kWidth<A>;

    Slice() = default;
    Slice(Arena& arena, const depthwise_conv2d::Params& d, int64_t rows)
        : length_(d.width + 2 * d.pad_w),
          taps_(d.kernel_h * d.kernel_w),
          values_(
              arena.take<A>(std::min(d.height, rows + (d.kernel_h - 1) * d.dilation_h) * length_ * kVector)),
          weights_(arena.take<A>(taps_ * kVector)),
          sums_(arena.take<A>(taps_ * kVector)) {}

    // For a band of outputs, the channels from c on.
    template <class T>
    void read(const depthwise_conv2d::Params& d, const Band& band, const T* image, const A* weights,
              int64_t c) {
        const int64_t real = std::min<int64_t>(kVector, d.channels - c);
        begin_ = std::max<int64_t>(0, band.row - d.pad_h);
        end_ = std::min(d.height, band.row + band.rows + (d.kernel_h - 1) * d.dilation_h - d.pad_h);
        A* to = values_;
        for (int64_t row = begin_; row < end_; ++row) {
            const T* from = image + row * d.width * d.channels + c;
            std::fill_n(to, d.pad_w * kVector, A(0)), to += d.pad_w * kVector;
            for (int64_t x = 0; x < d.width; ++x, from += d.channels, to += kVector)
                store<kVector>(to, load_part<A, kVector>(from, real));
            std::fill_n(to, d.pad_w * kVector, A(0)), to += d.pad_w * kVector;
        }
        for (int64_t tap = 0; tap < taps_; ++tap)
            store<kVector>(weights_ + tap * kVector,
                           load_part<A, kVector>(weights + tap * d.channels + c, real));
    }

    // Calls body(x, sums) with the outputs of row y, `step` pixels apart from x on.
    template <int Taps, int Pixels, class Step>
    NASFAST_INLINE void convolve(const depthwise_conv2d::Params& d, int64_t y, int64_t x, Step step,
                                 Vector<A, kVector> (&sum)[Pixels]) const {
        by_rows<Taps>(d, y, x, [&](const A* row, int64_t tap) NASFAST_INLINE_LAMBDA {
            Vector<A, kVector> factor[Taps];
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) factor[t] = load<kVector>(weights_ + (tap + t) * kVector);
#pragma GCC unroll 16
            for (int i = 0; i < Pixels + Taps - 1; ++i) {
                const auto value = load<kVector>(row + i * step * kVector);
#pragma GCC unroll 5
                for (int t = 0; t < Taps; ++t)
                    if (i - t >= 0 && i - t < Pixels) sum[i - t] += factor[t] * value;
            }
        });
    }
    // The same, and adds to the sums of the taps the products with what `own` has in the outputs' places.
    template <int Taps, int Pixels, class Step>
    NASFAST_INLINE void differentiate(const depthwise_conv2d::Params& d, int64_t y, int64_t x, Step step,
                                      const Vector<A, kVector> (&own)[Pixels],
                                      Vector<A, kVector> (&sum)[Pixels]) const {
        by_rows<Taps>(d, y, x, [&](const A* row, int64_t tap) NASFAST_INLINE_LAMBDA {
            Vector<A, kVector> factor[Taps], product[Taps];
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) {
                factor[t] = load<kVector>(weights_ + (tap + t) * kVector);
                product[t] = load<kVector>(sums_ + (tap + t) * kVector);
            }
#pragma GCC unroll 16
            for (int i = 0; i < Pixels + Taps - 1; ++i) {
                const auto value = load<kVector>(row + i * step * kVector);
#pragma GCC unroll 5
                for (int t = 0; t < Taps; ++t)
                    if (i - t >= 0 && i - t < Pixels) {
                        sum[i - t] += factor[t] * value;
                        product[t] += own[i - t] * value;
                    }
            }
#pragma GCC unroll 5
            for (int t = 0; t < Taps; ++t) store<kVector>(sums_ + (tap + t) * kVector, product[t]);
        });
    }
    A* sums() const { return sums_; }  // [taps, kVector]

private:
    // Calls body(inputs, tap) for each run of taps of output (y, x) whose inputs are in the image's rows.
    template <int Taps, class Body>
    NASFAST_INLINE void by_rows(const depthwise_conv2d::Params& d, int64_t y, int64_t x,
                                const Body& body) const {
        for (int64_t ky = 0; ky < d.kernel_h; ++ky) {
            const int64_t row = y - d.pad_h + ky * d.dilation_h;
            if (row < begin_ || row >= end_) continue;
            for (int64_t kx = 0; kx < d.kernel_w; kx += Taps)
                body(values_ + ((row - begin_) * length_ + x + kx * d.dilation_w) * kVector,
                     ky * d.kernel_w + kx);
        }
    }

    int64_t length_ = 0, taps_ = 0, begin_ = 0, end_ = 0;  // rows [begin, end)
    A *values_ = nullptr, *weights_ = nullptr, *sums_ = nullptr;
};

// Whether slices are worth their memory: not where most of a row would be padding, nor where padding that no
// output needs turns negative.
inline bool is_sliced(const depthwise_conv2d::Params& d) {
    return d.pad_w >= 0 && d.pad_w <= 2 * d.width + 32;
}

// Calls body(taps, pixels, step, x) for the tiles of a row, with taps, pixels and a step of 1 at compile
// time.
template <class A, class Body>
NASFAST_INLINE void by_tiles(const depthwise_conv2d::Params& d, const Body& body) {
    constexpr int most = dw::kPixels;
    dw::by_taps(d.kernel_w, [&](auto taps) NASFAST_INLINE_LAMBDA {
        if (d.dilation_w == 1)
            dw::by_tiles<most>(d.out_width, 1, [&](auto pixels, int64_t x) NASFAST_INLINE_LAMBDA {
                body(taps, pixels, std::integral_constant<int64_t, 1>(), x);
            });
        else
            dw::by_tiles<most>(d.out_width, d.dilation_w, [&](auto pixels, int64_t x) NASFAST_INLINE_LAMBDA {
                body(taps, pixels, d.dilation_w, x);
            });
    });
}

// A band of the depthwise convolution.
template <class T, class A = Accumulate<T>>
void convolve(const depthwise_conv2d::Params& d, const Band& band, const T* input, const A* weights,
              Slice<A>& slice, T* output) {
    constexpr int w = kWidth<A>;
    for (int64_t c = 0; c < d.channels; c += w) {
        const int64_t real = std::min<int64_t>(w, d.channels - c);
        slice.read(d, band, input + band.image * d.height * d.width * d.channels, weights, c);
        for (int64_t y = 0; y < band.rows; ++y) {
            T* const row = output + (band.first + y * d.out_width) * d.channels + c;
            by_tiles<A>(d, [&](auto taps, auto pixels, auto step, int64_t x) NASFAST_INLINE_LAMBDA {
                constexpr int count = decltype(pixels)::value;
                Vector<A, w> sum[count] = {};
                slice.template convolve<decltype(taps)::value>(d, band.row + y, x, step, sum);
#pragma GCC unroll 8
                for (int j = 0; j < count; ++j)
                    store_part<w>(row + (x + j * step) * d.channels, sum[j], real);
            });
        }
    }
}

// A band of the gradient of the input, of that of an image of outputs through the convolution `d`, turned;
// and of the band the gradient of the weights, [taps, C], in reverse order.
template <class T, class A = Accumulate<T>>
void differentiate(const depthwise_conv2d::Params& d, const Band& band, const T* grad, const A* weights,
                   const T* input, Slice<A>& slice, T* grad_input, A* grad_weight) {
    constexpr int w = kWidth<A>;
    const int64_t taps = d.kernel_h * d.kernel_w;
    for (int64_t c = 0; c < d.channels; c += w) {
        const int64_t real = std::min<int64_t>(w, d.channels - c);
        slice.read(d, band, grad, weights, c);
        std::fill_n(slice.sums(), taps * w, A(0));
        for (int64_t y = 0; y < band.rows; ++y) {
            const int64_t first = (band.first + y * d.out_width) * d.channels + c;
            by_tiles<A>(d, [&](auto at_once, auto pixels, auto step, int64_t x) NASFAST_INLINE_LAMBDA {
                constexpr int count = decltype(pixels)::value;
                const int64_t at = first + x * d.channels;
                Vector<A, w> sum[count] = {}, own[count];
#pragma GCC unroll 8
                for (int j = 0; j < count; ++j)
                    own[j] = load_part<A, w>(input + at + j * step * d.channels, real);
                slice.template differentiate<decltype(at_once)::value>(d, band.row + y, x, step, own, sum);
                if (grad_input)
#pragma GCC unroll 8
                    for (int j = 0; j < count; ++j)
                        store_part<w>(grad_input + at + j * step * d.channels, sum[j], real);
            });
        }
        for (int64_t tap = 0; tap < taps; ++tap)
            std::copy_n(slice.sums() + tap * w, real, grad_weight + tap * d.channels + c);
    }
}

// Asks for memory that will be read or written soon: products leave the memory idle.
template <class T>
NASFAST_INLINE void prefetch(const T* from, int64_t count) {
    const char* const at = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += Arena::kLine)
        __builtin_prefetch(at + i);
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

// to [pixels, channels] = a tile of a product, rows of `step`.
template <class T, class A>
void store_product(int64_t pixels, int64_t channels, const A* from, int64_t step, T* to) {
    if (step == channels) return convert(from, pixels * channels, to);
    for (int64_t i = 0; i < pixels; ++i) convert(from + i * step, channels, to + i * channels);
}

// Stores a tile of the product, and of what is stored its sum and the sum of squares around its own mean,
// [2, C]. They are taken around the first pixel, which is within the root of the number of pixels of standard
// deviations from the mean: few digits are lost.
template <class T, class A>
void store_with_sums(int64_t pixels, int64_t channels, const A* from, int64_t step, T* to, A* sums) {
    by_vectors<kWidth<A>>(channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
        constexpr int w = decltype(width)::value;
        const auto value = [&](int64_t i) NASFAST_INLINE_LAMBDA {
            store_as<T, w>(to + i * channels + c, load<w>(from + i * step + c));
            return load_as<A, w>(to + i * channels + c);
        };
        const Vector<A, w> first = value(0);
        Vector<A, w> sum[bn::kLanes] = {}, squares[bn::kLanes] = {};
        bn::by_lanes(0, pixels, [&](int lane, int64_t i) NASFAST_INLINE_LAMBDA {
            const Vector<A, w> d = value(i) - first;
            sum[lane] += d, squares[lane] += d * d;
        });
        const Vector<A, w> all = bn::total(sum);
        const Vector<A, w> around = bn::total(squares) - all * all / static_cast<A>(pixels);
        store<w>(sums + c, all + first * static_cast<A>(pixels));
        store<w>(sums + channels + c, around < 0 ? Vector<A, w>{} : around);
    });
}

template <class T, class Product = ProductOf<T>>
void forward_impl(const Params& p, const Forward<T>& t) {
    using A = Accumulate<T>;
    const auto d = depthwise_params(p);
    const auto n = norm_params(p);
    const auto taps = dw::arrange(d, t.depthwise, false);
    const Weights<Product, A> weights(t.pointwise, p.channels, p.out_channels, 1, p.channels);
    const Bands bands(p.batch, p.out_height, p.out_width);
    const int64_t padded = weights.panels.padded();
    const Array<A> sums(bands.tiles * 2 * p.out_channels);
    struct Scratch {
        Slice<A> slice;
        typename Product::Operand* rows;
        A* product;
    };
    const bool sliced = is_sliced(d);
    if (!sliced) dw::convolve(d, t.input, taps.get(), t.middle);
    const auto layout = [&](Arena& arena) {
        return Scratch{sliced ? Slice<A>(arena, d, bands.most_rows()) : Slice<A>(),
                       take_rows<Product>(arena, weights.depth()),
                       arena.take<A>(round_up(kTile, Product::kRowMultiple) * padded)};
    };
    parallel_for(bands.count, layout, [&](int64_t unit, Scratch& s) {
        const Band band = bands[unit];
        if (sliced) convolve(d, band, t.input, taps.get(), s.slice, t.middle);
        for (int64_t at = 0; at < band.pixels; at += kTile) {
            const int64_t pixels = std::min(kTile, band.pixels - at), first = band.first + at;
            weights.multiply(pixels,
                             operand(pixels, p.channels, t.middle + first * p.channels, weights, s.rows),
                             s.product);
            store_with_sums(pixels, p.out_channels, s.product, padded, t.raw + first * p.out_channels,
                            sums.get() + (band.tile + at / kTile) * 2 * p.out_channels);
        }
    });
    bn::combine(n, bands.tiles, [&](int64_t tile) { return bands.pixels(tile); }, sums.get(), t.statistics);
    bn::normalise(n, t.raw, t.weight, t.bias, t.statistics, t.output);
}

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

#ifdef NASFAST_BF16
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

// to [size] = the partial sums [parts, size], added up in order.
template <class A, class To>
void add_up(int64_t parts, int64_t size, const A* partial, const To& to) {
    constexpr int64_t run = 256;
    parallel_for(ceil_div(size, run), [&](int64_t unit) {
        const int64_t begin = unit * run, count = std::min(run, size - begin);
        A sum[run] = {};
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t i = 0; i < count; ++i) sum[i] += partial[part * size + begin + i];
        for (int64_t i = 0; i < count; ++i) to(begin + i, sum[i]);
    });
}

// Pixels of the pointwise convolution in parts, and of some images together in a group.
struct Groups {
    int64_t images, pixels, parts, count;  // of a group; parts of a group; groups

    Groups(int64_t batch, int64_t per_image)
        : images(std::max<int64_t>(1, kPart / per_image)),
          pixels(images * per_image),
          parts(ceil_div(pixels, kPart)),
          count(ceil_div(batch, images)) {}
};

template <class T, class Product = ProductOf<T>>
void backward_impl(const Params& p, const Backward<T>& t) {
    using A = Accumulate<T>;
    using Operand = typename Product::Operand;
    const auto n = norm_params(p);
    const bn::Sums<A> norm(n, t.grad, t.raw, t.weight, t.bias, t.statistics, t.grad_weight, t.grad_bias);
    const Weights<Product, A> weights(t.pointwise, p.out_channels, p.channels, p.channels, 1);
    const Groups groups(p.batch, p.out_height * p.out_width);
    const int64_t padded = weights.panels.padded(), parts = groups.count * groups.parts;
    const int64_t size = round_up(p.out_channels, Product::kRowMultiple) * padded;
    const Array<A> partial(parts * size);

    const auto d = depthwise_params(p), back = turned(d);
    const auto taps_weights = dw::arrange(d, t.depthwise, true);
    const int64_t taps = p.kernel_h * p.kernel_w, taps_size = taps * p.channels;
    const Bands bands(p.batch, p.height, p.width);
    const Array<A> taps_partial(bands.count * taps_size);

    const bool sliced = is_sliced(back);
    struct Scratch {
        Slice<A> slice;
        Outer<Product> outer;
        Operand* rows;
        A* product;
        T* grad_middle;
    };
    const auto layout = [&](Arena& arena, int64_t pixels) {
        return Scratch{sliced ? Slice<A>(arena, back, bands.most_rows()) : Slice<A>(),
                       {arena, p.out_channels, p.channels},
                       take_rows<Product>(arena, weights.depth()),
                       arena.take<A>(round_up(kTile, Product::kRowMultiple) * padded),
                       arena.take<T>(pixels * p.channels)};
    };
    // grad_middle, that of the depthwise convolution, of a part; and its share of grad_pointwise
    const auto pointwise = [&](int64_t part, Scratch& s, T* grad_middle) {
        A* const sums = partial.get() + part * size;
        std::fill_n(sums, size, A(0));
        const int64_t group = part / groups.parts * groups.pixels, begin = part % groups.parts * kPart;
        const int64_t end = std::min({begin + kPart, groups.pixels, n.pixels - group});
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t pixels = std::min(kTile, end - at), first = group + at;
            by_vectors<kWidth<A>>(p.out_channels, [&](auto width, int64_t c) NASFAST_INLINE_LAMBDA {
                constexpr int w = decltype(width)::value;
                const auto slopes = norm.template slopes<w>(c);
                for (int64_t i = 0; i < pixels; ++i) {
                    const int64_t from = (first + i) * p.out_channels + c;
                    store_as<Operand, w>(s.rows + i * weights.depth() + c,
                                         slopes(t.grad + from, t.raw + from));
                }
            });
            const int64_t next = std::min(kTile, n.pixels - first - pixels);
            prefetch(t.grad + (first + pixels) * p.out_channels, next * p.out_channels);
            prefetch(t.raw + (first + pixels) * p.out_channels, next * p.out_channels);
            prefetch(t.middle + first * p.channels, pixels * p.channels);
            clear_columns(pixels, p.out_channels, weights.depth(), s.rows);
            weights.multiply(pixels, s.rows, s.product);
            store_product(pixels, p.channels, s.product, padded, grad_middle + at * p.channels);
            s.outer.add(pixels, p.out_channels, s.rows, weights.depth(), p.channels,
                        t.middle + first * p.channels, sums);
        }
    };
    // grad_input of a band, and its share of grad_depthwise; grad_middle begins with the band's image
    const auto depthwise = [&](int64_t band, Scratch& s, const T* grad_middle) {
        differentiate(back, bands[band], grad_middle, taps_weights.get(), t.input, s.slice, t.grad_input,
                      taps_partial.get() + band * taps_size);
    };
    const int64_t image_size = p.out_height * p.out_width * p.channels;
    const int64_t bands_of_image = bands.count / std::max<int64_t>(1, p.batch);
    if (sliced && (groups.count >= 2 * omp_get_max_threads() || omp_get_max_threads() == 1)) {
        // what lies between the two stays in the cache
        parallel_for(
            groups.count, [&](Arena& arena) { return layout(arena, groups.pixels); },
            [&](int64_t group, Scratch& s) {
                for (int64_t part = 0; part < groups.parts; ++part)
                    pointwise(group * groups.parts + part, s, s.grad_middle);
                const int64_t end = std::min(p.batch, (group + 1) * groups.images);
                for (int64_t image = group * groups.images; image < end; ++image)
                    for (int64_t band = 0; band < bands_of_image; ++band)
                        depthwise(image * bands_of_image + band, s,
                                  s.grad_middle + image % groups.images * image_size);
            });
    } else {
        const Array<T> grad_middle(n.pixels * p.channels);
        const auto alone = [&](Arena& arena) { return layout(arena, 0); };
        parallel_for(parts, alone, [&](int64_t part, Scratch& s) {
            pointwise(part, s, grad_middle.get() + part / groups.parts * groups.pixels * p.channels);
        });
        if (!sliced) {
            if (t.grad_input) dw::convolve(back, grad_middle.get(), taps_weights.get(), t.grad_input);
            dw::correlate(d, grad_middle.get(), t.input, t.grad_depthwise);
        }
        parallel_for(sliced ? bands.count : 0, alone, [&](int64_t band, Scratch& s) {
            depthwise(band, s, grad_middle.get() + band / bands_of_image * image_size);
        });
    }
    add_up(parts, size, partial.get(), [&](int64_t i, A sum) {
        const int64_t row = i / padded, column = i % padded;
        if (row < p.out_channels && column < p.channels) t.grad_pointwise[row * p.channels + column] = sum;
    });
    if (sliced)
        add_up(bands.count, taps_size, taps_partial.get(), [&](int64_t i, A sum) {
            t.grad_depthwise[i % p.channels * taps + taps - 1 - i / p.channels] = sum;
        });
}

}  // namespace nasfast::sep_conv::NASFAST_ISA
