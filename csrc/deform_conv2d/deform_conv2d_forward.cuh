// Forward: an implicit matrix product, output [pixels, Co/G] = samples [pixels, K] weight [Co/G, K] for each
// weight group. A block owns a tile of it and walks over K, the taps' channels, in steps of 64 bytes a row:
// while the tensor cores work on one step, the corners of the next are under way to registers, and its
// weight to shared memory.
#pragma once

#include "common/cuda_tensor_tile.cuh"
#include "deform_conv2d/deform_conv2d_sample.cuh"

namespace nasfast::deform_conv2d::cuda {

// Rows of a shared tile are four chunks of 16 bytes, permuted so that eight rows of one chunk, which ldmatrix
// reads together, lie in different banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 4 + (chunk ^ (row >> 1 & 3)); }

// The products of one step, and the sums of a tile of M pixels by N columns, by tensor cores. The tile has 2
// M threads; each warp has `rows` pixels by `width` columns of it.
template <class T_, int M_, int N_, int rows>
struct TensorSamples : TensorTile<rows / 16, 2 * N_ / rows> {
    using T = T_;
    static constexpr int M = M_, N = N_;
    static constexpr bool tf32 = sizeof(T) == 4;
    static constexpr int blocks = N >= 128 ? 1 : 256 / M;  // that a multiprocessor must hold
    static constexpr int warps_abreast = rows / 16, width = N / warps_abreast, pairs = width / 16;
    static __device__ __forceinline__ int column_in(int row) { return row; }  // of the shared weight tile

    __device__ __forceinline__ void multiply(const uint4* samples, const uint4* weight) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            uint32_t a[rows / 16][4];
#pragma unroll
            for (int m = 0; m < rows / 16; ++m)
                ldmatrix_x4(a[m], samples + chunk_at(first_row() + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
            for (int n = 0; n < pairs; ++n) {
                uint32_t b[4];
                const int column = first_column() + n * 16 + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(b, weight + chunk_at(column, k + lane / 8 % 2));
                if (tf32) {
#pragma unroll
                    for (uint32_t& word : b) word = to_tf32(bits_to_float(word));
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t of_eight[2] = {b[2 * half], b[2 * half + 1]};
#pragma unroll
                    for (int m = 0; m < rows / 16; ++m) mma(this->sums[m][2 * n + half], a[m], of_eight, T());
                }
            }
        }
    }

    // Calls store(row, column, sums of 4 columns) once for every four sums of the tile.
    template <class Store>
    __device__ __forceinline__ void each_four(const Store& store) {
        const int lane = threadIdx.x % 32, odd = lane % 2;
        const int row = first_row() + lane / 4, column = first_column() + lane % 4 / 2 * 4 + odd * 8;
#pragma unroll
        for (int m = 0; m < rows / 16; ++m)
#pragma unroll
            for (int n = 0; n < pairs; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // neighbouring lanes hold two columns each of two fragments: make it four of one
                    const float* even_sums = this->sums[m][2 * n] + 2 * half;
                    const float* odd_sums = this->sums[m][2 * n + 1] + 2 * half;
                    const float first = shuffle_xor(odd ? even_sums[0] : odd_sums[0], 1);
                    const float second = shuffle_xor(odd ? even_sums[1] : odd_sums[1], 1);
                    const float four[4] = {odd ? first : even_sums[0], odd ? second : even_sums[1],
                                           odd ? odd_sums[0] : first, odd ? odd_sums[1] : second};
                    store(row + m * 16 + half * 8, column + n * 16, four);
                }
    }

private:
    static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / warps_abreast * rows; }
    static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % warps_abreast * width; }
};

// The same without tensor cores, for 64 pixels by 64 columns; each thread has 8 pixels by 4 columns.
template <class T_>
struct PlainSamples {
    using T = T_;
    static constexpr int M = 64, N = 64, blocks = 2;
    static constexpr bool tf32 = false;
    // four neighbours of a thread lie 16 rows apart, so that rows of neighbouring threads are in different
    // banks
    static __device__ __forceinline__ int column_in(int row) { return row % 16 * 4 + row / 16; }
    T sums[8][4] = {};

    __device__ __forceinline__ void multiply(const uint4* samples, const uint4* weight) {
        const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll 1
        for (int k = 0; k < 4; ++k) {
            Chunk<T> b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = as_chunk<T>(weight[chunk_at(column + j * 16, k)]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const auto a = as_chunk<T>(samples[chunk_at(row + i * 8, k)]);
#pragma unroll
                for (int e = 0; e < Chunk<T>::size; ++e)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += a.values[e] * b[j].values[e];
            }
        }
    }

    template <class Store>
    __device__ __forceinline__ void each_four(const Store& store) {
#pragma unroll
        for (int i = 0; i < 8; ++i) store(threadIdx.x / 16 + i * 8, threadIdx.x % 16 * 4, sums[i]);
    }
};

// ---- the way through K
// The channels of a weight group fall into segments, which share their offsets. K is taken segment by
// segment, in each by blocks of taps whose samples' corners fit into shared memory, in each by channels, and
// with the taps innermost, while the corners' channels are in the cache. A thread makes two chunks at a time
// of one sample, here called a unit; two units are a step.

// What the kernel needs beside Params; the host works it out once, and the threads keep it in no register.
struct Plan {
    int taps;          // of the kernel
    int taps_at_once;  // whose samples' corners fit into shared memory
    int channels;      // of a weight group
    int alike;         // channels of an offset group
    int columns;       // output channels of a weight group
    int column_tiles, groups;
    bool rows_of_four;  // four outputs of a row are aligned as such

    struct Tile {
        int first_column, group;
        unsigned pixel_tile;
    };
    // Blocks that read the same pixels run together.
    template <int N>
    __device__ __forceinline__ Tile tile_of(unsigned block) const {
        return {int(block % column_tiles) * N, int(block / column_tiles % groups),
                block / column_tiles / groups};
    }
};

// The channels of a weight group that have the offsets of group d.
struct Segment {
    int start, end;

    __device__ __forceinline__ Segment(const Plan& plan, int group, int d) {
        start = max(d * plan.alike, group * plan.channels);
        end = min((d + 1) * plan.alike, (group + 1) * plan.channels);
    }
};

// Where a thread's unit of a step lies in a segment and a block of taps.
template <class T>
struct Walk {
    static constexpr int unit = 2 * Chunk<T>::size;
    int steps;         // of all units
    int tap, channel;  // of the unit; there may be none: channel >= end

    __device__ __forceinline__ Walk(const Segment& segment, int taps) : taps_(taps) {
        const int units = (segment.end - segment.start + unit - 1) / unit;
        abreast_ = units % 2 ? 1 : 2;
        steps = (units * taps + 1) / 2;
        tap = int(threadIdx.x) % 2 / abreast_;
        channel = segment.start + int(threadIdx.x) % abreast_ * unit;
        normalise();
    }

    __device__ __forceinline__ void advance() {
        tap += 2 / abreast_;
        normalise();
    }

private:
    int taps_, abreast_;  // units of one tap in a step

    __device__ __forceinline__ void normalise() {
        while (tap >= taps_) {
            tap -= taps_;
            channel += abreast_ * unit;
        }
    }
};

// ---- samples

// What the samples of a tile's pixels and of a block of taps are made of, in shared memory.
template <class T, int M>
struct Corners {
    using A = Accumulate<T>;
    static constexpr int64_t bytes(int64_t taps) {
        return M * (int64_t(sizeof(Place)) + taps * (4 * sizeof(A) + sizeof(int64_t)));
    }
    Place* places;      // [M] of the pixels
    A (*weights)[4];    // [taps][M] of the corners, with the mask; 0 outside of the image
    int64_t* elements;  // [taps][M] of input, where corner 0 begins

    __device__ __forceinline__ Corners(void* memory, int taps)
        : places(static_cast<Place*>(memory)),
          weights(reinterpret_cast<A (*)[4]>(places + M)),
          elements(reinterpret_cast<int64_t*>(weights + taps * M)) {}

    __device__ __forceinline__ void set_places(const Params& p, unsigned tile) const {
        if (threadIdx.x < M) places[threadIdx.x] = place_of(p, int64_t(tile) * M + threadIdx.x);
    }

    // For `taps` taps from the first on, of offset group d.
    __device__ __forceinline__ void fill(const Params& p, const Forward<T>& t, unsigned tile, int d,
                                         int first_tap, int taps) const {
        const int row = threadIdx.x / 2;
        const int64_t pixel = int64_t(tile) * M + row;
        const bool exists = pixel < p.batch * p.out_height * p.out_width;
#pragma unroll 1  // rare; the registers are needed elsewhere
        for (int tap = threadIdx.x % 2; tap < taps; tap += 2) {
            const int at = tap * M + row;
            A of_corners[4] = {};
            if (exists) {
                const int64_t sample = d * p.kernel_h * p.kernel_w + first_tap + tap;
                const auto found =
                    locate(p, t.offset + pixel * p.offset_step + 2 * sample, places[row], first_tap + tap);
                elements[at] = found.corner * p.channels;
                if (found.inside)
                    found.weights(of_corners, t.mask ? t.mask[pixel * p.mask_step + sample] : A(1));
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) weights[at][corner] = of_corners[corner];
        }
    }
};

// Up to a chunk of elements of global memory, zeros from `count` on; `chunked`: an aligned chunk, or none.
template <bool chunked, class T>
__device__ __forceinline__ uint4 load_chunk(const T* global, int count) {
    if constexpr (chunked) return load_16(global, count > 0);
    Chunk<T> chunk{};
#pragma unroll
    for (int e = 0; e < Chunk<T>::size; ++e)
        if (e < count) chunk.values[e] = global[e];
    return as_words(chunk);
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

// One step's weight is being multiplied by some threads, the next one's is on its way from others, and the
// one before may still be read.
constexpr int weight_stages = 3;

template <class Tile>
constexpr int64_t tile_bytes = (2 * Tile::M + weight_stages * Tile::N) * 64;

// Writes a tile's sums, with the bias. All else in shared memory is done with.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void write_output(const Params& p, const Forward<T>& t, const Plan& plan,
                                             Tile& tile) {
    constexpr int M = Tile::M, N = Tile::N;
    const auto here = plan.tile_of<N>(block_index());
    const int first_output = here.group * plan.columns + here.first_column;
    auto* bias = shared_memory<Accumulate<T>>();  // [N]
    for (int i = threadIdx.x; i < N; i += 2 * M)
        bias[i] = t.bias && here.first_column + i < plan.columns ? t.bias[first_output + i] : 0;
    __syncthreads();
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    tile.each_four([&](int row, int column, const auto& sums) {
        const int64_t pixel = int64_t(here.pixel_tile) * M + row;
        const int left = plan.columns - (here.first_column + column);
        if (pixel >= pixels || left <= 0) return;
        T* output = t.output + pixel * p.out_channels + (first_output + column);
        T values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = narrow(sums[i] + bias[column + i], T());
        if (plan.rows_of_four) return store_four(output, values);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) output[i] = values[i];
    });
}

// `chunked`: every chunk of channels of input and weight is aligned and has one offset group.
template <class Tile, bool chunked>
__global__ void __launch_bounds__(2 * Tile::M, Tile::blocks)
    forward_kernel(const Params p, const Forward<typename Tile::T> t, const Plan plan) {
    using T = typename Tile::T;
    constexpr int M = Tile::M, N = Tile::N;
    auto* samples = shared_memory<uint4>();  // [2][M][4]
    uint4* weight = samples + 2 * M * 4;     // [weight_stages][N][4]
    const Corners<T, M> corners(weight + weight_stages * N * 4, plan.taps_at_once);

    const auto [first_column, group, pixel_tile] = plan.tile_of<N>(block_index());
    const int row = threadIdx.x / 2,
              chunk = threadIdx.x % 2 * 2;  // the first of those that this thread makes

    const int column = first_column + Tile::column_in(row);
    const T* const weight_row =  // from which channels count as in input
        t.weight + int64_t(group * plan.columns + column) * (plan.taps * plan.channels) -
        group * plan.channels;

    corners.set_places(p, pixel_tile);
    __syncthreads();
    Tile tile;
    for (int d = group * plan.channels / plan.alike;; ++d) {
        const Segment segment(plan, group, d);
        for (int first_tap = 0; first_tap < plan.taps; first_tap += plan.taps_at_once) {
            const int block_taps = min(plan.taps_at_once, plan.taps - first_tap);
            corners.fill(p, t, pixel_tile, d, first_tap, block_taps);
            __syncthreads();  // the block of taps before is done with all of shared memory, too
            Walk<T> walk(segment, block_taps);

            const auto copy_weight = [&](int stage) {
                if (N < M && row >= N) return cp_async_commit();  // there are fewer rows than pixels
                uint4* rows = weight + stage * N * 4;
                const int offset = (first_tap + walk.tap) * plan.channels + walk.channel;
#pragma unroll
                for (int i = 0; i < N; i += M) {
                    const T* source = weight_row + int64_t(i) * (plan.taps * plan.channels) + offset;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int skipped = j * Chunk<T>::size;
                        const int count =
                            column + i < plan.columns ? segment.end - walk.channel - skipped : 0;
                        const T* from = source + skipped;
                        uint4* to = rows + chunk_at(row + i, chunk + j);
                        if constexpr (chunked)
                            cp_async_16(to, from, count > 0);
                        else
                            *to = load_chunk<false>(from, count);
                    }
                }
                cp_async_commit();
            };

            uint4 gathered[2][4];
            const auto gather = [&] {
                const int at = walk.tap * M + row;
                const T* source = t.input + (corners.elements[at] + walk.channel);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // not where the weight is zero: that may be outside of the image
                    const int count = corners.weights[at][i] != 0 ? segment.end - walk.channel : 0;
                    const T* corner = source + corner_step(p, i) * p.channels;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int skipped = j * Chunk<T>::size;
                        gathered[j][i] = load_chunk<chunked>(corner + skipped, count - skipped);
                    }
                }
            };
            const auto combine = [&](int stage) {
                const auto& weights = corners.weights[walk.tap * M + row];
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    samples[stage * M * 4 + chunk_at(row, chunk + j)] =
                        weighted_sum<Tile::tf32>(gathered[j], weights, T());
            };

            gather();
            copy_weight(0);
            combine(0);
            for (int step = 0, stage = 0; step < walk.steps; ++step) {
                const int next_stage = stage == weight_stages - 1 ? 0 : stage + 1;
                const bool more = step + 1 < walk.steps;
                if (more) {
                    walk.advance();
                    gather();
                    copy_weight(next_stage);
                    cp_async_wait<1>();
                } else {
                    cp_async_wait<0>();
                }
                __syncthreads();  // the tiles of this step are complete, those of the step before are free
                tile.multiply(samples + step % 2 * M * 4, weight + stage * N * 4);
                if (more) combine((step + 1) % 2);
                stage = next_stage;
            }
        }
        if (segment.end == (group + 1) * plan.channels) break;
    }

    __syncthreads();
    write_output(p, t, plan, tile);
}

// ---- host

template <class Tile, bool chunked, class T>
void launch_forward(const Params& p, const Forward<T>& t, void* stream) {
    using C = Corners<T, Tile::M>;
    constexpr int64_t shared_limit = 99 << 10;  // of the devices that have the least
    constexpr int64_t most = (shared_limit - tile_bytes<Tile> - C::bytes(0)) / (C::bytes(1) - C::bytes(0));
    const int64_t taps = p.kernel_h * p.kernel_w, columns = p.out_channels / p.groups;
    const int64_t blocks_of_taps = (taps + most - 1) / most;
    const int64_t at_once = (taps + blocks_of_taps - 1) / blocks_of_taps;
    const int64_t column_tiles = (columns + Tile::N - 1) / Tile::N;
    const int64_t pixel_tiles = (p.batch * p.out_height * p.out_width + Tile::M - 1) / Tile::M;
    const Plan plan{
        int(taps),
        int(at_once),
        int(p.channels / p.groups),
        int(p.channels / p.offset_groups),
        int(columns),
        int(column_tiles),
        int(p.groups),
        columns % 4 == 0 && reinterpret_cast<uintptr_t>(t.output) % (4 * sizeof(T)) == 0,
    };
    launch("deform_conv2d: forward", NASFAST_KERNEL(forward_kernel<Tile, chunked>),
           grid(pixel_tiles * p.groups * column_tiles), 2 * Tile::M, tile_bytes<Tile> + C::bytes(at_once),
           stream, p, t, plan);
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
            launch_forward<PlainSamples<T>, true>(p, t, stream);
        else
            launch_forward<PlainSamples<T>, false>(p, t, stream);
    } else {
        // the widest tile samples least, but all multiprocessors should have one
        const int64_t columns = p.out_channels / p.groups;
        const int64_t tiles = (p.batch * p.out_height * p.out_width + 127) / 128 * p.groups;
        const int64_t enough = multiprocessors() * 3 / 4;
        if (!chunked) return launch_forward<TensorSamples<T, 64, 64, 32>, false>(p, t, stream);
        if constexpr (sizeof(T) == 2)  // tf32's products take twice as long, and more registers
            if (columns > 128 && tiles * ((columns + 255) / 256) >= enough)
                return launch_forward<TensorSamples<T, 128, 256, 64>, true>(p, t, stream);
        if (columns > 64 && tiles * ((columns + 127) / 128) >= enough)
            return launch_forward<TensorSamples<T, 128, 128, 32>, true>(p, t, stream);
        if (tiles >= enough) return launch_forward<TensorSamples<T, 128, 64, 32>, true>(p, t, stream);
        launch_forward<TensorSamples<T, 64, 64, 32>, true>(p, t, stream);
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

template <class T>
int64_t forward_workspace(const Params&) {
    return 0;
}

}  // namespace nasfast::deform_conv2d::cuda
