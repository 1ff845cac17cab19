// How sep_conv divides a map and asks for its memory. Included by per-ISA sources.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm.hpp"
#include "common/parallel.hpp"

namespace nasfast::sep_conv::NASFAST_ISA {

using namespace nasfast::NASFAST_ISA;

constexpr int64_t kTile = 64;   // pixels of a tile of a product
constexpr int64_t kBand = 512;  // pixels of a band of the depthwise convolution, about
constexpr int64_t kRows = 4;    // of a band, at least: the rows around it are read as well

// Rows of an image, whose pixels lie together.
struct Band {
    int64_t image, row, rows;
    int64_t first, pixels;  // of the map
    int64_t tile;           // the first of its tiles among those of all bands
};

// A map divided into bands, and these into tiles.
class Bands {
public:
    Bands(int64_t batch, int64_t height, int64_t width) : height_(height), width_(width) {
        rows_ = std::clamp(kBand / width, std::min(kRows, height), height);
        per_image_ = ceil_div(height, rows_), full_ = ceil_div(rows_ * width, kTile);
        const int64_t last = (height - (per_image_ - 1) * rows_) * width;
        tiles_ = (per_image_ - 1) * full_ + ceil_div(last, kTile);
        count = batch * per_image_, tiles = batch * tiles_;
    }
    Band operator[](int64_t i) const {
        const int64_t image = i / per_image_, in_image = i % per_image_, row = in_image * rows_;
        const int64_t rows = std::min(rows_, height_ - row);
        return {image,         row,
                rows,          (image * height_ + row) * width_,
                rows * width_, image * tiles_ + in_image * full_};
    }
    // Pixels of a tile.
    int64_t pixels(int64_t tile) const {
        const int64_t in_image = tile % tiles_, band = in_image / full_;
        const int64_t rows = std::min(rows_, height_ - band * rows_);
        return std::min(kTile, rows * width_ - in_image % full_ * kTile);
    }
    int64_t most_rows() const { return rows_; }

    int64_t count, tiles;

private:
    int64_t height_, width_, rows_, per_image_, full_, tiles_;
};

// Asks for memory that will be read or written soon. Products leave the memory idle: they ask a little at a
// time, since only so many requests can wait at once.
class Ahead {
public:
    // Elements [begin, begin + count) of a map, as far as it has them.
    template <class T>
    void add(const T* map, int64_t size, int64_t begin, int64_t count) {
        if (begin < 0 || begin >= size) return;
        const char* const at = reinterpret_cast<const char*>(map + begin);
        ranges_[count_++] = {at, at + std::min(count, size - begin) * static_cast<int64_t>(sizeof(T))};
    }
    // Divides what there is among so many calls.
    void divide(int64_t calls) {
        bytes_ = Arena::kLine;
        for (int i = 0; i < count_; ++i)
            bytes_ =
                std::max(bytes_, round_up(ceil_div(ranges_[i].end - ranges_[i].at, calls), Arena::kLine));
    }
    NASFAST_INLINE void operator()() {
        for (int i = 0; i < count_; ++i) {
            auto& [at, end] = ranges_[i];
            for (const char* const stop = std::min(at + bytes_, end); at < stop; at += Arena::kLine)
                __builtin_prefetch(at);
        }
    }

private:
    struct Range {
        const char *at, *end;
    };
    Range ranges_[3];
    int count_ = 0;
    int64_t bytes_ = 0;
};

}  // namespace nasfast::sep_conv::NASFAST_ISA
