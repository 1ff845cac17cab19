// Parallel loop over independent units, on the OpenMP pool that torch uses. Included by per-ISA sources.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace nasfast::NASFAST_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out memory in cache lines. Without memory of its own it only counts what is taken.
class Arena {
public:
    static constexpr int64_t kLine = 64;

    explicit Arena(char* memory = nullptr) : memory_(memory) {}

    template <class T>
    T* take(int64_t count) {
        char* const here = memory_ ? memory_ + used_ : nullptr;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
        return reinterpret_cast<T*>(here);
    }
    int64_t used() const { return used_; }

private:
    char* memory_;
    int64_t used_ = 0;
};

// Blocks of memory that a thread keeps for its next call: fresh ones would be cleared by the system, page by
// page, and scattered over the heap between the results of calls.
class Pool {
public:
    struct Block {
        std::unique_ptr<char[]> memory;
        size_t size = 0;
    };
    static constexpr size_t kLeast = 1 << 18, kMost = 1 << 26;  // bytes that are worth keeping

    Block take(size_t size) {
        if (size < kLeast || size > kMost) return {std::unique_ptr<char[]>(new char[size]), size};
        // the smallest that is large enough; else the largest makes room for one that is
        const auto smaller = [](const Block& a, const Block& b) { return a.size < b.size; };
        const auto large_enough = [&](const Block& block) { return block.size >= size; };
        std::sort(kept_.begin(), kept_.end(), smaller);
        const auto found = std::find_if(kept_.begin(), kept_.end(), large_enough);
        if (found != kept_.end()) {
            Block block = std::move(*found);
            kept_.erase(found);
            return block;
        }
        if (!kept_.empty()) kept_.pop_back();
        return {std::unique_ptr<char[]>(new char[size]), size};
    }
    void give(Block block) {
        if (block.size >= kLeast && block.size <= kMost) kept_.push_back(std::move(block));
    }
    static Pool& mine() {
        static thread_local Pool pool;
        return pool;
    }

private:
    std::vector<Block> kept_;
};

// Uninitialised memory for `size` elements that begins on a cache line.
template <class T>
class Array {
public:
    explicit Array(int64_t size)
        : size_(size), block_(Pool::mine().take(static_cast<size_t>(size * sizeof(T) + Arena::kLine))) {}
    Array(Array&&) = default;
    ~Array() {
        if (block_.memory) Pool::mine().give(std::move(block_));
    }
    T* get() const {
        char* const begin = block_.memory.get();
        return reinterpret_cast<T*>(begin + -reinterpret_cast<uintptr_t>(begin) % Arena::kLine);
    }
    int64_t size() const { return size_; }

private:
    int64_t size_;
    Pool::Block block_;
};

constexpr int64_t kRuns = 8;  // of units for each thread

// Calls body(unit, scratch) for every unit in [0, units). `scratch` is what layout(Arena&) returns:
// pointers into uninitialised memory of the running thread. Results do not depend on the number of threads
// as long as no two units write the same place. Allocates before the parallel region, where it may throw.
template <class Layout, class Body>
void parallel_for(int64_t units, const Layout& layout, const Body& body) {
    if (units <= 0) return;
    Arena counted;
    layout(counted);
    const int64_t threads = std::min<int64_t>(omp_get_max_threads(), units);
    // neighbouring units share what they read: one thread takes a run of them, short enough to even out
    const int64_t run = std::max<int64_t>(1, units / (threads * kRuns));
    const int64_t each = counted.used() + 2 * Arena::kLine;  // no two threads on neighbouring lines
    const Array<char> memory(each * threads);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Arena arena(memory.get() + each * omp_get_thread_num());
        auto scratch = layout(arena);
#pragma omp for schedule(dynamic, run)
        for (int64_t unit = 0; unit < units; ++unit) body(unit, scratch);
    }
}

// The same without scratch memory.
template <class Body>
void parallel_for(int64_t units, const Body& body) {
    parallel_for(units, [](Arena&) { return 0; }, [&](int64_t unit, int) { body(unit); });
}

}  // namespace nasfast::NASFAST_ISA
