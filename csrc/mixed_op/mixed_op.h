// Mixed operation of a gradient search: the weighted sum of the branches of an edge (Zhang et al., IR-NAS,
// CVPR 2020, after DARTS). Maps are channels last.
//
// With r = ReLU(input), zero outside the image, and the raw maps
//   conv  = 3x3 convolution of r                          dil = the same with dilation 2
//   def   = deformable 3x3 convolution of r (DCNv2), its offsets and masks from a 3x3 convolution of r
//   inner = pointwise(depthwise 3x3 (r))                  sep = pointwise(depthwise 3x3 (ReLU(norm(inner))))
// and norm(raw) = (raw - mean) / sqrt(variance + eps) * scale + shift, per channel and raw map,
//   output = sum of factor * norm(raw) over conv, sep, dil, def + factor * input (skip).
#pragma once

#include <cstdint>

#include "common/kernels.hpp"

namespace nasfast::mixed_op {

// Raw maps in the order of every [kMaps, ..]; the first four end in a factor, kSkip follows them in
// `factors`.
enum Map { kConv, kSep, kDil, kDef, kInner, kMaps };
constexpr int kSkip = 4, kFactors = 5;
constexpr int kTaps = 9;

// fixed: norm(raw) = raw * scale + shift, and nothing but the output is written: the branches are one sum of
//   products, with no raw map in memory.
// batch: of the batch; statistics are written by forward.
// given: like batch, by the statistics that are there; forward writes only raw and offset, for a backward.
enum class Norm : int64_t { fixed, batch, given };

// Fields in the order of nasfast.ops.mixed_op.Sizes.
struct Params {
    int64_t batch, channels, height, width;
    int64_t offset_groups;
    int64_t norm;           // Norm; backward knows fixed and batch
    double eps;             // of the normalisation
    int64_t add;            // 1: add to output, and in backward to grad_input, instead of assigning
    int64_t deterministic;  // CUDA: the same bits in every run
    int64_t tf32;           // CUDA: float32 products may use tf32 tensor cores
};

// D = offset_groups. A branch is there when its weights are: conv, dil, def (with offset_weight), depthwise1
// (with pointwise1, depthwise2, pointwise2). Skip is there when its factor is not zero. Null pointers:
// branches that are not there, scale and shift where they are 1 and 0, gradients that are not wanted.
template <class T>
struct Branches {
    using A = Accumulate<T>;
    const T* conv;      // [C, 3, 3, C], output channel first
    const T* dil;       // [C, 3, 3, C]
    const T* def;       // [C, 3, 3, C]
    const A* def_bias;  // [C]
    const T*
        offset_weight;     // [D * 27, 3, 3, C]: D * 9 offsets (dy, dx) in pixels, then D * 9 logits of masks
    const A* offset_bias;  // [D * 27]
    const T* depthwise1;   // [C, 3, 3]
    const T* pointwise1;   // [C, C], output channel first
    const T* depthwise2;   // [C, 3, 3]
    const T* pointwise2;   // [C, C]
    const A* factors;      // [kFactors]
    const A* scale;        // [kMaps, C]
    const A* shift;        // [kMaps, C]
};

template <class T>
struct Forward {
    using A = Accumulate<T>;
    const T* input;  // [N, H, W, C]
    Branches<T> branches;
    T* raw;         // [kMaps, N, H, W, C]; unless fixed; maps of absent branches are not touched
    A* offset;      // [N, H, W, D * 27], masks after the sigmoid; where there is def
    A* statistics;  // [kMaps, 2, C], mean and biased variance; unless fixed
    T* output;      // [N, H, W, C]; null with Norm::given
};

template <class T>
struct Backward {
    using A = Accumulate<T>;
    const T* grad;   // [N, H, W, C], of output
    const T* input;  // [N, H, W, C]
    Branches<T> branches;
    const T* raw;         // as forward left it; null with Norm::fixed
    A* offset;            // the same; with Norm::fixed memory for it, which backward fills
    const A* statistics;  // [kMaps, 2, C]
    T* grad_input;        // [N, H, W, C]
    A* grad_conv;         // gradients in the shapes of Branches, assigned
    A* grad_dil;
    A* grad_def;
    A* grad_def_bias;  // 0 with Norm::batch, which takes the mean away
    A* grad_offset_weight;
    A* grad_offset_bias;
    A* grad_depthwise1;
    A* grad_pointwise1;
    A* grad_depthwise2;
    A* grad_pointwise2;
    A* grad_factors;  // [kFactors]; of skip whether or not its factor is zero
    A* grad_scale;    // [kMaps, C]
    A* grad_shift;    // [kMaps, C]
};

NASFAST_KERNELS_PER_ISA
NASFAST_CUDA_KERNELS

}  // namespace nasfast::mixed_op
