// Small kernels, most of them wrong in one way, that the emulation is tried on. The argument names one.
#include <cstdio>
#include <map>

#include "common/cuda_kernel.cuh"

using namespace nasfast;
using namespace nasfast::cuda;

namespace {

__global__ void reverse(float* out, bool barrier) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = float(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void reverse_in_warp(float* out, bool barrier) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = float(threadIdx.x);
    if (barrier)
        __syncwarp();
    else
        shuffle_xor(0, 1);  // orders nothing
    out[threadIdx.x] = shared[threadIdx.x ^ 31];
}

__global__ void copy(const float* in, float* out, bool wait) {
    float* shared = shared_memory<float>();
    cp_async_16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x % 2 == 0);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

__global__ void divergent_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void divergent_shuffle() {
    if (threadIdx.x % 2) shuffle_xor(1, 1);
}

__global__ void two_warp_functions() {
    if (threadIdx.x % 2)
        shuffle_xor(1, 1);
    else
        shuffle_xor(1.0, 1);
}

__global__ void misaligned() {
    uint32_t words[4];
    ldmatrix_x4(words, shared_memory<char>() + 4);
}

__global__ void beyond_shared(float* out) {
    const float* shared = shared_memory<float>();
    out[0] = shared[64 + threadIdx.x];
}

__global__ void unwritten_shared(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

// Of the block's own thread, so that the blocks do it by different ones.
__global__ void all_blocks(float* out, bool atomic) {
    if (threadIdx.x != blockIdx.x) return;
    if (atomic)
        atomic_add(out, 1.0f);
    else
        out[0] += 1.0f;
}

// [16, K] [8, K]^T in shared memory as the kernels have them, but for swizzles.
template <class T>
__global__ void product(const T* a, const T* b, float* out, bool transposed) {
    constexpr int K = 32 / int(sizeof(T));
    T* shared = shared_memory<T>();
    for (int i = threadIdx.x; i < 24 * K; i += 32) shared[i] = i < 16 * K ? a[i] : b[i - 16 * K];
    __syncthreads();
    const int lane = threadIdx.x;
    uint32_t of_a[4], of_b[4];
    ldmatrix_x4(of_a, shared + lane % 16 * K + lane / 16 * (K / 2));
    if (transposed)  // b is [K, 8], of 16 bits
        ldmatrix_x4_trans(of_b, shared + 16 * K + lane % 16 * 8);
    else
        ldmatrix_x4(of_b, shared + 16 * K + lane % 8 * K + lane / 8 % 2 * (K / 2));
    const uint32_t half[2] = {of_b[0], of_b[1]};
    float d[4] = {};
    mma(d, of_a, half, T());
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

float out[256], in[256];

template <class T>
bool product_is_right(bool transposed) {
    constexpr int K = 32 / int(sizeof(T));
    T a[16 * K], b[8 * K];
    for (int i = 0; i < 16 * K; ++i) a[i] = narrow(float(i * 7 % 31 - 15), T());
    for (int i = 0; i < 8 * K; ++i) b[i] = narrow(float(i * 5 % 17 - 8), T());
    launch("product", product<T>, 1, 32, 24 * 32, nullptr, a, b, out, transposed);
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float sum = 0;
            for (int k = 0; k < K; ++k)
                sum += widen(a[row * K + k]) * widen(b[transposed ? k * 8 + column : column * K + k]);
            if (out[row * 8 + column] != sum) return false;
        }
    return true;
}

bool halves_are_right() {
    for (uint32_t i = 0; i < 1 << 16; ++i) {
        const float16 half{uint16_t(i)};
        _Float16 native;
        memcpy(&native, &half, 2);
        const float value = widen(half);
        if (value != float(native) && value == value) return false;
        if (value == value && narrow(value, float16()).bits != i) return false;
        const bfloat16 brain{uint16_t(i)};
        if (widen(brain) == widen(brain) && narrow(widen(brain), bfloat16()).bits != i) return false;
    }
    for (uint64_t i = 0; i < 1ull << 32; i += 4099) {
        const float value = bits_to_float(uint32_t(i));
        if (value != value) continue;
        const auto native = _Float16(value);
        const float16 half = narrow(value, float16());
        if (memcmp(&native, &half, 2)) return false;
    }
    // ties to even
    return narrow(bits_to_float(0x3f808000), bfloat16()).bits == 0x3f80 &&
           narrow(bits_to_float(0x3f818000), bfloat16()).bits == 0x3f82 &&
           to_tf32(bits_to_float(0x3f801000)) == 0x3f802000;
}

}  // namespace

int main(int, char** arguments) try {
    const std::string name = arguments[1];
    emulation::set_order(std::stoul(arguments[2]));
    for (int i = 0; i < 256; ++i) in[i] = float(i);
    bool right = true;
    const auto all = [&](const auto& test) {
        for (int i = 0; i < 64; ++i) right = right && test(i);
    };
    if (name == "reverse" || name == "reverse, no barrier") {
        launch("reverse", reverse, 1, 64, 256, nullptr, out, name == "reverse");
        all([](int i) { return out[i] == float(63 - i); });
    } else if (name == "reverse in warp" || name == "reverse in warp, no barrier") {
        launch("reverse", reverse_in_warp, 1, 64, 256, nullptr, out, name == "reverse in warp");
        all([](int i) { return out[i] == float(i ^ 31); });
    } else if (name == "copy" || name == "copy, no wait") {
        launch("copy", copy, 1, 32, 512, nullptr, in, out, name == "copy");
        all([](int i) { return out[i] == (i / 4 % 2 ? 0.0f : float(i)); });
    } else if (name == "unwritten shared") {
        launch("unwritten", unwritten_shared, 1, 64, 256, nullptr, out);
        all([](int i) { return out[i] == out[i]; });
    } else if (name == "beyond shared") {
        launch("beyond", beyond_shared, 1, 32, 256, nullptr, out);
    } else if (name == "all blocks" || name == "all blocks, atomic") {
        launch("all blocks", all_blocks, 8, 32, 0, nullptr, out, name == "all blocks, atomic");
        right = out[0] == 8;
    } else if (name == "product") {
        right = product_is_right<bfloat16>(false) && product_is_right<float16>(false) &&
                product_is_right<float>(false) && product_is_right<bfloat16>(true) &&
                product_is_right<float16>(true);
    } else if (name == "halves") {
        right = halves_are_right();
    } else if (name == "half a warp") {
        launch("half a warp", two_barriers, 1, 48, 0, nullptr);
    } else {
        const std::map<std::string, void (*)()> faults{{"divergent barrier", divergent_barrier},
                                                       {"two barriers", two_barriers},
                                                       {"divergent shuffle", divergent_shuffle},
                                                       {"two warp functions", two_warp_functions},
                                                       {"misaligned", misaligned}};
        launch(arguments[1], faults.at(name), 1, 64, 256, nullptr);
    }
    std::puts(right ? "right" : "wrong");
} catch (const std::exception& error) {
    std::puts(error.what());
}
