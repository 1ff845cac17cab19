// Python's entries for the feature cache: addresses are those of mapped files.
#pragma once

#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <map>
#include <system_error>

#include "feature_cache/feature_cache.h"
#include "feature_cache/file_map.h"

namespace nasfast::feature_cache {

inline State* states_at(uintptr_t address) { return reinterpret_cast<State*>(address); }

inline void bind(pybind11::module_& m) {
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def(
        "feature_cache_checksum",
        [](uintptr_t address, size_t bytes, uint64_t seed) {
            return checksum(reinterpret_cast<const void*>(address), bytes, seed);
        },
        Released());
    m.def("feature_cache_claim",
          [](uintptr_t states, int64_t count, int64_t chunk, int64_t start, uint64_t owner) {
              return claim(states_at(states), count, chunk, start, owner);
          });
    m.def("feature_cache_publish", [](uintptr_t states, int64_t row, uint64_t owner, uint64_t sum) {
        return publish(states_at(states)[row], owner, sum);
    });
    m.def("feature_cache_release", [](uintptr_t states, int64_t begin, int64_t end, uint64_t word) {
        return release(states_at(states), begin, end, word);
    });
    // word -> how many samples have it
    m.def("feature_cache_census", [](uintptr_t states, int64_t count) {
        std::map<uint64_t, int64_t> census;
        for (int64_t row = 0; row < count; ++row) ++census[load(states_at(states)[row])];
        return census;
    });
    m.def(
        "feature_cache_find_broken",
        [](uintptr_t states, uintptr_t data, int64_t sample_bytes, int64_t count, uintptr_t rows, int64_t n,
           uintptr_t seen) {
            const auto bytes = reinterpret_cast<const std::byte*>(data);
            return find_broken({states_at(states), bytes, sample_bytes, count},
                               reinterpret_cast<const int64_t*>(rows), n, reinterpret_cast<uint8_t*>(seen));
        },
        Released());
    // Reserves the blocks of a file; returns 0 or an errno. Unlike posix_fallocate it writes nothing where
    // the file system cannot (EOPNOTSUPP), which would race with other writers.
    m.def(
        "feature_cache_allocate",
        [](int file, int64_t bytes) {
            while (fallocate(file, 0, 0, bytes) != 0)
                if (errno != EINTR) return errno;
            return 0;
        },
        Released());
    // Begins of files in memory, as buffers of bytes. The line is what a SIGBUS from one prints.
    namespace py = pybind11;
    py::class_<FileMap> map(m, "FileMap", py::buffer_protocol());
    py::enum_<FileMap::Access>(map, "Access")
        .value("READ", FileMap::Access::read)
        .value("WRITE", FileMap::Access::write)
        .value("PRIVATE", FileMap::Access::private_);
    map.def(py::init([](int file, size_t bytes, FileMap::Access access, const py::bytes& line) {
           try {
               return new FileMap(file, bytes, access, line);
           } catch (const std::system_error& error) {
               errno = error.code().value();
               PyErr_SetFromErrno(PyExc_OSError);
               throw py::error_already_set();
           }
       }))
        .def_buffer([](const FileMap& self) {
            return py::buffer_info(static_cast<uint8_t*>(self.data()), static_cast<py::ssize_t>(self.size()),
                                   !self.is_writable());
        });
    m.def("feature_cache_is_shorter", &is_shorter);
}

}  // namespace nasfast::feature_cache
