// Files in memory that may be cut short meanwhile: reading what is gone is a SIGBUS, which by itself ends a
// process without a word.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

namespace nasfast::feature_cache {

struct WatchedPages;

// The first bytes of a file, mapped. While any is, a SIGBUS from its pages writes its line to the standard
// error and ends the process with exit status 2; every other goes to the handler that was there before.
// Made and destroyed by one thread at a time (the one with the GIL).
class FileMap {
public:
    enum class Access {
        read,     // what all processes see
        write,    // the same, and to write to
        private_  // to write to in this process alone: the file is never touched
    };

    // Throws std::system_error.
    FileMap(int file, size_t bytes, Access access, std::string line);
    FileMap(const FileMap&) = delete;
    FileMap& operator=(const FileMap&) = delete;
    ~FileMap();

    void* data() const { return data_; }
    size_t size() const { return bytes_; }
    bool is_writable() const { return access_ != Access::read; }

private:
    size_t bytes_;
    Access access_;
    void* data_;
    WatchedPages* pages_;
};

// Whether an open file has fewer bytes than it should.
bool is_shorter(int file, off_t bytes);

}  // namespace nasfast::feature_cache
