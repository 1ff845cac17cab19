// Forward: an implicit matrix product, output [pixels, Co/G] = samples [pixels, K] weight [Co/G, K] for each
// weight group. A block owns a tile of it and walks over K, the taps' channels, in steps of 64 bytes a row:
// while the tensor cores work on one step, the corners of the next are under way to registers, and the
// weight of the one after that to shared memory.
#pragma once

#include "deform_conv2d/deform_conv2d_sample.cuh"

namespace nasfast::deform_conv2d::cuda {

// Rows of a shared tile are four chunks of 16 bytes, permuted so that eight rows of one chunk, which ldmatrix
// reads together, lie in different banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 4 + (chunk ^ (row >> 1 & 3)); }

// The products of one step, and the sums of a tile of M = 64 or 128 pixels by N columns, by tensor cores. Of
// 4 M threads each warp has 32 pixels by N / 4 columns.
template <class T_, int M_, int N_>
struct TensorTile {
    using T = T_;
    static constexpr int M = M_, N = N_, pairs = N / 64;
    static constexpr bool tf32 = sizeof(T) == 4;
    static __device__ __forceinline__ int column_in(int row) { return row; }  // of the shared weight tile
    float sums[2][2 * pairs][4] = {};

    __device__ __forceinline__ void multiply(const uint4* samples, const uint4* weight) {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 128 * 32,
                  column = threadIdx.x / 32 % 4 * (N / 4);
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                ldmatrix_x4(a[m], samples + chunk_at(row + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
            for (int n = 0; n < pairs; ++n) {
                uint32_t b[4];
                ldmatrix_x4(b,
                            weight + chunk_at(column + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
                if (tf32) {
#pragma unroll
                    for (uint32_t& word : b) word = to_tf32(bits_to_float(word));
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t of_eight[2] = {b[2 * half], b[2 * half + 1]};
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma(sums[m][2 * n + half], a[m], of_eight, T());
                }
            }
        }
    }

    // Calls store(row, column, sums of 4 columns) once for every four sums of the tile.
    template <class Store>
    __device__ __forceinline__ void each_four(const Store& store) {
        const int lane = threadIdx.x % 32, odd = lane % 2;
        const int row = threadIdx.x / 128 * 32 + lane / 4,
                  column = threadIdx.x / 32 % 4 * (N / 4) + lane % 4 / 2 * 4;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < pairs; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // neighbouring lanes hold two columns each of two fragments: make it four of one
                    const float* even_sums = sums[m][2 * n] + 2 * half;
                    const float* odd_sums = sums[m][2 * n + 1] + 2 * half;
                    const float first = shuffle_xor(odd ? even_sums[0] : odd_sums[0], 1);
                    const float second = shuffle_xor(odd ? even_sums[1] : odd_sums[1], 1);
                    const float four[4] = {odd ? first : even_sums[0], odd ? second : even_sums[1],
                                           odd ? odd_sums[0] : first, odd ? odd_sums[1] : second};
                    store(row + m * 16 + half * 8, column + n * 16 + odd * 8, four);
                }
    }
};

// The same without tensor cores, for 64 pixels by 64 columns: each of 256 threads has 4 pixels by 4 columns.
template <class T_>
struct PlainTile {
    using T = T_;
    static constexpr int M = 64, N = 64;
    static constexpr bool tf32 = false;
    static __device__ __forceinline__ int column_in(int row) { return row % 16 * 4 + row / 16; }
    T sums[4][4] = {};

    __device__ __forceinline__ void multiply(const uint4* samples, const uint4* weight) {
        const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            Chunk<T> a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = as_chunk<T>(samples[chunk_at(row + i * 16, k)]);
                b[i] = as_chunk<T>(weight[chunk_at(column + i * 16, k)]);
            }
#pragma unroll
            for (int e = 0; e < Chunk<T>::size; ++e)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += a[i].values[e] * b[j].values[e];
        }
    }

    template <class Store>
    __device__ __forceinline__ void each_four(const Store& store) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store(threadIdx.x / 16 + i * 16, threadIdx.x % 16 * 4, sums[i]);
    }
};

// ---- the walk over K

// Where a thread's chunk of a step lies. The channels of a weight group fall into segments, which share their
// offsets; steps go through the segments, in each through blocks of taps whose samples fit into shared
// memory, in each through the channels, and take the taps innermost, so that their corners are still in the
// cache.
template <class T>
struct Walk {
    int d, first_tap, taps;  // offset group and block of taps
    int end;                 // of the segment's channels, within the weight group
    int steps;               // left in the block of taps
    int wide;                // chunks of channels taken together: 1, 2 or 4
    int tap, channel;        // of the chunk; channel >= end: none

    __device__ __forceinline__ Walk(const Params& p, int group, int taps_at_once) {
        d = int(group * (p.channels / p.groups) / (p.channels / p.offset_groups));
        first_tap = 0;
        begin(p, group, taps_at_once);
    }

    // Goes to the next step; true where that is one of another block of taps.
    __device__ __forceinline__ bool advance(const Params& p, int group, int taps_at_once) {
        if (--steps > 0) {
            tap += 4 / wide;
            normalise();
            return false;
        }
        first_tap += taps;
        if (first_tap == int(p.kernel_h * p.kernel_w)) {
            first_tap = 0;
            ++d;
        }
        begin(p, group, taps_at_once);
        return true;
    }

    static __device__ __forceinline__ int64_t total(const Params& p, int group, int taps_at_once) {
        const int64_t channels = p.channels / p.groups;
        Walk walk(p, group, taps_at_once);
        int64_t steps = 0;
        for (;;) {
            steps += walk.steps;
            if (walk.end == channels && walk.first_tap + walk.taps == p.kernel_h * p.kernel_w) return steps;
            walk.steps = 1;
            walk.advance(p, group, taps_at_once);
        }
    }

private:
    __device__ __forceinline__ void begin(const Params& p, int group, int taps_at_once) {
        const int64_t in_group = p.channels / p.groups, in_segment = p.channels / p.offset_groups;
        const int start = int(max(d * in_segment - group * in_group, int64_t(0)));
        end = int(min((d + 1) * in_segment - group * in_group, in_group));
        taps = min(taps_at_once, int(p.kernel_h * p.kernel_w) - first_tap);
        const int chunks = (end - start + Chunk<T>::size - 1) / Chunk<T>::size;
        wide = chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
        steps = int((int64_t(chunks) * taps + 3) / 4);
        tap = int(threadIdx.x) % 4 / wide;
        channel = start + int(threadIdx.x) % wide * Chunk<T>::size;
        normalise();
    }

    __device__ __forceinline__ void normalise() {
        while (tap >= taps) {
            tap -= taps;
            channel += wide * Chunk<T>::size;
        }
    }
};

// ---- samples

// What the samples of a tile's pixels and of a block of taps are made of, in shared memory: [tap][pixel].
template <class T, int M>
struct Corners {
    using A = Accumulate<T>;
    static constexpr int bytes = M * (4 * sizeof(A) + sizeof(int64_t));  // of a tap
    A (*weights)[4];                                                     // of the corners, with the mask
    int64_t* first;  // element of corner 0's channel 0 in input

    __device__ __forceinline__ Corners(void* memory, int taps)
        : weights(static_cast<A (*)[4]>(memory)), first(reinterpret_cast<int64_t*>(weights + taps * M)) {}

    template <class Walk>
    __device__ __forceinline__ void fill(const Params& p, const Forward<T>& t, int64_t first_pixel,
                                         const Walk& walk) const {
        const int64_t pixels = p.batch * p.out_height * p.out_width;
        for (int i = threadIdx.x; i < M * walk.taps; i += 4 * M) {
            const int row = i / walk.taps, tap = i % walk.taps, at = tap * M + row;
            const int64_t pixel = first_pixel + row;
            A of_corners[4] = {};
            if (pixel < pixels) {
                const auto sample = locate(p, t.offset, pixel, walk.d, walk.first_tap + tap);
                if (sample.inside)
                    sample.weights(of_corners, mask_at(p, t.mask, pixel, walk.d, walk.first_tap + tap));
                first[at] = sample.corner * p.channels;
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) weights[at][corner] = of_corners[corner];
        }
    }
};

// Up to a chunk of elements of global memory, zeros after `count`; `chunked`: there is a whole, aligned one.
template <bool chunked, class T>
__device__ __forceinline__ uint4 load_chunk(const T* global, int count) {
    if constexpr (chunked) return load_16(global);
    Chunk<T> chunk{};
#pragma unroll
    for (int e = 0; e < Chunk<T>::size; ++e)
        if (e < count) chunk.values[e] = global[e];
    return as_words(chunk);
}

// The sum of four chunks.
template <bool tf32, class T, class A>
__device__ __forceinline__ uint4 weighted_sum(const uint4 (&chunks)[4], const A (&weights)[4], T type) {
    if constexpr (sizeof(T) == 2) {
        uint4 result;
        const uint32_t* words[4];
        uint32_t* sums = &result.x;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = &chunks[i].x;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float first = 0, second = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = widen_pair(words[i][word], type);
                first += weights[i] * pair.x;
                second += weights[i] * pair.y;
            }
            sums[word] = narrow_pair(first, second, type);
        }
        return result;
    } else {
        Chunk<T> result{};
#pragma unroll
        for (int e = 0; e < Chunk<T>::size; ++e) {
#pragma unroll
            for (int i = 0; i < 4; ++i) result.values[e] += weights[i] * as_chunk<T>(chunks[i]).values[e];
            if constexpr (tf32) result.values[e] = bits_to_float(to_tf32(result.values[e]));
        }
        return as_words(result);
    }
}

// Four neighbours, aligned as such.
template <class T>
__device__ __forceinline__ void store_four(T* global, const T (&values)[4]) {
    if constexpr (sizeof(T) == 2) {
        uint2 words;
        memcpy(&words, values, sizeof words);
        *reinterpret_cast<uint2*>(global) = words;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i += Chunk<T>::size) {
            uint4 words;
            memcpy(&words, values + i, sizeof words);
            *reinterpret_cast<uint4*>(global + i) = words;
        }
    }
}

// ---- the kernel

constexpr int weight_stages = 3;

template <class Tile>
constexpr int64_t tile_bytes = (2 * Tile::M + weight_stages * Tile::N) * 64;

// `taps_at_once`: of which the samples' corners fit into shared memory. `rows_of_four`: four outputs of a row
// are aligned to four elements. `chunked`: 16 bytes of channels of input and weight are aligned and alike.
template <class Tile, bool chunked>
__global__ void __launch_bounds__(4 * Tile::M)
    forward_kernel(const Params p, const Forward<typename Tile::T> t, const int taps_at_once,
                   const bool rows_of_four) {
    using T = typename Tile::T;
    constexpr int M = Tile::M, N = Tile::N;
    auto* samples = shared_memory<uint4>();  // [2][M][4]
    uint4* weight = samples + 2 * M * 4;     // [weight_stages][N][4]
    const Corners<T, M> corners(weight + weight_stages * N * 4, taps_at_once);

    // blocks that read the same pixels run together
    const int64_t taps = p.kernel_h * p.kernel_w, channels = p.channels / p.groups,
                  columns = p.out_channels / p.groups;
    const int64_t column_tiles = (columns + N - 1) / N;
    const int64_t first_column = blockIdx.x % column_tiles * N;
    const int group = int(blockIdx.x / column_tiles % p.groups);
    const int64_t first_pixel = blockIdx.x / column_tiles / p.groups * M;
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;  // of the samples that this thread makes

    Walk<T> walk(p, group, taps_at_once), weight_walk = walk;
    const int64_t steps = Walk<T>::total(p, group, taps_at_once);

    const auto copy_weight = [&](int stage) {
        uint4* rows = weight + stage * N * 4;
#pragma unroll
        for (int i = 0; i < N; i += M) {
            const int64_t column = first_column + Tile::column_in(row + i);
            const int count = column < columns ? weight_walk.end - weight_walk.channel : 0;
            const int64_t tap = weight_walk.first_tap + weight_walk.tap;
            const T* source = t.weight;
            if (count > 0)
                source += ((group * columns + column) * taps + tap) * channels + weight_walk.channel;
            if constexpr (chunked)
                cp_async_16(rows + chunk_at(row + i, chunk), source, count > 0);
            else
                rows[chunk_at(row + i, chunk)] = load_chunk<false>(source, count);
        }
    };

    uint4 gathered[4];
    typename Corners<T, M>::A factors[4];
    const auto gather = [&] {
        const int at = walk.tap * M + row, count = walk.end - walk.channel;
        const T* source = t.input + (group * channels + walk.channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            factors[i] = count > 0 ? corners.weights[at][i] : 0;
            // not where the weight is zero: that may be outside of the image
            gathered[i] = make_uint4(0, 0, 0, 0);
            if (factors[i] != 0)
                gathered[i] =
                    load_chunk<chunked>(source + corners.first[at] + corner_step(p, i) * p.channels, count);
        }
    };
    const auto combine = [&](int stage) {
        samples[stage * M * 4 + chunk_at(row, chunk)] = weighted_sum<Tile::tf32>(gathered, factors, T());
    };

#pragma unroll
    for (int stage = 0; stage < weight_stages - 1; ++stage) {
        if (stage < steps) {
            copy_weight(stage);
            if (stage + 1 < steps) weight_walk.advance(p, group, taps_at_once);
        }
        cp_async_commit();
    }
    corners.fill(p, t, first_pixel, walk);
    __syncthreads();
    gather();
    combine(0);

    Tile tile;
    int stage = 0;
    for (int64_t step = 0; step < steps; ++step) {
        const bool more = step + 1 < steps;
        if (more) {
            if (walk.advance(p, group, taps_at_once)) {
                __syncthreads();
                corners.fill(p, t, first_pixel, walk);
                __syncthreads();
            }
            gather();
        }
        cp_async_wait<weight_stages - 2>();
        __syncthreads();  // this step's tiles are complete, those of the step before are free
        if (step + weight_stages - 1 < steps) {
            copy_weight((stage + weight_stages - 1) % weight_stages);
            if (step + weight_stages < steps) weight_walk.advance(p, group, taps_at_once);
        }
        cp_async_commit();
        tile.multiply(samples + step % 2 * M * 4, weight + stage * N * 4);
        if (more) combine(int(step + 1) % 2);
        stage = (stage + 1) % weight_stages;
    }

    const int64_t pixels = p.batch * p.out_height * p.out_width;
    tile.each_four([&](int row, int column, const auto& sums) {
        const int64_t pixel = first_pixel + row, first = first_column + column;
        if (pixel >= pixels || first >= columns) return;
        const auto* bias = t.bias ? t.bias + group * columns + first : nullptr;
        T* output = t.output + pixel * p.out_channels + group * columns + first;
        T values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool inside = first + i < columns;
            values[i] = narrow(sums[i] + (bias && inside ? bias[i] : 0), T());
            if (inside && !rows_of_four) output[i] = values[i];
        }
        if (rows_of_four) store_four(output, values);
    });
}

// ---- host

template <class Tile, bool chunked, class T>
void launch_forward(const Params& p, const Forward<T>& t, void* stream) {
    constexpr int64_t shared_limit = 99 << 10;  // of the devices that have the least
    const int64_t taps = p.kernel_h * p.kernel_w, columns = p.out_channels / p.groups;
    const int64_t most = (shared_limit - tile_bytes<Tile>) / Corners<T, Tile::M>::bytes;
    const int64_t blocks_of_taps = (taps + most - 1) / most;
    const int64_t at_once = (taps + blocks_of_taps - 1) / blocks_of_taps;
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    const int64_t blocks = (pixels + Tile::M - 1) / Tile::M * p.groups * ((columns + Tile::N - 1) / Tile::N);
    const bool rows_of_four =
        columns % 4 == 0 && reinterpret_cast<uintptr_t>(t.output) % (4 * sizeof(T)) == 0;
    launch("deform_conv2d: forward", forward_kernel<Tile, chunked>, grid(blocks), 4 * Tile::M,
           tile_bytes<Tile> + at_once * Corners<T, Tile::M>::bytes, stream, p, t, int(at_once), rows_of_four);
}

// Whether every chunk of 16 bytes of channels is aligned and has one offset group.
template <class T>
bool has_chunks(const Params& p, const T* input, const T* weight) {
    const auto multiple = [](int64_t value) { return value % (16 / int64_t(sizeof(T))) == 0; };
    return multiple(p.channels / p.groups) && multiple(p.channels / p.offset_groups) &&
           reinterpret_cast<uintptr_t>(input) % 16 == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

template <class T, bool tensor_cores>
void choose_forward(const Params& p, const Forward<T>& t, void* stream) {
    const bool chunked = has_chunks(p, t.input, t.weight);
    if constexpr (!tensor_cores) {
        if (chunked)
            launch_forward<PlainTile<T>, true>(p, t, stream);
        else
            launch_forward<PlainTile<T>, false>(p, t, stream);
    } else {
        // the widest tile samples least, but must keep the multiprocessors busy
        const int64_t columns = p.out_channels / p.groups;
        const int64_t tiles = (p.batch * p.out_height * p.out_width + 127) / 128 * p.groups;
        const int64_t enough = multiprocessors() * 3 / 4;
        if (!chunked)
            launch_forward<TensorTile<T, 64, 64>, false>(p, t, stream);
        else if (columns > 128 && tiles * ((columns + 255) / 256) >= enough)
            launch_forward<TensorTile<T, 128, 256>, true>(p, t, stream);
        else if (columns > 64 && tiles * ((columns + 127) / 128) >= enough)
            launch_forward<TensorTile<T, 128, 128>, true>(p, t, stream);
        else
            launch_forward<TensorTile<T, 64, 64>, true>(p, t, stream);
    }
}

template <class T>
void forward(const Params& p, const Forward<T>& t, void* /*workspace*/, void* stream) {
    check_sizes(p);
    if constexpr (sizeof(T) == 2)
        choose_forward<T, true>(p, t, stream);
    else if constexpr (sizeof(T) == 8)
        choose_forward<T, false>(p, t, stream);
    else if (p.tf32)
        choose_forward<T, true>(p, t, stream);
    else
        choose_forward<T, false>(p, t, stream);
}

}  // namespace nasfast::deform_conv2d::cuda
