// Forward: an implicit matrix product, output [pixels, Co/G] = samples [pixels, K] weight [Co/G, K] for each
// weight group. A block owns a tile of it and walks over K, the taps' channels, in steps of 64 bytes a row:
// while the tensor cores work on one step, the corners of the next are under way to registers, and its
// weight to shared memory.
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
#pragma unroll 1
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

// ---- the way through K
// The channels of a weight group fall into segments, which share their offsets. K is taken segment by
// segment, in each by blocks of taps whose samples' corners fit into shared memory, in each by channels, and
// with the taps innermost, while the corners' channels are in the cache. Four chunks are a step.

// The channels, within a weight group, that have the offsets of group d.
struct Segment {
    int start, end;

    __device__ __forceinline__ Segment(const Params& p, int group, int d) {
        const int in_group = int(p.channels) / int(p.groups),
                  in_segment = int(p.channels) / int(p.offset_groups);
        start = max(d * in_segment - group * in_group, 0);
        end = min((d + 1) * in_segment - group * in_group, in_group);
    }
};

// Where a thread's chunk of a step lies in a segment and a block of taps.
template <class T>
struct Walk {
    int steps;         // of all chunks
    int tap, channel;  // of the chunk; there may be none: channel >= end

    __device__ __forceinline__ Walk(const Segment& segment, int taps) : taps_(taps) {
        const int chunks = (segment.end - segment.start + Chunk<T>::size - 1) / Chunk<T>::size;
        wide_ = chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
        steps = (chunks * taps + 3) / 4;
        tap = int(threadIdx.x) % 4 / wide_;
        channel = segment.start + int(threadIdx.x) % wide_ * Chunk<T>::size;
        normalise();
    }

    __device__ __forceinline__ void advance() {
        tap += 4 / wide_;
        normalise();
    }

private:
    int taps_, wide_;  // chunks of channels taken together: 1, 2 or 4

    __device__ __forceinline__ void normalise() {
        while (tap >= taps_) {
            tap -= taps_;
            channel += wide_ * Chunk<T>::size;
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

    __device__ __forceinline__ void set_places(const Params& p, int64_t first_pixel) const {
        if (threadIdx.x < M) places[threadIdx.x] = place_of(p, first_pixel + threadIdx.x);
    }

    // For `taps` taps from the first on, of offset group d.
    __device__ __forceinline__ void fill(const Params& p, const Forward<T>& t, int64_t first_pixel, int d,
                                         int first_tap, int taps) const {
        const int64_t pixels = p.batch * p.out_height * p.out_width;
#pragma unroll 1  // rare; the registers are needed elsewhere
        for (int i = threadIdx.x; i < M * taps; i += 4 * M) {
            const int row = i / taps, tap = first_tap + i % taps, at = i % taps * M + row;
            const int64_t pixel = first_pixel + row;
            A of_corners[4] = {};
            if (pixel < pixels) {
                const int64_t sample = d * p.kernel_h * p.kernel_w + tap;
                const auto found = locate(p, t.offset + pixel * p.offset_step + 2 * sample, places[row], tap);
                if (found.inside)
                    found.weights(of_corners, t.mask ? t.mask[pixel * p.mask_step + sample] : A(1));
                elements[at] = found.corner * p.channels;
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
    const int taps = int(p.kernel_h) * int(p.kernel_w), channels = int(p.channels) / int(p.groups);
    const int columns = int(p.out_channels) / int(p.groups);
    const int column_tiles = (columns + N - 1) / N;
    const int first_column = int(blockIdx.x % column_tiles) * N;
    const int group = int(blockIdx.x / column_tiles % unsigned(p.groups));
    const int64_t first_pixel = int64_t(blockIdx.x / column_tiles / unsigned(p.groups)) * M;
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;  // of the samples that this thread makes

    const int column = first_column + Tile::column_in(row);
    const T* const input = t.input + int64_t(group) * channels;
    const T* const weight_row = t.weight + int64_t(group * columns + column) * (taps * channels);

    corners.set_places(p, first_pixel);
    __syncthreads();
    Tile tile;
    const int with_one_d = int(p.channels) / int(p.offset_groups);
    const int first_d = group * channels / with_one_d, last_d = ((group + 1) * channels - 1) / with_one_d;
    for (int d = first_d; d <= last_d; ++d) {
        const Segment segment(p, group, d);
        for (int first_tap = 0; first_tap < taps; first_tap += taps_at_once) {
            const int block_taps = min(taps_at_once, taps - first_tap);
            Walk<T> walk(segment, block_taps);

            const auto copy_weight = [&](int stage) {
                uint4* rows = weight + stage * N * 4;
                const int offset = (first_tap + walk.tap) * channels + walk.channel;
#pragma unroll
                for (int i = 0; i < N; i += M) {
                    const int count = column + i < columns ? segment.end - walk.channel : 0;
                    const T* source =
                        count > 0 ? weight_row + int64_t(i) * (taps * channels) + offset : t.weight;
                    if constexpr (chunked)
                        cp_async_16(rows + chunk_at(row + i, chunk), source, count > 0);
                    else
                        rows[chunk_at(row + i, chunk)] = load_chunk<false>(source, count);
                }
                cp_async_commit();
            };

            uint4 gathered[4];
            const auto gather = [&] {
                const int at = walk.tap * M + row, count = segment.end - walk.channel;
                const T* source = input + (corners.elements[at] + walk.channel);
#pragma unroll
                for (int i = 0; i < 4; ++i)  // not where the weight is zero: that may be outside of the image
                    gathered[i] = load_chunk<chunked>(source + corner_step(p, i) * p.channels,
                                                      corners.weights[at][i] != 0 ? count : 0);
            };
            const auto combine = [&](int stage) {
                samples[stage * M * 4 + chunk_at(row, chunk)] =
                    weighted_sum<Tile::tf32>(gathered, corners.weights[walk.tap * M + row], T());
            };

            corners.fill(p, t, first_pixel, d, first_tap, block_taps);
            __syncthreads();  // the block of taps before is done with all of shared memory, too
            gather();
            copy_weight(0);
            combine(0);
            for (int step = 0; step < walk.steps; ++step) {
                const bool more = step + 1 < walk.steps;
                if (more) {
                    walk.advance();
                    gather();
                    copy_weight((step + 1) % weight_stages);
                    cp_async_wait<1>();
                } else {
                    cp_async_wait<0>();
                }
                __syncthreads();  // the tiles of this step are complete, those of the step before are free
                tile.multiply(samples + step % 2 * M * 4, weight + step % weight_stages * N * 4);
                if (more) combine((step + 1) % 2);
            }
        }
    }

    __syncthreads();
    auto* bias = shared_memory<Accumulate<T>>();  // [N]
    for (int i = threadIdx.x; i < N; i += 4 * M)
        bias[i] = t.bias && first_column + i < columns ? t.bias[group * columns + first_column + i] : 0;
    __syncthreads();
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    tile.each_four([&](int row, int column, const auto& sums) {
        const int64_t pixel = first_pixel + row;
        const int left = columns - (first_column + column);
        if (pixel >= pixels || left <= 0) return;
        T* output = t.output + pixel * p.out_channels + (group * columns + first_column + column);
        T values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = narrow(sums[i] + bias[column + i], T());
        if (rows_of_four) return store_four(output, values);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) output[i] = values[i];
    });
}

// ---- host

template <class Tile, bool chunked, class T>
void launch_forward(const Params& p, const Forward<T>& t, void* stream) {
    constexpr int64_t shared_limit = 99 << 10;  // of the devices that have the least
    const int64_t taps = p.kernel_h * p.kernel_w, columns = p.out_channels / p.groups;
    using C = Corners<T, Tile::M>;
    const int64_t most = (shared_limit - tile_bytes<Tile> - C::bytes(0)) / (C::bytes(1) - C::bytes(0));
    const int64_t blocks_of_taps = (taps + most - 1) / most;
    const int64_t at_once = (taps + blocks_of_taps - 1) / blocks_of_taps;
    const int64_t pixels = p.batch * p.out_height * p.out_width;
    const int64_t blocks = (pixels + Tile::M - 1) / Tile::M * p.groups * ((columns + Tile::N - 1) / Tile::N);
    const bool rows_of_four =
        columns % 4 == 0 && reinterpret_cast<uintptr_t>(t.output) % (4 * sizeof(T)) == 0;
    launch("deform_conv2d: forward", forward_kernel<Tile, chunked>, grid(blocks), 4 * Tile::M,
           tile_bytes<Tile> + C::bytes(at_once), stream, p, t, int(at_once), rows_of_four);
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
        // the widest tile samples least, but all multiprocessors should have one
        const int64_t columns = p.out_channels / p.groups;
        const int64_t tiles = (p.batch * p.out_height * p.out_width + 127) / 128 * p.groups;
        const int64_t enough = multiprocessors() * 3 / 4;
        if (!chunked) return launch_forward<TensorTile<T, 64, 64>, false>(p, t, stream);
        if constexpr (sizeof(T) == 2)  // tf32's products take twice as long, and more registers
            if (columns > 128 && tiles * ((columns + 255) / 256) >= enough)
                return launch_forward<TensorTile<T, 128, 256>, true>(p, t, stream);
        if (columns > 64 && tiles * ((columns + 127) / 128) >= enough)
            return launch_forward<TensorTile<T, 128, 128>, true>(p, t, stream);
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
