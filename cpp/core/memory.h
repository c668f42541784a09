// A bounded cache of warm buffers for large outputs and scratch: what is released is kept, with its pages, for the next acquire. The first
// touch of fresh pages costs several times the arithmetic on them (D12). Called by bind/output.cpp and core/workspace.h; knows
// neither Python nor NumPy. Safe from any thread, in the child of a fork, and at any point of a process's end: the cache is never
// destroyed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm::memory {

// For outputs the cache pays from here on: glibc's malloc begins to map blocks of their own at this size, smaller ones it keeps warm itself
// (D12).
inline constexpr std::size_t kSmallest = std::size_t{128} << 10;

struct Info {
    std::size_t limit;    // most bytes of free buffers kept
    std::size_t held;     // bytes of free buffers kept now
    std::size_t in_use;   // bytes of buffers acquired and not yet released
    std::size_t buffers;  // number of free buffers kept now
    std::uint64_t hits;   // calls of acquire that a kept buffer served
    std::uint64_t misses;
};

// Memory of at least this many bytes, uninitialized, aligned to 2 MiB from that size on and to a page below; nullptr if there is none
// even after all free buffers went back to the system. A kept buffer serves a request that fills at least 8/9 of it.
void* acquire(std::size_t bytes) noexcept;

// Takes a buffer back; it is kept if the limit allows, for which the least recently released ones give way. False, and nothing done, if
// the address is not that of an acquired buffer.
bool release(void* buffer) noexcept;

// Size of an acquired buffer; 0 if the address is not that of one.
std::size_t size(const void* buffer) noexcept;

// The first call reads BATCHNORM_CACHE_LIMIT, and throws std::invalid_argument if it makes no sense.
Info info();

// 0 keeps nothing.
void set_limit(std::size_t bytes) noexcept;

// Gives all free buffers back to the system; how many bytes that was.
std::size_t empty() noexcept;

}  // namespace batchnorm::memory
