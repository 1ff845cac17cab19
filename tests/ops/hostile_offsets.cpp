// Random calls of the CPU kernels of deform_conv2d with hostile offsets, checked by a plain implementation.
// test_hostile_offsets.py compiles it with sanitizers. Argument: the number of calls of each dtype.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "deform_conv2d/deform_conv2d.h"

namespace {

namespace dc = nasfast::deform_conv2d;
using nasfast::Accumulate;
using nasfast::bfloat16;
using Params = dc::Params;

std::mt19937_64 generator(1);

int64_t integer(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(generator);
}
bool chance(double probability) { return std::bernoulli_distribution(probability)(generator); }
double normal(double deviation) { return std::normal_distribution<double>(0, deviation)(generator); }
template <class T>
T pick(std::initializer_list<T> values) {
    return values.begin()[integer(0, values.size() - 1)];
}

double load(float value) { return value; }
double load(double value) { return value; }
double load(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}
void store(float& to, double value) { to = static_cast<float>(value); }
void store(double& to, double value) { to = value; }
void store(bfloat16& to, double value) {  // truncates, which keeps NaN, infinity and zero
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    to.bits = static_cast<uint16_t>(bits >> 16);
}

// A heap block that ends where the tensor ends. Its start may be aligned no better than T, as a view's.
template <class T>
struct Tensor {
    std::unique_ptr<T[]> block;
    T* data = nullptr;  // null where there is no such tensor
    int64_t size = 0;

    Tensor(int64_t size, bool present = true) : size(present ? size : 0) {
        if (!present) return;
        const int64_t shift = integer(0, 1);
        block.reset(new T[size + shift]);
        data = block.get() + shift;
        fill([] { return std::numeric_limits<double>::quiet_NaN(); });
    }
    template <class Draw>
    void fill(Draw draw) {
        for (int64_t i = 0; i < size; ++i) store(data[i], draw());
    }
};

// A number with the sum of the absolute values of its terms: what bounds its rounding errors.
struct Sum {
    double value = 0, magnitude = 0;
    Sum() = default;
    Sum(double value) : value(value), magnitude(std::fabs(value)) {}
    Sum& operator+=(Sum other) {
        value += other.value, magnitude += other.magnitude;
        return *this;
    }
    friend Sum operator*(Sum a, Sum b) {
        a.value *= b.value, a.magnitude *= b.magnitude;
        return a;
    }
};

template <class T>
constexpr double kTolerance = 2e-5;  // relative to Sum::magnitude
template <>
constexpr double kTolerance<double> = 1e-12;
template <>
constexpr double kTolerance<bfloat16> = 1.0 / 64;

Params draw_sizes() {
    Params p{};
    int64_t work;
    do {
        p.batch = pick<int64_t>({1, 1, 2, 3, 0});
        p.kernel_h = integer(1, 3), p.kernel_w = integer(1, 3);
        p.stride_h = integer(1, 3), p.stride_w = integer(1, 3);
        p.pad_h = integer(0, 3), p.pad_w = integer(0, 3);
        p.dilation_h = integer(1, 3), p.dilation_w = integer(1, 3);
        p.groups = pick<int64_t>({1, 1, 2, 3}), p.offset_groups = pick<int64_t>({1, 1, 2, 3});
        const int64_t both = p.groups == p.offset_groups ? p.groups : p.groups * p.offset_groups;
        p.channels = both * pick<int64_t>({1, 2, 3, 8, 16, 17, 40, 64, 100});
        p.out_channels = p.groups * pick<int64_t>({1, 2, 3, 8, 16, 17, 40, 64, 100});
        const int64_t most = pick<int64_t>({3, 9, 9, 30});
        p.height = integer(1, most), p.width = integer(1, most);
        p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
        p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
        work = p.batch * p.out_height * p.out_width * p.kernel_h * p.kernel_w * p.channels *
               (p.out_channels / p.groups);
    } while (p.height + 2 * p.pad_h <= p.dilation_h * (p.kernel_h - 1) ||
             p.width + 2 * p.pad_w <= p.dilation_w * (p.kernel_w - 1) || work > 100000);
    const int64_t samples = p.offset_groups * p.kernel_h * p.kernel_w;
    p.offset_step = 2 * samples + pick<int64_t>({0, 0, samples, 5});  // the next: as split((18, 9)) leaves it
    p.mask_step = samples + pick<int64_t>({0, 0, 2 * samples, 3});
    p.weight_channels_last = integer(0, 1);
    return p;
}

// An offset for a coordinate that would be `base` without it, in an image of `size` pixels.
template <class A>
A draw_offset(int64_t base, int64_t size, bool outside) {
    using Limits = std::numeric_limits<A>;
    const A none = Limits::quiet_NaN(), infinity = Limits::infinity(), most = Limits::max();
    const A huge =
        pick<A>({none, infinity, most, A(1e30), A(1e10), A(9.3e18), A(4294967296.0), A(2147483647)});
    const A tiny = pick<A>({A(0), Limits::denorm_min(), Limits::min(), Limits::epsilon()});
    const A sign = pick<A>({-1, 1});
    if (outside) return sign * huge;
    const A border = pick<A>({A(-1), A(0), A(size - 1), A(size)});
    switch (integer(0, 5)) {
        case 0:
            return sign * huge;
        case 1:
            return sign * tiny;
        case 2:
            return border - A(base);
        case 3:
            return std::nextafter(border, pick<A>({-infinity, infinity})) - A(base);
        case 4:
            return A(integer(-size, size));
        default:
            return A(normal(double(size)));
    }
}

template <class T>
struct Call {
    using A = Accumulate<T>;
    Params p;
    bool with_mask = chance(0.7);
    int64_t taps = p.kernel_h * p.kernel_w, samples = p.offset_groups * taps;
    int64_t pixels = p.batch * p.out_height * p.out_width;
    int64_t in = p.channels / p.groups, out = p.out_channels / p.groups;
    int64_t weights = p.out_channels * in * taps;

    Tensor<T> input{p.batch * p.height * p.width * p.channels};
    Tensor<A> offset{stepped(p.offset_step, 2 * samples)};
    Tensor<A> mask{stepped(p.mask_step, samples), with_mask};
    Tensor<T> weight{weights};
    Tensor<A> bias{p.out_channels, chance(0.7)};
    Tensor<T> grad{pixels * p.out_channels};

    Tensor<T> output{pixels * p.out_channels};
    Tensor<T> grad_input{input.size, chance(0.8)};
    Tensor<A> grad_offset{2 * pixels * samples, chance(0.8)};
    Tensor<A> grad_weight{weights, chance(0.8)};
    Tensor<A> grad_bias{p.out_channels, chance(0.8)};
    Tensor<A> grad_mask{pixels * samples, with_mask && chance(0.8)};

    explicit Call(const Params& sizes) : p(sizes) {
        const bool poisoned = chance(0.1);  // of a sample outside, not even NaN may show
        const bool outside = chance(0.1);
        input.fill([&] {
            const double value = normal(1);
            return poisoned && chance(outside ? 1 : 0.05) ? pick<double>({NAN, INFINITY, -INFINITY}) : value;
        });
        weight.fill([] { return normal(1); });
        bias.fill([] { return normal(1); });
        grad.fill([] { return normal(1); });
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            for (int64_t sample = 0; sample < samples; ++sample) {
                A* to = offset.data + pixel * p.offset_step + 2 * sample;
                const bool vertically = chance(0.5);
                to[0] = draw_offset<A>(base_y(pixel, sample % taps), p.height, outside && vertically);
                to[1] = draw_offset<A>(base_x(pixel, sample % taps), p.width, outside && !vertically);
                if (with_mask) mask.data[pixel * p.mask_step + sample] = A(pick({normal(1), 1.0, 0.0}));
            }
        }
    }

    // Elements of a slice of `used` channels out of `step`, up to its last one.
    int64_t stepped(int64_t step, int64_t used) const { return pixels ? (pixels - 1) * step + used : 0; }
    int64_t base_y(int64_t pixel, int64_t tap) const {
        return pixel / p.out_width % p.out_height * p.stride_h - p.pad_h + tap / p.kernel_w * p.dilation_h;
    }
    int64_t base_x(int64_t pixel, int64_t tap) const {
        return pixel % p.out_width * p.stride_w - p.pad_w + tap % p.kernel_w * p.dilation_w;
    }
    int64_t weight_at(int64_t out_channel, int64_t tap, int64_t channel) const {
        return p.weight_channels_last ? (out_channel * taps + tap) * in + channel
                                      : (out_channel * in + channel) * taps + tap;
    }

    void run() {
        const dc::Forward<T> tensors{input.data, offset.data, mask.data, weight.data, bias.data, output.data};
        const dc::Backward<T> gradients{grad.data,      input.data,      offset.data,      mask.data,
                                        weight.data,    grad_input.data, grad_offset.data, grad_weight.data,
                                        grad_bias.data, grad_mask.data};
        if constexpr (std::is_same_v<T, bfloat16>) {
            NASFAST_DISPATCH_BF16(dc, forward, p, tensors);
            NASFAST_DISPATCH_BF16(dc, backward, p, gradients);
        } else {
            NASFAST_DISPATCH(dc, forward, p, tensors);
            NASFAST_DISPATCH(dc, backward, p, gradients);
        }
    }

    // Whether every result is what the definition gives.
    bool check() const {
        std::vector<Sum> y(output.size), dx(input.size), dd(2 * pixels * samples), dw(weights),
            db(p.out_channels), dm(pixels * samples);
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            for (int64_t channel = 0; channel < p.out_channels; ++channel) {
                const int64_t at = pixel * p.out_channels + channel;
                if (bias.data) y[at] += bias.data[channel];
                db[channel] += load(grad.data[at]);
            }
            for (int64_t channel = 0; channel < p.channels; ++channel)
                for (int64_t tap = 0; tap < taps; ++tap) add(pixel, channel, tap, y, dx, dd, dw, dm);
        }
        if (!equal("output", output, y)) return false;
        return equal("grad_input", grad_input, dx) && equal("grad_offset", grad_offset, dd) &&
               equal("grad_weight", grad_weight, dw) && equal("grad_bias", grad_bias, db) &&
               equal("grad_mask", grad_mask, dm);
    }

    // Adds what one channel of one sample contributes.
    void add(int64_t pixel, int64_t channel, int64_t tap, std::vector<Sum>& y, std::vector<Sum>& dx,
             std::vector<Sum>& dd, std::vector<Sum>& dw, std::vector<Sum>& dm) const {
        const int64_t sample = channel / (p.channels / p.offset_groups) * taps + tap;
        const A* shift = offset.data + pixel * p.offset_step + 2 * sample;
        const A py = A(base_y(pixel, tap)) + shift[0], px = A(base_x(pixel, tap)) + shift[1];
        if (!(py > -1 && py < A(p.height) && px > -1 && px < A(p.width))) return;
        const double top = std::floor(py), left = std::floor(px), wy = py - top, wx = px - left;
        const Sum factor = with_mask ? mask.data[pixel * p.mask_step + sample] : 1;

        const int64_t first = channel / in * out, image = pixel / (p.out_height * p.out_width);
        Sum gradient;  // of the loss by the sample times its factor
        for (int64_t o = first; o < first + out; ++o)
            gradient += Sum(load(grad.data[pixel * p.out_channels + o])) *
                        load(weight.data[weight_at(o, tap, channel % in)]);

        Sum value, by_y, by_x;  // the sample and its derivatives
        for (int corner = 0; corner < 4; ++corner) {
            const int64_t row = int64_t(top) + corner / 2, column = int64_t(left) + corner % 2;
            if (row < 0 || row >= p.height || column < 0 || column >= p.width) continue;
            const double share_y = corner / 2 ? wy : 1 - wy, share_x = corner % 2 ? wx : 1 - wx;
            const int64_t at = ((image * p.height + row) * p.width + column) * p.channels + channel;
            const Sum pixel_value = load(input.data[at]);
            value += pixel_value * (share_y * share_x);
            by_y += pixel_value * (corner / 2 ? share_x : -share_x);
            by_x += pixel_value * (corner % 2 ? share_y : -share_y);
            dx[at] += gradient * factor * (share_y * share_x);
        }
        for (int64_t o = first; o < first + out; ++o) {
            const int64_t at = pixel * p.out_channels + o, at_weight = weight_at(o, tap, channel % in);
            y[at] += value * factor * load(weight.data[at_weight]);
            dw[at_weight] += value * factor * load(grad.data[at]);
        }
        dd[2 * (pixel * samples + sample)] += gradient * factor * by_y;
        dd[2 * (pixel * samples + sample) + 1] += gradient * factor * by_x;
        dm[pixel * samples + sample] += gradient * value;
    }

    // Whether all are within the tolerance: zero where nothing contributes. What poison reaches may be
    // anything.
    template <class Element>
    bool equal(const char* name, const Tensor<Element>& got, const std::vector<Sum>& wanted) const {
        constexpr double kUnderflow = 1e8 * std::numeric_limits<A>::min();  // what products may lose to it
        for (int64_t i = 0; i < got.size; ++i) {
            const Sum sum = wanted[i];
            if (!std::isfinite(sum.magnitude)) continue;
            const double bound = kTolerance<T> * sum.magnitude + kUnderflow;
            if (std::fabs(load(got.data[i]) - sum.value) <= bound) continue;
            std::printf("%s[%lld] must be %.17g within %.3g, got %.17g\n", name, static_cast<long long>(i),
                        sum.value, bound, load(got.data[i]));
            return false;
        }
        return true;
    }
};

struct {
    const char* dtype;
    int64_t index;
    Params sizes;
} current;  // call

void describe() {
    std::printf("in call %lld of %s; sizes in the order of Params:", static_cast<long long>(current.index),
                current.dtype);
    int64_t fields[sizeof(Params) / sizeof(int64_t)];
    std::memcpy(fields, &current.sizes, sizeof(fields));
    for (const int64_t field : fields) std::printf(" %lld", static_cast<long long>(field));
    std::printf("\n");
    std::fflush(stdout);
}

template <class T>
bool run(const char* dtype, int64_t calls) {
    for (int64_t i = 0; i < calls; ++i) {
        current = {dtype, i, draw_sizes()};
        Call<T> call(current.sizes);
        call.run();
        if (!call.check()) return false;
    }
    std::printf("%lld calls of %s\n", static_cast<long long>(calls), dtype);
    return true;
}

}  // namespace

int main(int, char** arguments) {
    const int64_t calls = std::atoll(arguments[1]);
    __sanitizer_set_death_callback(describe);
    std::printf("%s\n", nasfast::isa_name(nasfast::isa()));
    if (run<float>("float32", calls) && run<double>("float64", calls) && run<bfloat16>("bfloat16", calls))
        return 0;
    describe();
    return 1;
}
