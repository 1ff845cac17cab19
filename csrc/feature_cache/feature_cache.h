// The state table of a feature cache, in memory that several processes map, and the checksum of a sample.
// No policy and no files: nasfast/cache decides who fills what. The format is in docs/feature_cache.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nasfast::feature_cache {

// XXH64 of a block of memory.
uint64_t checksum(const void* data, size_t bytes, uint64_t seed);

// One sample. The word is 0 (free), 1 (published) or the owner that is writing it; the checksum holds once
// the sample is published.
struct State {
    uint64_t word;
    uint64_t checksum;
};
inline constexpr uint64_t free_word = 0;
inline constexpr uint64_t published_word = 1;

// Claims the free samples of one chunk (rows k * chunk up to (k + 1) * chunk) for an owner, in the first
// chunk from `start` on, round the table, that has any. Returns their rows: none where no sample is free. A
// chunk of which another has claimed a sample is left to it.
std::vector<int64_t> claim(State* states, int64_t count, int64_t chunk, int64_t start, uint64_t owner);

// Makes a written sample of the owner visible. False: it is not the owner's (any more).
bool publish(State& state, uint64_t owner, uint64_t checksum);

// Frees the rows begin..end-1 whose word is `word`; returns how many there were.
int64_t release(State* states, int64_t begin, int64_t end, uint64_t word);

uint64_t load(const State& state);

// Position in `rows` of the first that is no row of the table, is not published or has bytes of another
// checksum; -1 if there is none. Rows marked in `seen` are trusted, and those that are right get marked. A
// row is the seed of its checksum.
struct Samples {
    const State* states;
    const std::byte* data;
    int64_t sample_bytes, count;
};
int64_t find_broken(const Samples& samples, const int64_t* rows, int64_t n, uint8_t* seen);

}  // namespace nasfast::feature_cache
