// Scratch memory of one call: arrays of one value per channel and tile, uninitialized, released together. Small calls need no heap; large
// ones get warm memory. Every array starts on a cache line.
#pragma once

#include <algorithm>
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
        const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(T) + sizeof(Line) - 1) / sizeof(Line) * sizeof(Line);
        if (bytes > left_) more(bytes);
        std::byte* const p = next_;
        next_ += bytes;
        left_ -= bytes;
        return reinterpret_cast<T*>(p);
    }

private:
    struct alignas(64) Line {
        std::byte bytes[64];
    };
    // From here on malloc may give the memory back to the system at the end of each call, and the next one pays for the pages again.
    static constexpr std::size_t kCached = 16 << 10;

    // Room for so many bytes and some of what follows: many arrays are small.
    void more(std::size_t bytes) {
        chunk_ = std::min<std::size_t>(2 * chunk_, 256 << 10);
        bytes = std::max(bytes, chunk_);
        cached_.reserve(cached_.size() + 1);
        void* p = bytes >= kCached ? memory::acquire(bytes) : nullptr;
        if (p != nullptr) {
            cached_.push_back(p);
        } else {
            heap_.push_back(std::make_unique_for_overwrite<Line[]>(bytes / sizeof(Line)));
            p = heap_.back().get();
        }
        next_ = static_cast<std::byte*>(p);
        left_ = bytes;
    }

    alignas(Line) std::byte inline_[4096];
    std::byte* next_ = inline_;
    std::size_t left_ = sizeof inline_, chunk_ = sizeof inline_;
    std::vector<std::unique_ptr<Line[]>> heap_;
    std::vector<void*> cached_;
};

}  // namespace batchnorm
