#include "feature_cache/file_map.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

namespace nasfast::feature_cache {

// Pages of a map. The list only grows, so that the handler may walk it at any moment: what is unmapped has
// no pages, and is used again.
struct WatchedPages {
    std::atomic<uintptr_t> begin{0}, end{0};
    std::string line;
    WatchedPages* next = nullptr;
};

namespace {

std::atomic<WatchedPages*> watched{nullptr};
int maps = 0;
std::atomic<bool> armed{false};
struct sigaction before;

void write_line(const std::string& line) {
    for (size_t done = 0; done < line.size();) {
        const ssize_t n = write(STDERR_FILENO, line.data() + done, line.size() - done);
        if (n < 0 && errno != EINTR) return;
        if (n > 0) done += static_cast<size_t>(n);
    }
}

// Async-signal-safe: reads what was prepared, and allocates nothing.
void on_bus_error(int number, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (info->si_code == BUS_ADRERR) {
        for (const WatchedPages* pages = watched.load(); pages; pages = pages->next) {
            if (address < pages->begin || address >= pages->end) continue;
            write_line(pages->line);
            _exit(2);
        }
    }
    // on return the access fails again under the handler of before; what another process sent is sent anew
    sigaction(SIGBUS, &before, nullptr);
    armed = false;
    if (info->si_code <= 0) raise(number);
}

void arm() {
    if (armed) return;
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    armed = sigaction(SIGBUS, &action, &before) == 0;
}

// Leaves the handler where another has come on top, which hands on to it.
void disarm() {
    struct sigaction now;
    if (!armed || sigaction(SIGBUS, nullptr, &now) != 0 || now.sa_sigaction != on_bus_error) return;
    armed = sigaction(SIGBUS, &before, nullptr) != 0;
}

WatchedPages* watch(uintptr_t begin, size_t bytes, std::string line) {
    WatchedPages* pages = watched.load();
    while (pages && pages->end != 0) pages = pages->next;
    const bool fresh = !pages;
    if (fresh) pages = new WatchedPages;
    pages->line = std::move(line);
    pages->begin = begin;
    pages->end = begin + bytes;
    if (fresh) {
        pages->next = watched.load();
        watched = pages;
    }
    return pages;
}

}  // namespace

FileMap::FileMap(int file, size_t bytes, Access access, std::string line) : bytes_(bytes), access_(access) {
    const int protection = access == Access::read ? PROT_READ : PROT_READ | PROT_WRITE;
    // no reserve: a private map of a large file is no claim on memory
    const int flags = access == Access::private_ ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED;
    data_ = mmap(nullptr, bytes, protection, flags, file, 0);
    if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    pages_ = watch(reinterpret_cast<uintptr_t>(data_), bytes, std::move(line));
    ++maps;
    arm();
}

FileMap::~FileMap() {
    pages_->end = 0;
    munmap(data_, bytes_);
    if (--maps == 0) disarm();
}

bool is_shorter(int file, off_t bytes) {
    struct stat status;
    return fstat(file, &status) == 0 && status.st_size < bytes;
}

}  // namespace nasfast::feature_cache
