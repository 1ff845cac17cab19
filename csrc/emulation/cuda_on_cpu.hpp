// Runs the CUDA kernels on the CPU, to test them without a GPU: common/cuda_kernel.cuh for a C++ compiler.
//
// Blocks run one after another and the threads of a block as fibers of one CPU thread, which change over at
// barriers and warp-wide functions only. The emulation is stricter than a device:
// - shared memory starts as NaN, and so does the target of cp.async until the wait that covers it;
// - set_order(seed) draws the order of blocks, warps and lanes;
// - skip(barrier, wait) leaves one barrier or wait of every thread out, to show that a check would notice;
// - a barrier or warp-wide function that some threads miss, and a misaligned access, raises
//   std::runtime_error with the place;
// - under AddressSanitizer shared memory ends where the launch said that it does;
// - under ThreadSanitizer only barriers and atomics order the threads, so that it reports two accesses that
//   a device could reorder, whatever order they have here.
// mma and ldmatrix follow the fragment layouts of the PTX manual; mma adds in float32, in the order of K.
#pragma once

#if !defined(__x86_64__)
#error "the emulation changes stacks in x86-64 assembly"
#endif

#include <math.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/cuda_host.hpp"
#include "common/cuda_language.hpp"
#include "common/dtype.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
// Of the emulation itself, which reads and writes for other threads.
#define NASFAST_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

namespace nasfast::emulation {

// ---- fibers

// Saves this stack in *from and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

struct Copy {  // a cp.async under way
    void* shared;
    const void* global;  // null: zeros
};

enum class State { ready, in_warp, at_barrier, done };
using WarpOperation = void (*)(void* const* operands);

struct Thread {
    void* saved = nullptr;  // stack pointer
    State state = State::done;
    WarpOperation operation = nullptr;
    void* operand = nullptr;
    const char* file = nullptr;  // of the barrier
    int line = 0;
    std::vector<std::vector<Copy>> copies;        // by group, the last one open
    unsigned barriers = 0, warp_barriers = 0;     // passed, in all blocks
    int64_t block_barriers = 0, block_waits = 0;  // met in this block
    void* tsan = nullptr;
};

constexpr int lanes = 32;
constexpr size_t stack_bytes = 256 << 10;
constexpr int max_threads = 1024;

// Everything about the running launch; one launch at a time.
struct Engine {
    std::vector<Thread> threads;
    int current = 0, size = 0;  // thread; threads of the block
    void (*body)(const void*) = nullptr;
    const void* closure = nullptr;
    unsigned char* shared = nullptr;
    int64_t shared_bytes = 0;
    const char* name = "";
    std::string error;
    void* saved = nullptr;  // stack pointer of the host
    const void* host_stack = nullptr;
    size_t host_stack_bytes = 0;
    void* host_tsan = nullptr;
    char* stacks = nullptr;
    char tags[2 + 2 * max_threads / lanes];  // what ThreadSanitizer hangs the order of barriers on
    char start_tag, end_tag;
    uint64_t seed = 0;
    int64_t skipped_barrier = -1, skipped_wait = -1;
    std::mt19937_64 random;
};
inline Engine engine;

// What of a launch a driver would be given, and the bytes of its arguments.
struct Launch {
    std::string name;
    dim3 grid;
    unsigned threads;
    int64_t shared_bytes;
    std::string arguments, padding;  // 0 in a byte of the second where the first has padding
};
inline std::vector<Launch> launches;  // while recording
inline bool recording = false;

template <class T>
void record(Launch& launch, const T& argument) {
    launch.arguments.append(reinterpret_cast<const char*>(&argument), sizeof(T));
    T value = argument;
    std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
    __builtin_clear_padding(&value);
    launch.padding.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

inline void set_order(uint64_t seed) {
    engine.seed = seed;
    engine.random.seed(seed);
}

// Leaves out the barrier and the wait for cp.async that a thread meets as number so-and-so in its block.
inline void skip(int64_t barrier, int64_t wait) {
    engine.skipped_barrier = barrier;
    engine.skipped_wait = wait;
}

inline void acquire([[maybe_unused]] char* tag) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(tag);
#endif
}
inline void release([[maybe_unused]] char* tag) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(tag);
#endif
}

// From a thread to the host, which calls the next.
NASFAST_UNCHECKED inline void leave(Thread& thread) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(thread.state == State::done ? nullptr : &fake, engine.host_stack,
                                   engine.host_stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(engine.host_tsan, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(&thread.saved, engine.saved);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &engine.host_stack, &engine.host_stack_bytes);
#endif
}

NASFAST_UNCHECKED inline void enter(int index) {
    Thread& thread = engine.threads[index];
    engine.current = index;
    threadIdx.x = unsigned(index);
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, engine.stacks + stack_bytes * index, stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(thread.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(&engine.saved, thread.saved);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// The bottom of every fiber's stack.
NASFAST_UNCHECKED inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &engine.host_stack, &engine.host_stack_bytes);
#endif
    acquire(&engine.start_tag);
    Thread& thread = engine.threads[engine.current];
    thread.copies.assign(1, {});
    engine.body(engine.closure);
    thread.state = State::done;
    release(&engine.end_tag);
    leave(thread);
    __builtin_unreachable();
}

// Ends the launch with an error; called by threads.
NASFAST_UNCHECKED inline void fail(const std::string& message) {
    if (engine.error.empty())
        engine.error = std::string(engine.name) + ": " + message + " (block " + std::to_string(blockIdx.x) +
                       ", thread " + std::to_string(engine.current) + ")";
    leave(engine.threads[engine.current]);
}

inline void check_aligned(const void* address, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(std::string(what) + ": the address must be a multiple of " + std::to_string(bytes));
}

// All 32 lanes come with the same operation; the last one runs it on what they brought.
NASFAST_UNCHECKED inline void warp_wide(WarpOperation operation, void* operand) {
    Thread& me = engine.threads[engine.current];
    me.operation = operation;
    me.operand = operand;
    Thread* warp = &engine.threads[engine.current / lanes * lanes];
    me.state = State::in_warp;
    for (int i = 0; i < lanes; ++i)
        if (warp[i].state != State::in_warp) return leave(me);
    void* operands[lanes];
    for (int i = 0; i < lanes; ++i) {
        if (warp[i].operation != operation) fail("lanes of a warp call different warp-wide functions");
        operands[i] = warp[i].operand;
    }
    operation(operands);
    for (int i = 0; i < lanes; ++i) warp[i].state = State::ready;
}

NASFAST_UNCHECKED inline void block_barrier(const char* file, int line) {
    Thread& me = engine.threads[engine.current];
    if (me.block_barriers++ == engine.skipped_barrier) return;
    char* tag = engine.tags + me.barriers++ % 2;
    me.file = file;
    me.line = line;
    me.state = State::at_barrier;
    release(tag);
    leave(me);
    acquire(tag);
}

NASFAST_UNCHECKED inline void warp_barrier() {
    Thread& me = engine.threads[engine.current];
    char* tag = engine.tags + 2 + engine.current / lanes * 2 + me.warp_barriers++ % 2;
    release(tag);
    warp_wide([](void* const*) {}, nullptr);
    acquire(tag);
}

// ---- launch

NASFAST_UNCHECKED inline void run_block() {
    const int warps = engine.size / lanes;
    for (int i = 0; i < engine.size; ++i) {
        Thread& thread = engine.threads[i];
        char* stack = engine.stacks + stack_bytes * i;
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack, stack_bytes);
#endif
        void** top = reinterpret_cast<void**>(stack + stack_bytes) - 2;
        *top = reinterpret_cast<void*>(&run_thread);  // where the first switch returns to
        thread.saved = top - 6;                       // after six registers
        thread.state = State::ready;
        thread.block_barriers = thread.block_waits = 0;
    }
    std::vector<int> ready(warps);
    for (;;) {
        ready.resize(warps);
        std::iota(ready.begin(), ready.end(), 0);
        while (!ready.empty()) {
            const size_t chosen = engine.seed ? engine.random() % ready.size() : 0;
            const int warp = ready[chosen], mask = engine.seed ? int(engine.random() % lanes) : 0;
            bool progress = false;
            for (int i = 0; i < lanes && engine.error.empty(); ++i) {
                const int index = warp * lanes + (i ^ mask);
                if (engine.threads[index].state != State::ready) continue;
                enter(index);
                progress = true;
            }
            if (!engine.error.empty()) throw std::runtime_error(engine.error);
            if (!progress) ready.erase(ready.begin() + chosen);
        }
        const Thread& first = engine.threads[0];
        for (int i = 0; i < engine.size; ++i) {
            const Thread& thread = engine.threads[i];
            if (thread.state == first.state && thread.state != State::in_warp && thread.line == first.line &&
                !strcmp(thread.file ? thread.file : "", first.file ? first.file : ""))
                continue;
            const auto where = [](const Thread& t) {
                return t.state == State::done ? std::string("has ended")
                       : t.state == State::in_warp
                           ? std::string("is in a warp-wide function")
                           : std::string("waits at ") + t.file + ":" + std::to_string(t.line);
            };
            throw std::runtime_error(std::string(engine.name) + ": thread 0 " + where(first) +
                                     ", but thread " + std::to_string(i) + " " + where(thread));
        }
        if (first.state == State::done) return;
        for (int i = 0; i < engine.size; ++i) engine.threads[i].state = State::ready;
    }
}

NASFAST_UNCHECKED inline void run_grid(const char* name, dim3 grid, unsigned threads, int64_t shared_bytes,
                                       void (*body)(const void*), const void* closure) {
    static std::mutex one_launch;
    const std::lock_guard<std::mutex> lock(one_launch);
    if (threads == 0 || threads % lanes || threads > max_threads || shared_bytes > 99 << 10)
        throw std::runtime_error(std::string(name) +
                                 ": a block must have whole warps, at most 1024 threads and "
                                 "99 KiB of shared memory, got " +
                                 std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                                 " bytes");
    if (!engine.stacks) {
        void* memory = mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        engine.stacks = static_cast<char*>(memory);
        engine.threads.resize(max_threads);
    }
    engine.size = int(threads);
    engine.name = name;
    engine.body = body;
    engine.closure = closure;
    engine.shared_bytes = shared_bytes;
    engine.error.clear();
    gridDim = grid;
    blockDim = dim3(threads);
    unsigned barriers = 0;  // the same for all, also after launches of fewer threads
    for (const Thread& thread : engine.threads) barriers = std::max(barriers, thread.barriers);
    for (Thread& thread : engine.threads) {
        thread.barriers = barriers;
        thread.file = nullptr;
        thread.line = 0;
#ifdef __SANITIZE_THREAD__
        engine.host_tsan = __tsan_get_current_fiber();
        if (!thread.tsan && &thread - engine.threads.data() < engine.size)
            thread.tsan = __tsan_create_fiber(0);
#endif
    }
    std::vector<int64_t> order(int64_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    if (engine.seed) std::shuffle(order.begin(), order.end(), engine.random);
    // kept apart to the end: blocks do not share it, and no order of theirs must hide a race
    std::vector<unsigned char*> shared;
    const auto release_shared = [&] {
        for (unsigned char* memory : shared) free(memory);
    };
    try {
        for (const int64_t block : order) {
            blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                        unsigned(block / grid.x / grid.y)};
#ifndef __SANITIZE_THREAD__
            release_shared();
            shared.clear();
#endif
            // aligned as a device aligns it, and no byte longer
            void* memory = nullptr;
            if (posix_memalign(&memory, 1024, size_t(std::max<int64_t>(shared_bytes, 1))))
                throw std::bad_alloc();
            shared.push_back(engine.shared = static_cast<unsigned char*>(memory));
            memset(memory, 0xff, size_t(shared_bytes));
            release(&engine.start_tag);
            run_block();
        }
    } catch (...) {
        release_shared();
        throw;
    }
    acquire(&engine.end_tag);
    release_shared();
}

struct Ldmatrix {
    uint32_t read[4];  // the row that this lane names
    uint32_t words[4];
};

template <bool transposed>
NASFAST_UNCHECKED void exchange_rows(void* const* operands) {
    for (int i = 0; i < 4 * 64; ++i) {
        const int matrix = i / 64, row = i / 8 % 8, column = i % 8;
        const uint32_t word = static_cast<Ldmatrix*>(operands[8 * matrix + row])->read[column / 2];
        const int line = transposed ? column : row, place = transposed ? row : column;
        uint32_t& target = static_cast<Ldmatrix*>(operands[4 * line + place / 2])->words[matrix];
        const uint32_t element = column % 2 ? word >> 16 : word & 0xffff;
        target = place % 2 ? (target & 0xffff) | element << 16 : (target & 0xffff0000u) | element;
    }
}

template <bool transposed>
void ldmatrix(uint32_t (&words)[4], const void* shared) {
    check_aligned(shared, 16, "ldmatrix");
    Ldmatrix operand{};
    const auto* row = static_cast<const uint32_t*>(shared);
    for (int i = 0; i < 4; ++i) operand.read[i] = row[i];
    warp_wide(exchange_rows<transposed>, &operand);
    for (int i = 0; i < 4; ++i) words[i] = operand.words[i];
}

template <class T>
struct Mma {
    float d[4];
    uint32_t a[4], b[2];
};

template <class T>
struct Shuffle {
    T value, result;
    int source;
};

template <class T>
NASFAST_UNCHECKED void exchange(void* const* operands) {
    for (int lane = 0; lane < lanes; ++lane) {
        auto* operand = static_cast<Shuffle<T>*>(operands[lane]);
        operand->result = static_cast<Shuffle<T>*>(operands[operand->source])->value;
    }
}

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Adds as an atomic of the CPU, which ThreadSanitizer knows and which orders nothing else.
template <class Bits, class T>
void atomic_add(T* address, T value) {
    static_assert(sizeof(Bits) == sizeof(T));
    auto* bits = reinterpret_cast<Bits*>(address);
    Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
    do {
        T sum;
        memcpy(&sum, &before, sizeof sum);
        sum += value;
        memcpy(&after, &sum, sizeof sum);
    } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

}  // namespace nasfast::emulation

// Barriers know their place, to tell it.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    nasfast::emulation::block_barrier(file, line);
}
inline void __syncwarp() { nasfast::emulation::warp_barrier(); }

// ---- common/cuda_kernel.cuh, in its order

#define NASFAST_KERNEL(...) __VA_ARGS__

namespace nasfast::cuda {

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            int64_t shared_bytes, void* /*stream*/, std::decay_t<Parameters>... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (emulation::recording) {
        emulation::Launch launch{name, grid, threads, shared_bytes, {}, {}};
        (emulation::record(launch, arguments), ...);
        emulation::launches.push_back(launch);
    }
    const auto call = [&] { kernel(arguments...); };
    emulation::run_grid(
        name, grid, threads, shared_bytes,
        [](const void* closure) { (*static_cast<decltype(&call)>(closure))(); }, &call);
}

inline int multiprocessors() { return 4; }

inline unsigned block_index() { return blockIdx.x; }

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::engine.shared);
}

inline uint4 load_16(const void* global) {
    emulation::check_aligned(global, 16, "load_16");
    return *static_cast<const uint4*>(global);
}

inline uint4 load_16(const void* global, bool valid) { return valid ? load_16(global) : uint4{}; }

inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulation::check_aligned(shared, 16, "cp_async_16");
    emulation::check_aligned(global, 16, "cp_async_16");
    auto* target = static_cast<uint32_t*>(shared);
    for (int i = 0; i < 4; ++i) target[i] = 0xffffffffu;
    emulation::engine.threads[emulation::engine.current].copies.back().push_back(
        {shared, valid ? global : nullptr});
}

inline void cp_async_commit() { emulation::engine.threads[emulation::engine.current].copies.emplace_back(); }

template <int N>
void cp_async_wait() {
    emulation::Thread& me = emulation::engine.threads[emulation::engine.current];
    auto& copies = me.copies;
    if (me.block_waits++ == emulation::engine.skipped_wait) return;
    while (copies.size() > N + 1) {
        for (const emulation::Copy& copy : copies.front()) {
            auto* target = static_cast<uint32_t*>(copy.shared);
            const auto* source = static_cast<const uint32_t*>(copy.global);
            for (int i = 0; i < 4; ++i) target[i] = source ? source[i] : 0;
        }
        copies.erase(copies.begin());
    }
}

inline void atomic_add(float* global, float value) { emulation::atomic_add<uint32_t>(global, value); }
inline void atomic_add(double* global, double value) { emulation::atomic_add<uint64_t>(global, value); }
inline void atomic_add(unsigned long long* global, unsigned long long value) {
    __atomic_fetch_add(global, value, __ATOMIC_RELAXED);
}
inline void atomic_max(unsigned* global, unsigned value) {
    unsigned before = __atomic_load_n(global, __ATOMIC_RELAXED);
    while (before < value &&
           !__atomic_compare_exchange_n(global, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
inline void atomic_or(unsigned* global, unsigned value) {
    __atomic_fetch_or(global, value, __ATOMIC_RELAXED);
}
inline void atomic_add(float* global, float4 value) {
    emulation::check_aligned(global, 16, "atomic_add");
    atomic_add(global, value.x);
    atomic_add(global + 1, value.y);
    atomic_add(global + 2, value.z);
    atomic_add(global + 3, value.w);
}

template <class T>
T shuffle(T value, int lane) {
    emulation::Shuffle<T> operand{value, value, int(unsigned(lane) % emulation::lanes)};
    emulation::warp_wide(emulation::exchange<T>, &operand);
    return operand.result;
}
template <class T>
T shuffle_xor(T value, int lanes) {
    return shuffle(value, emulation::engine.current ^ lanes);
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return emulation::bits_to_float(uint32_t(value.bits) << 16); }
inline float widen(float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31;
    const uint32_t fraction = value.bits & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    return emulation::bits_to_float(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

inline float bits_to_float(uint32_t bits) { return emulation::bits_to_float(bits); }

inline float narrow(float value, float) { return value; }
inline double narrow(double value, double) { return value; }
inline bfloat16 narrow(float value, bfloat16) {
    const uint32_t bits = emulation::float_to_bits(value);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 narrow(float value, float16) {
    const uint16_t sign = uint16_t(emulation::float_to_bits(value) >> 16 & 0x8000);
    const float size = fabsf(value);
    if (value != value) return {0x7fff};
    if (size >= 65520) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(nearbyintf(size * 0x1p24f)))};
    const uint32_t bits = emulation::float_to_bits(size);
    return {uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
}

template <class T>
float2 widen_pair(uint32_t pair, T) {
    return {widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)})};
}
template <class T>
uint32_t narrow_pair(float first, float second, T type) {
    return uint32_t(narrow(second, type).bits) << 16 | narrow(first, type).bits;
}

inline uint32_t to_tf32(float value) {
    const uint32_t bits = emulation::float_to_bits(value);
    return value == value ? (bits + 0x1000) & 0xffffe000u : 0x7fffffffu;
}

}  // namespace nasfast::cuda

namespace nasfast::emulation {

// Element k of a row of 32 bytes, given its words.
inline float element(const uint32_t* words, int k, float) { return bits_to_float(words[k] & 0xffffe000u); }
template <class T>
float element(const uint32_t* words, int k, T) {
    return cuda::widen(T{uint16_t(k % 2 ? words[k / 2] >> 16 : words[k / 2])});
}

template <class T>
NASFAST_UNCHECKED void multiply(void* const* operands) {
    const auto lane = [&](int row, int word) {
        return static_cast<Mma<T>*>(operands[row % 8 * 4 + word % 4]);
    };
    constexpr int depth = 32 / sizeof(T);
    float a[16][depth], b[8][depth];
    for (int row = 0; row < 16; ++row) {
        uint32_t words[8];
        for (int word = 0; word < 8; ++word) words[word] = lane(row, word)->a[row / 8 + word / 4 * 2];
        for (int k = 0; k < depth; ++k) a[row][k] = element(words, k, T{});
    }
    for (int column = 0; column < 8; ++column) {
        uint32_t words[8];
        for (int word = 0; word < 8; ++word) words[word] = lane(column, word)->b[word / 4];
        for (int k = 0; k < depth; ++k) b[column][k] = element(words, k, T{});
    }
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float& d = lane(row, column / 2)->d[row / 8 * 2 + column % 2];
            for (int k = 0; k < depth; ++k) d += a[row][k] * b[column][k];
        }
}

}  // namespace nasfast::emulation

namespace nasfast::cuda {

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    emulation::Mma<T> operand;
    for (int i = 0; i < 4; ++i) operand.d[i] = d[i], operand.a[i] = a[i];
    for (int i = 0; i < 2; ++i) operand.b[i] = b[i];
    emulation::warp_wide(emulation::multiply<T>, &operand);
    for (int i = 0; i < 4; ++i) d[i] = operand.d[i];
}

inline void ldmatrix_x4(uint32_t (&words)[4], const void* shared) {
    emulation::ldmatrix<false>(words, shared);
}
inline void ldmatrix_x4_trans(uint32_t (&words)[4], const void* shared) {
    emulation::ldmatrix<true>(words, shared);
}

}  // namespace nasfast::cuda
