// Scratch memory of one call: arrays of one value per channel and tile, uninitialized, released together. Small calls need no heap; large
// ones get warm memory. Every array starts on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory.h"

namespace batchnorm {

class Workspace {
public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() {
        for (void* p : cached_) memory::release(p);
    }
    template <class T>
    T* take(std::int64_t n) {
        const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
        if (used_ + bytes <= sizeof inline_) {
            std::byte* const p = inline_ + used_;
            used_ += bytes;
            return reinterpret_cast<T*>(p);
        }
        if (bytes >= kCached) {
            cached_.reserve(cached_.size() + 1);
            if (void* const p = memory::acquire(bytes)) {
                cached_.push_back(p);
                return static_cast<T*>(p);
            }
        }
        heap_.push_back(std::make_unique_for_overwrite<Line[]>(bytes / sizeof(Line)));
        return reinterpret_cast<T*>(heap_.back().get());
    }

private:
    // From here on malloc may give the memory back to the system at the end of each call, and the next one pays for the pages again.
    static constexpr std::size_t kCached = 16 << 10;

    struct alignas(64) Line {
        std::byte bytes[64];
    };

    alignas(Line) std::byte inline_[4096];
    std::size_t used_ = 0;
    std::vector<std::unique_ptr<Line[]>> heap_;
    std::vector<void*> cached_;
};

}  // namespace batchnorm
