#include "feature_cache/feature_cache.h"

#include <algorithm>
#include <cstring>

namespace nasfast::feature_cache {
namespace {

// The five primes of XXH64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
constexpr uint64_t prime1 = 0x9E3779B185EBCA87, prime2 = 0xC2B2AE3D27D4EB4F, prime3 = 0x165667B19E3779F9,
                   prime4 = 0x85EBCA77C2B2AE63, prime5 = 0x27D4EB2F165667C5;

// Bytes to fetch ahead: the processor's own prefetch ends at each page, which halves the speed.
constexpr int ahead = 4096;

uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

// little endian, like every format of this module
template <class T>
uint64_t read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

uint64_t round(uint64_t lane, uint64_t input) { return rotate(lane + input * prime2, 31) * prime1; }

bool replace(uint64_t& word, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(&word, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

}  // namespace

uint64_t checksum(const void* data, size_t bytes, uint64_t seed) {
    auto at = static_cast<const unsigned char*>(data);
    const auto end = at + bytes;
    uint64_t sum = seed + prime5;
    if (bytes >= 32) {
        uint64_t a = seed + prime1 + prime2, b = seed + prime2, c = seed, d = seed - prime1;
        for (; end - at >= 32; at += 32) {
            __builtin_prefetch(at + ahead);
            a = round(a, read<uint64_t>(at));
            b = round(b, read<uint64_t>(at + 8));
            c = round(c, read<uint64_t>(at + 16));
            d = round(d, read<uint64_t>(at + 24));
        }
        sum = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        for (const uint64_t lane : {a, b, c, d}) sum = (sum ^ round(0, lane)) * prime1 + prime4;
    }
    sum += bytes;
    for (; end - at >= 8; at += 8) sum = rotate(sum ^ round(0, read<uint64_t>(at)), 27) * prime1 + prime4;
    for (; end - at >= 4; at += 4) sum = rotate(sum ^ read<uint32_t>(at) * prime1, 23) * prime2 + prime3;
    for (; at < end; ++at) sum = rotate(sum ^ *at * prime5, 11) * prime1;
    sum = (sum ^ sum >> 33) * prime2;
    sum = (sum ^ sum >> 29) * prime3;
    return sum ^ sum >> 32;
}

std::vector<int64_t> claim(State* states, int64_t count, int64_t chunk, int64_t start, uint64_t owner) {
    std::vector<int64_t> rows;
    const int64_t chunks = (count + chunk - 1) / chunk;
    for (int64_t k = 0; k < chunks && rows.empty(); ++k) {
        const int64_t begin = (start / chunk + k) % chunks * chunk;
        const auto last = states + std::min(begin + chunk, count);
        const auto is_claimed = [](const State& state) { return load(state) > published_word; };
        if (std::any_of(states + begin, last, is_claimed)) continue;
        // all begin with the first row that is not published, which only one gets: whoever comes later,
        // and looked before, finds it claimed
        for (State* state = states + begin; state < last; ++state) {
            if (load(*state) == published_word) continue;
            if (!replace(state->word, free_word, owner)) break;
            rows.push_back(state - states);
        }
    }
    return rows;
}

bool publish(State& state, uint64_t owner, uint64_t checksum) {
    if (load(state) != owner) return false;
    __atomic_store_n(&state.checksum, checksum, __ATOMIC_RELAXED);
    return replace(state.word, owner, published_word);
}

int64_t release(State* states, int64_t begin, int64_t end, uint64_t word) {
    int64_t released = 0;
    for (int64_t row = begin; row < end; ++row)
        if (load(states[row]) == word) released += replace(states[row].word, word, free_word);
    return released;
}

uint64_t load(const State& state) { return __atomic_load_n(&state.word, __ATOMIC_ACQUIRE); }

int64_t find_broken(const Samples& samples, const int64_t* rows, int64_t n, uint8_t* seen) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = rows[i];
        if (row < 0 || row >= samples.count) return i;
        if (seen[row]) continue;
        const State& state = samples.states[row];
        if (load(state) != published_word) return i;
        const uint64_t sum =
            checksum(samples.data + row * samples.sample_bytes, samples.sample_bytes, uint64_t(row));
        if (sum != __atomic_load_n(&state.checksum, __ATOMIC_RELAXED)) return i;
        seen[row] = 1;
    }
    return -1;
}

}  // namespace nasfast::feature_cache
