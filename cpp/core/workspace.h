// Scratch memory of one call: C-sized arrays, zeroed, released together. Small calls need no heap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace batchnorm {

class Workspace {
public:
    template <class T>
    T* take(std::int64_t n) {
        const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
        if (used_ + bytes > sizeof inline_) {
            heap_.push_back(std::make_unique<std::byte[]>(bytes));  // zeroed
            return reinterpret_cast<T*>(heap_.back().get());
        }
        std::byte* const p = inline_ + used_;
        used_ += bytes;
        std::memset(p, 0, bytes);
        return reinterpret_cast<T*>(p);
    }

private:
    alignas(64) std::byte inline_[4096];
    std::size_t used_ = 0;
    std::vector<std::unique_ptr<std::byte[]>> heap_;
};

}  // namespace batchnorm
