// Parallel loop over independent units, on the OpenMP pool that torch uses. Included by per-ISA sources.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nasfast::NASFAST_ISA {

// Calls body(unit, scratch) for every unit in [0, units). `scratch` holds `scratch_size` elements of T,
// uninitialised, private to the running thread. Results do not depend on the number of threads as long
// as no two units write the same place. Allocates before the parallel region, where it may throw.
template <class T, class Body>
void parallel_for(int64_t units, int64_t scratch_size, const Body& body) {
    const int64_t padded = scratch_size + 64;  // keeps two threads off one cache line
    std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(padded * omp_get_max_threads())]);
#pragma omp parallel for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) body(unit, scratch.get() + padded * omp_get_thread_num());
}

}  // namespace nasfast::NASFAST_ISA
