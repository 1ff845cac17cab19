// Backward. With g the gradient of the output, a raw map's is factor * scale * g where the normalisation is
// fixed, and slope * g + constant + weight * raw where it is by the batch. Everything about factors, scales
// and shifts follows from sums over the pixels of g and of g times a raw map. Fixed normalisation has no raw
// maps: the kernels' gradients by g alone, times the kernels, are those sums.
//
// Sums over pixels have a fixed order, but for what the samples of the deformable branch add to the gradient
// of the input: atomics add in the order in which they come, unless Params::deterministic asks for ExactSums.
#pragma once

#include "mixed_op/mixed_op_deform.cuh"
#include "mixed_op/mixed_op_forward.cuh"
#include "mixed_op/mixed_op_weight.cuh"

namespace nasfast::mixed_op::cuda {

// ---- sums over pixels, per channel

// Slots of a part: sum of grad, of grad * input, of grad * (raw - mean) for up to four maps.
enum Slot { kOfGrad, kOfInput, kOfRaw, kSlots = kOfRaw + 4 };

template <class T>
struct SummedMaps {
    const T* grad;  // [pixels, C] with grad_step
    const T* input;
    const T* raw[4];
    int of_map[4];  // of Normalisation
    int64_t pixels;
    int channels, grad_step, slots;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads, 4)
    sum_kernel(const ChannelGrid g, const SummedMaps<T> maps, const Normalisation<Accumulate<T>> norm,
               Accumulate<T>* parts) {
    using A = Accumulate<T>;
    auto* shared = shared_memory<A>();  // [kElementThreads]
    const int c = g.channel();
    const bool active = c < maps.channels && g.row() < g.rows;
    A sums[kSlots] = {}, means[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (active && maps.raw[i]) means[i] = norm.mean(maps.of_map[i], c);
    if (active)
#pragma unroll 4
        for (int64_t pixel = int64_t(blockIdx.x) * g.rows + g.row(); pixel < maps.pixels;
             pixel += int64_t(gridDim.x) * g.rows) {
            const int64_t at = pixel * maps.channels + c;
            const A grad = widen(maps.grad[pixel * maps.grad_step + c]);
            sums[kOfGrad] += grad;
            if (maps.input) sums[kOfInput] += grad * widen(maps.input[at]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (maps.raw[i]) sums[kOfRaw + i] += grad * (widen(maps.raw[i][at]) - means[i]);
        }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
        if (slot >= maps.slots) break;
        __syncthreads();
        shared[threadIdx.x] = sums[slot];
        __syncthreads();
        if (!active || g.row() > 0) continue;
        A sum = 0;
        for (int row = 0; row < g.rows; ++row) sum += shared[row * g.abreast + threadIdx.x];
        parts[(int64_t(blockIdx.x) * maps.slots + slot) * maps.channels + c] = sum;
    }
}

// Parts [number, slots, C].
template <class A>
struct Parts {
    A* sums;
    int number, slots;
};
constexpr int kMostParts = 256;

template <class T>
Parts<Accumulate<T>> sum_pixels(const SummedMaps<T>& maps, const Normalisation<Accumulate<T>>& norm,
                                Accumulate<T>* memory, void* stream) {
    const ChannelGrid g(maps.channels);
    const dim3 grid = g.grid(maps.pixels, maps.channels, kMostParts);
    launch("mixed_op: sum", NASFAST_KERNEL(sum_kernel<T>), grid, kElementThreads,
           kElementThreads * int64_t(sizeof(Accumulate<T>)), stream, g, maps, norm, memory);
    return {memory, int(grid.x), maps.slots};
}

// ---- gradients of the normalisation

// What the sums say of one map, or of skip.
template <class A>
struct Outcome {
    enum Kind { normalised, skip, absent } kind;
    int map;
    const A* products;  // [C] sums of grad * raw, instead of the slot; null: the slot
    int slot;           // of the parts
    const A* factor;    // null: 1
    const A* bias;      // of products that lack it
    A* grad_factor;     // every pointer may be null
    A* grad_bias;       // [C]
    A* grad_scale;      // [C]
    A* grad_shift;      // [C]
    A* coefficients;    // [3, C] of the raw map's gradient: slope, constant, weight
};
template <class A>
struct Outcomes {
    static constexpr int most = kFactors + 1;
    Outcome<A> list[most];
    int count = 0;

    void add(const Outcome<A>& outcome) { list[count++] = outcome; }
};

// A block for each.
template <class A>
__global__ void __launch_bounds__(kElementThreads)
    outcome_kernel(const Outcomes<A> outcomes, const Parts<A> parts, const Normalisation<A> norm,
                   const int64_t pixels) {
    const Outcome<A>& o = outcomes.list[blockIdx.x];
    const int lane = threadIdx.x % 32, channels = norm.channels;
    const auto sum_of = [&](int slot, int c) {
        A sum = 0;
        for (int part = lane; part < parts.number; part += 32)
            sum += parts.sums[(int64_t(part) * parts.slots + slot) * channels + c];
        return warp_sum(sum);
    };
    const A factor = o.factor ? *o.factor : 1;
    A total = 0;  // of this warp's channels
    for (int c = int(threadIdx.x) / 32; c < channels; c += kElementThreads / 32) {
        if (o.kind == Outcome<A>::skip) {
            total += sum_of(kOfInput, c);
            continue;
        }
        if (o.kind == Outcome<A>::absent) {
            if (lane == 0 && o.grad_scale) o.grad_scale[c] = 0;
            if (lane == 0 && o.grad_shift) o.grad_shift[c] = 0;
            continue;
        }
        const A of_grad = sum_of(kOfGrad, c);
        A of_raw = o.products ? o.products[c] : sum_of(o.slot, c);
        if (o.bias) of_raw += o.bias[c] * of_grad;
        const A inverse = norm.inverse_deviation(o.map, c), scale = norm.scale_of(o.map, c);
        total += scale * inverse * of_raw + norm.shift_of(o.map, c) * of_grad;
        if (lane) continue;
        const A slope = factor * scale * inverse;
        if (o.grad_scale) o.grad_scale[c] = factor * inverse * of_raw;
        if (o.grad_shift) o.grad_shift[c] = factor * of_grad;
        if (o.grad_bias) o.grad_bias[c] = norm.statistics ? 0 : slope * of_grad;
        if (!o.coefficients) continue;
        const A weight = norm.statistics ? -slope * inverse * inverse * of_raw / A(pixels) : 0;
        o.coefficients[c] = slope;
        o.coefficients[channels + c] =
            norm.statistics ? -slope * of_grad / A(pixels) - weight * norm.mean(o.map, c) : 0;
        o.coefficients[2 * channels + c] = weight;
    }
    auto* totals = shared_memory<A>();  // [warps]
    if (lane == 0) totals[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x || !o.grad_factor) return;
    for (int warp = 1; warp < kElementThreads / 32; ++warp) total += totals[warp];
    *o.grad_factor = total;
}

template <class A>
void finish_outcomes(const Outcomes<A>& outcomes, const Parts<A>& parts, const Normalisation<A>& norm,
                     int64_t pixels, void* stream) {
    launch("mixed_op: outcome", NASFAST_KERNEL(outcome_kernel<A>), dim3(unsigned(outcomes.count)),
           kElementThreads, kElementThreads / 32 * int64_t(sizeof(A)), stream, outcomes, parts, norm, pixels);
}

// ---- gradients of maps

// Of norm(inner), where its ReLU lets it through.
template <class T>
struct InnerSink {
    static constexpr bool has_moments = false;
    const T* rectified;  // [N, H, W, padded C]
    T* target;           // [N, H, W, C]
    Padding padding;

    struct Column {
        const T* rectified;  // from the channel on
        T* target;
        int rectified_step, step;  // from pixel to pixel

        __device__ __forceinline__ Accumulate<T> store(int64_t pixel, Accumulate<T> value) const {
            const bool shut = widen(rectified[pixel * rectified_step]) <= 0;
            target[pixel * step] = narrow(shut ? 0 : value, T());
            return value;
        }
    };
    __device__ __forceinline__ Column column(int c) const {
        return {rectified + padding.element<T>(c), target + c, padding.chunks * kElements<T>,
                padding.channels};
    }
};

template <class T>
struct InputSink {
    static constexpr bool has_moments = false;
    const T* input;
    const T* grad;
    ScatteredSums<Accumulate<T>> of_def;  // [N, H, W, padded C]; or neither
    const Accumulate<T>* factors;
    T* target;
    Padding padding;
    bool add;

    struct Column {
        using A = Accumulate<T>;
        const T* input;  // from the channel on
        const T* grad;   // null: no skip
        T* target;
        ScatteredSums<A> of_def;
        int element, of_def_step, step;
        A factor;
        int scale;  // of of_def
        bool add;

        __device__ __forceinline__ A store(int64_t pixel, A value) const {
            const int64_t at = pixel * step;
            if (of_def.exact.parts || of_def.floating)
                value += of_def.read(pixel * of_def_step + element, scale);
            if (widen(input[at]) <= 0) value = 0;
            if (grad) value += factor * widen(grad[at]);
            if (add) value += widen(target[at]);
            target[at] = narrow(value, T());
            return value;
        }
    };
    __device__ __forceinline__ Column column(int c) const {
        const Accumulate<T> factor = factors[kSkip];
        return {input + c,
                factor != 0 ? grad + c : nullptr,
                target + c,
                of_def,
                padding.element<T>(c),
                padding.chunks * kElements<T>,
                padding.channels,
                factor,
                of_def.scale(),
                add};
    }
};

// ---- kernels

// One branch: gradients of the parts of its kernel, and sums of gradient times raw map.
template <class T>
struct KernelResult {
    using A = Accumulate<T>;
    const A* gradient;    // [rows, 3, 3, C], by the raw map's gradient
    Kernel3x3<T> kernel;  // its weight(row) is a factor of the gradients
    A* dense;             // every pointer may be null
    A* depthwise;
    A* pointwise;
    A* products;  // [C], without weight(row)
};
template <class T>
struct KernelResults {
    static constexpr int most = 6;
    KernelResult<T> list[most];
    int count = 0;

    void add(const KernelResult<T>& result) { list[count++] = result; }
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    kernel_result_kernel(const KernelResults<T> results, const int channels) {
    using A = Accumulate<T>;
    const KernelResult<T>& r = results.list[blockIdx.y];
    if (r.dense)
        for (int64_t i = first_element(); i < int64_t(r.kernel.rows) * kTaps * channels;
             i += element_step()) {
            const int row = int(i / (kTaps * channels));
            r.dense[i] = r.kernel.weight(row) * r.gradient[i];
        }
    if (r.pointwise)
        for (int64_t i = first_element(); i < int64_t(channels) * channels; i += element_step()) {
            const int row = int(i / channels), c = int(i % channels);
            A sum = 0;
            for (int tap = 0; tap < kTaps; ++tap)
                sum += r.gradient[(int64_t(row) * kTaps + tap) * channels + c] *
                       widen(r.kernel.depthwise[int64_t(c) * kTaps + tap]);
            r.pointwise[i] = r.kernel.weight(row) * sum;
        }
    if (r.depthwise)
        for (int64_t i = first_element(); i < int64_t(channels) * kTaps; i += element_step()) {
            const int c = int(i / kTaps), tap = int(i % kTaps);
            A sum = 0;
            for (int row = 0; row < channels; ++row)
                sum += r.kernel.weight(row) * r.gradient[(int64_t(row) * kTaps + tap) * channels + c] *
                       widen(r.kernel.pointwise[int64_t(row) * channels + c]);
            r.depthwise[i] = sum;
        }
    if (r.products) {
        Kernel3x3<T> plain = r.kernel;
        plain.factor = plain.scale = nullptr;
        const int lane = threadIdx.x % 32, warps = int(gridDim.x) * (kElementThreads / 32);
        for (int row = int(first_element() / 32); row < channels; row += warps) {
            A sum = 0;
            for (int i = lane; i < kTaps * channels; i += 32)
                sum += plain.at(row, i / channels, i % channels, channels) *
                       r.gradient[int64_t(row) * kTaps * channels + i];
            sum = warp_sum(sum);
            if (lane == 0) r.products[row] = sum;
        }
    }
}

// ---- host

template <class T>
struct BackwardPass {
    using A = Accumulate<T>;
    const Params& p;
    const Backward<T>& t;
    const Branches<T>& b;
    Layout l;
    bool fixed;
    Maps<T> maps;
    Normalisation<A> norm;

    BackwardPass(const Params& p, const Backward<T>& t, Arena& arena)
        : p(p),
          t(t),
          b(t.branches),
          l(Layout::make(p, b.def, T())),
          fixed(Norm(p.norm) == Norm::fixed),
          maps(take_maps<T>(l, arena)),
          norm(Normalisation<A>::make(p, b, fixed ? nullptr : t.statistics)) {
        const int64_t map_chunks = l.pixels * l.padding.chunks, channels = l.channels;
        maps.offset = t.offset;
        if (fixed) {
            maps.raw[kInner] = arena.take<T>(l.pixels * channels);
            forward_ = ForwardSources<T>(p, l, b, maps, false, false, packings_, arena);
        } else {  // they are only read
            for (int map = 0; map < kMaps; ++map)
                maps.raw[map] = const_cast<T*>(t.raw) + map * l.pixels * channels;
        }
        uint4* shared = fixed ? arena.take<uint4>(map_chunks) : nullptr;  // the gradient of the output
        for (const Map map : {kConv, kSep, kDil, kDef})
            gradients_[map] = fixed ? shared : has(map) ? arena.take<uint4>(map_chunks) : nullptr;
        outer_parts_ = arena.take<A>(kMostParts * kSlots * channels);
        parts_ = arena.take<A>(kMostParts * kSlots * std::max(channels, int64_t(l.offsets)));
        coefficients_ = arena.take<A>(kMaps * 3 * channels);
        products_ = arena.take<A>(kMaps * channels);
        if (b.depthwise1) {
            gradients_[kInner] = arena.take<uint4>(map_chunks);
            inner_ = arena.take<T>(l.pixels * channels);
        }
        if (b.def) {
            offset_gradient_ = arena.take<uint4>(l.pixels * l.offset_padding.chunks);
            const int64_t elements = map_chunks * kElements<T>;
            ExactSums<A>& exact = deform_.sums.exact;
            exact.elements = elements;
            if (p.deterministic && t.grad_input) {
                exact.factors = 3;
                exact.log_terms = ceil_log2(p.height * p.width * kTaps);
                exact.log_products = ceil_log2(p.channels);
                exact.place(arena.take<char>(ExactSums<A>::bytes(elements)));
            } else if (t.grad_input) {
                deform_.sums.floating = arena.take<A>(elements);
            }
        }
        add_transposed(arena);
        add_weights(arena);
    }

    void run(void* stream) {
        first_maps(stream);
        const Parts<A> parts = sum_outer(stream);
        if (!fixed) outcomes(parts, stream);
        pad_gradients(stream);
        if (wants_inner()) run_inner(stream);
        if (wants_deform()) run_deform(stream);
        if (t.grad_input) run_input(stream);
        weight_gradients<T>(p, l, weights_, weight_parts_, weight_sums_, stream);
        kernel_results(stream);
        if (fixed) outcomes(parts, stream);
    }

private:
    Packings<T> packings_;
    ForwardSources<T> forward_;
    uint4* gradients_[kMaps] = {};  // of the raw maps, padded; of the output for the outer ones, if fixed
    uint4* offset_gradient_ = nullptr;
    A *outer_parts_, *parts_, *coefficients_, *products_;
    T* inner_ = nullptr;
    DeformGradient<T> deform_{};
    Source<T> sep_{};
    Task<T, InputSink<T>> input_task_{};
    WeightTasks<A> weights_;
    A *weight_parts_, *weight_sums_;
    int64_t starts_[kMaps] = {}, offset_start_ = 0;

    bool has(int map) const {
        return map == kConv ? b.conv : map == kDil ? b.dil : map == kDef ? b.def : b.depthwise1;
    }

    // Sums of grad * raw that come from the kernels' gradients.
    bool wants_products() const { return fixed && (t.grad_factors || t.grad_scale); }
    bool wants_inner() const {
        return b.depthwise1 &&
               (t.grad_input || t.grad_depthwise1 || t.grad_pointwise1 || t.grad_scale || t.grad_shift);
    }
    bool wants_deform() const {
        return b.def && (t.grad_input || t.grad_offset_weight || t.grad_offset_bias);
    }

    Kernel3x3<T> outer_kernel(Map map) const {
        return fixed ? weighted_kernel_of(p, b, map) : kernel_of(p, b, map);
    }

    void add_transposed(Arena& arena) {
        const auto make = [&](const uint4* map, const Padding& padding, int taps, int dilation,
                              const Kernel3x3<T>& kernel, const Kernel3x3<T>& other = {}) {
            Packing<T> job{};
            job.kernels[0] = kernel;
            job.kernels[1] = other;
            job.depth = {padding.chunks, taps, taps};
            job.padding = padding;
            job.count = l.channels;
            job.transposed = true;
            return add_packing(packings_, arena, job, map, dilation);
        };
        auto& task = input_task_;
        if (fixed && b.conv && b.dil) {
            task.add(
                make(gradients_[kConv], l.padding, kMergedTaps, 1, outer_kernel(kConv), outer_kernel(kDil)));
        } else {
            if (b.conv) task.add(make(gradients_[kConv], l.padding, kTaps, 1, outer_kernel(kConv)));
            if (b.dil) task.add(make(gradients_[kDil], l.padding, kTaps, 2, outer_kernel(kDil)));
        }
        if (b.depthwise1) {
            task.add(make(gradients_[kInner], l.padding, kTaps, 1, kernel_of(p, b, kInner)));
            sep_ = make(gradients_[kSep], l.padding, kTaps, 1, outer_kernel(kSep));
        }
        if (!b.def) return;
        task.add(make(offset_gradient_, l.offset_padding, kTaps, 1, offset_kernel_of(l, b)));
        Packing<T> job{};
        job.kernels[0] = outer_kernel(kDef);
        job.depth = {l.padding.chunks, kTaps, 1};
        job.padding = l.padding;
        job.count = l.padding.chunks * kElements<T>;
        job.transposed = job.padded = true;
        deform_.source = add_packing(packings_, arena, job, gradients_[kDef], 1);
        deform_.columns = packed_columns(job.count);
        deform_.map = maps.rectified;
        deform_.padding = l.padding;
        deform_.offset = maps.offset;
        deform_.logits = reinterpret_cast<T*>(offset_gradient_);
        deform_.logit_padding = l.offset_padding;
    }

    // Of a part with all gradients: the workspace must do for any choice of branches.
    int most_weight_blocks() const {
        WeightTasks<A> all;
        const Layout with_def = Layout::make(p, true, T());
        const auto add = [&](const Padding& rows, bool sampled) {
            all.add(nullptr, rows, nullptr, with_def.padding, 1, nullptr, gradient_chunks<T>(p, sampled));
        };
        for (int map = 0; map < kMaps; ++map) add(with_def.padding, map == kDef);
        add(with_def.offset_padding, false);
        return all.blocks;
    }

    void add_weights(Arena& arena) {
        const auto add = [&](Map map, const uint4* from, int dilation, const A* offset = nullptr) {
            starts_[map] = weights_.add(gradients_[map], l.padding, from, l.padding, dilation, offset,
                                        gradient_chunks<T>(p, offset));
        };
        const bool all = wants_products();
        if (b.conv && (t.grad_conv || all)) add(kConv, maps.rectified, 1);
        if (b.dil && (t.grad_dil || all)) add(kDil, maps.rectified, 2);
        if (b.depthwise1 && (t.grad_depthwise1 || t.grad_pointwise1)) add(kInner, maps.rectified, 1);
        if (b.depthwise1 && (t.grad_depthwise2 || t.grad_pointwise2 || all))
            add(kSep, maps.inner_rectified, 1);
        if (b.def && (t.grad_def || all)) add(kDef, maps.rectified, 0, maps.offset);
        if (b.def && t.grad_offset_weight) {
            offset_start_ = weights_.add(offset_gradient_, l.offset_padding, maps.rectified, l.padding, 1,
                                         nullptr, gradient_chunks<T>(p, false));
        }
        weights_.divide(l, most_weight_blocks());
        weight_parts_ = arena.take<A>(weights_.parts * weights_.size);
        weight_sums_ = arena.take<A>(weights_.size);
    }

    void first_maps(void* stream) {
        PaddedMaps<T> padded;
        padded.add(rectified(maps, t.input));
        if (!fixed && b.depthwise1) padded.add(inner_rectified(maps));
        pad(p, l, padded, norm, stream);
        pack(p, packings_, stream);
        if (!fixed) return;
        queue_first(p, l, b, maps, false, forward_, stream);
        if (b.depthwise1) queue_pad(p, l, inner_rectified(maps), norm, stream);
    }

    Parts<A> sum_outer(void* stream) {
        SummedMaps<T> summed{t.grad,   t.input,    {},         {kConv, kSep, kDil, kDef},
                             l.pixels, l.channels, l.channels, kSlots};
        if (!fixed)
            for (int map = 0; map <= kDef; ++map)
                if (has(map)) summed.raw[map] = maps.raw[map];
        return sum_pixels(summed, norm, outer_parts_, stream);
    }

    static A* row(A* array, int map, int64_t channels) { return array ? array + map * channels : nullptr; }

    void outcomes(const Parts<A>& parts, void* stream) {
        Outcomes<A> list;
        for (int map = 0; map <= kDef; ++map) {
            Outcome<A> o{};
            o.kind = has(map) ? Outcome<A>::normalised : Outcome<A>::absent;
            o.map = map;
            o.slot = kOfRaw + map;
            o.factor = b.factors + map;
            if (wants_products()) o.products = products_ + map * l.channels;
            if (fixed && map == kDef) o.bias = b.def_bias;
            if (map == kDef) o.grad_bias = t.grad_def_bias;
            o.grad_factor = row(t.grad_factors, map, 1);
            o.grad_scale = row(t.grad_scale, map, l.channels);
            o.grad_shift = row(t.grad_shift, map, l.channels);
            o.coefficients = coefficients_ + map * 3 * l.channels;
            list.add(o);
        }
        Outcome<A> skip{};
        skip.kind = Outcome<A>::skip;
        skip.grad_factor = row(t.grad_factors, kSkip, 1);
        list.add(skip);
        if (!b.depthwise1) {
            Outcome<A> inner = inner_outcome();
            inner.kind = Outcome<A>::absent;
            list.add(inner);
        }
        finish_outcomes(list, parts, norm, l.pixels, stream);
    }

    void pad_gradients(void* stream) {
        PaddedMaps<T> padded;
        if (fixed) {
            padded.add({gradients_[kConv], t.grad, nullptr, nullptr, -1, false});
        } else {
            for (int map = 0; map <= kDef; ++map)
                if (has(map))
                    padded.add({gradients_[map], t.grad, maps.raw[map], coefficients_ + map * 3 * l.channels,
                                -1, false});
        }
        if (padded.count) pad(p, l, padded, norm, stream);
    }

    Outcome<A> inner_outcome() const {
        Outcome<A> o{};
        o.map = kInner;
        o.slot = kOfRaw;
        o.grad_scale = row(t.grad_scale, kInner, l.channels);
        o.grad_shift = row(t.grad_shift, kInner, l.channels);
        o.coefficients = coefficients_ + kInner * 3 * l.channels;
        return o;
    }

    void run_inner(void* stream) {
        Tasks<T, InnerSink<T>> tasks;
        Task<T, InnerSink<T>> task{};
        task.sink = {reinterpret_cast<const T*>(maps.inner_rectified), inner_, l.padding};
        task.add(sep_);
        add_task(tasks, task, l.channels);
        multiply(p, l, tasks, stream);

        SummedMaps<T> summed{};
        summed.grad = inner_;
        summed.raw[0] = maps.raw[kInner];
        summed.of_map[0] = kInner;
        summed.pixels = l.pixels;
        summed.channels = summed.grad_step = l.channels;
        summed.slots = kOfRaw + 1;
        const Parts<A> parts = sum_pixels(summed, norm, parts_, stream);
        Outcomes<A> list;
        list.add(inner_outcome());
        finish_outcomes(list, parts, norm, l.pixels, stream);
        queue_pad(
            p, l,
            PaddedMap<T>{gradients_[kInner], inner_, maps.raw[kInner], list.list[0].coefficients, -1, false},
            norm, stream);
    }

    void run_deform(void* stream) {
        deform_gradient(p, l, deform_, stream);
        if (!t.grad_offset_bias) return;
        SummedMaps<T> summed{};
        summed.grad = reinterpret_cast<const T*>(offset_gradient_);
        summed.pixels = l.pixels;
        summed.channels = l.offsets;
        summed.grad_step = l.offset_padding.chunks * kElements<T>;
        summed.slots = 1;
        const Parts<A> parts = sum_pixels(summed, norm, parts_, stream);
        add_parts("mixed_op: add_parts", parts.sums, parts.number, int64_t(l.offsets), t.grad_offset_bias,
                  stream);
    }

    void run_input(void* stream) {
        Tasks<T, InputSink<T>> tasks;
        input_task_.sink = {t.input, t.grad, deform_.sums, b.factors, t.grad_input, l.padding, bool(p.add)};
        add_task(tasks, input_task_, l.channels);
        multiply(p, l, tasks, stream);
    }

    void kernel_results(void* stream) {
        KernelResults<T> results;
        const auto products = [&](int map) {
            return wants_products() ? products_ + map * l.channels : nullptr;
        };
        const auto gradient = [&](int64_t start) { return weight_sums_ + start; };
        if (b.conv)
            results.add({gradient(starts_[kConv]), outer_kernel(kConv), t.grad_conv, nullptr, nullptr,
                         products(kConv)});
        if (b.dil)
            results.add(
                {gradient(starts_[kDil]), outer_kernel(kDil), t.grad_dil, nullptr, nullptr, products(kDil)});
        if (b.depthwise1) {
            results.add({gradient(starts_[kSep]), outer_kernel(kSep), nullptr, t.grad_depthwise2,
                         t.grad_pointwise2, products(kSep)});
            results.add({gradient(starts_[kInner]), kernel_of(p, b, kInner), nullptr, t.grad_depthwise1,
                         t.grad_pointwise1, nullptr});
        }
        if (b.def) {
            results.add(
                {gradient(starts_[kDef]), outer_kernel(kDef), t.grad_def, nullptr, nullptr, products(kDef)});
            results.add({gradient(offset_start_), offset_kernel_of(l, b), t.grad_offset_weight, nullptr,
                         nullptr, nullptr});
        }
        dim3 grid = element_grid(int64_t(std::max(l.channels, l.offsets)) * kTaps * l.channels);
        grid.y = unsigned(results.count);
        launch("mixed_op: kernel_result", NASFAST_KERNEL(kernel_result_kernel<T>), grid, kElementThreads, 0,
               stream, results, l.channels);
    }
};

template <class T>
void backward(const Params& p, const Backward<T>& t, void* workspace, void* stream) {
    check_sizes(p);
    Arena arena(workspace);
    BackwardPass<T>(p, t, arena).run(stream);
}

template <class T>
int64_t backward_workspace(const Params& p) {
    check_sizes(p);
    Backward<T> t{};
    t.branches = all_branches<T>();
    static T input;  // all are wanted
    static Accumulate<T> gradient;
    t.grad_input = &input;
    t.grad_conv = t.grad_dil = t.grad_def = t.grad_def_bias = &gradient;
    t.grad_offset_weight = t.grad_offset_bias = &gradient;
    t.grad_depthwise1 = t.grad_pointwise1 = t.grad_depthwise2 = t.grad_pointwise2 = &gradient;
    t.grad_factors = t.grad_scale = t.grad_shift = &gradient;
    Arena arena(nullptr);
    BackwardPass<T>(p, t, arena);
    return arena.used();
}

}  // namespace nasfast::mixed_op::cuda
