#include "memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "limits.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define BATCHNORM_HAS_MMAP 1
#endif

namespace batchnorm::memory {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kGranule = std::size_t{64} << 10;  // a multiple of any page size in use
// From here on, rounding up to whole huge pages adds at most an eighth.
constexpr std::size_t kWholeHugePages = 8 * kHugePage;
constexpr std::size_t kMost = static_cast<std::size_t>(-1) / 4;

constexpr std::size_t rounded(std::size_t bytes) {
    const std::size_t granule = bytes < kWholeHugePages ? kGranule : kHugePage;
    return (std::max<std::size_t>(bytes, 1) + granule - 1) / granule * granule;
}

#if defined(BATCHNORM_HAS_MMAP)

void unmap(void* p, std::size_t bytes) noexcept { munmap(p, bytes); }

void* map(std::size_t bytes) noexcept {
    const bool huge = bytes >= kHugePage;
    const std::size_t span = huge ? bytes + kHugePage : bytes;  // room to align
    void* const p = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    if (!huge) return p;
    char* const start = static_cast<char*>(p);
    const std::size_t head = (kHugePage - reinterpret_cast<std::uintptr_t>(p) % kHugePage) % kHugePage, tail = kHugePage - head;
    if (head > 0) unmap(start, head);
    if (tail > 0) unmap(start + head + bytes, tail);
#if defined(MADV_HUGEPAGE)
    madvise(start + head, bytes, MADV_HUGEPAGE);  // a wish: a kernel without huge pages serves small ones
#endif
    return start + head;
}

#else

void* map(std::size_t bytes) noexcept { return ::operator new(bytes, std::align_val_t{kHugePage}, std::nothrow); }
void unmap(void* p, std::size_t) noexcept { ::operator delete(p, std::align_val_t{kHugePage}); }

#endif

std::size_t default_limit() {
    // A training step through ResNet-50 at batch 32 wants 1.7 GB (D12); an eighth leaves small machines and containers their memory.
    constexpr std::uint64_t kDefault = std::uint64_t{2} << 30;
    const std::uint64_t memory = limits::memory();
    return static_cast<std::size_t>(
        check::cache_limit(static_cast<std::int64_t>(std::min(kDefault, (memory == 0 ? kDefault : memory) / 8))));
}

// The mutex is held for bookkeeping alone. Nobody maps or unmaps meanwhile, so no thread waits for the kernel's work on another's pages.
class Cache {
public:
    explicit Cache(std::size_t limit) : limit_(limit) {}

    void* acquire(std::size_t bytes) noexcept {
        if (bytes > kMost) return nullptr;
        const std::size_t need = rounded(bytes);
        if (void* const p = take(need)) return p;
        void* p = map(need);
        if (p == nullptr) {
            shrink(0);
            p = map(need);
        }
        if (p == nullptr) return nullptr;
        const std::lock_guard lock(mutex_);
        if (!lend({p, need})) {
            unmap(p, need);
            return nullptr;
        }
        ++misses_;
        return p;
    }

    bool release(void* p) noexcept {
        Buffer buffer;
        {
            const std::lock_guard lock(mutex_);
            const auto found = used_.find(p);
            if (found == used_.end()) return false;
            buffer = {p, found->second};
            used_.erase(found);
            in_use_ -= buffer.bytes;
        }
        // The limit holds at every moment, so room is made first, one buffer at a time: no list of victims that would want memory.
        for (;;) {
            Buffer victim = buffer;
            {
                const std::lock_guard lock(mutex_);
                if (buffer.bytes <= limit_) {
                    if (held_ <= limit_ - buffer.bytes) {
                        if (keep(buffer)) return true;
                    } else {
                        victim = oldest();
                    }
                }
            }
            unmap(victim.start, victim.bytes);
            if (victim.start == p) return true;
        }
    }

    std::size_t size(const void* p) noexcept {
        const std::lock_guard lock(mutex_);
        const auto found = used_.find(const_cast<void*>(p));
        return found == used_.end() ? 0 : found->second;
    }

    Info info() noexcept {
        const std::lock_guard lock(mutex_);
        return {limit_, held_, in_use_, free_.size(), hits_, misses_};
    }

    void set_limit(std::size_t bytes) noexcept {
        {
            const std::lock_guard lock(mutex_);
            limit_ = bytes;
        }
        shrink(bytes);
    }

    // Gives the oldest free buffers back until at most this many bytes are held.
    std::size_t shrink(std::size_t most) noexcept {
        for (std::size_t given = 0;;) {
            Buffer victim;
            {
                const std::lock_guard lock(mutex_);
                if (held_ <= most) return given;
                victim = oldest();
            }
            unmap(victim.start, victim.bytes);
            given += victim.bytes;
        }
    }

    // Around fork. The child gets none of the free buffers: shared copy-on-write, they would cost it a copy where fresh pages are only
    // cleared, and would cost the parent the same at its next write into each. What is in use it inherits as all other memory. The lock is
    // held across, so that the child finds the lists whole. (A buffer that another thread is just unmapping stays mapped in the child.)
    void before_fork() noexcept {
        mutex_.lock();
#if defined(MADV_DONTFORK)
        for (Buffer& b : free_) b.inherited = madvise(b.start, b.bytes, MADV_DONTFORK) != 0;
#endif
    }

    void after_fork_in_parent() noexcept {
#if defined(MADV_DONTFORK)
        for (Buffer& b : free_) madvise(b.start, b.bytes, MADV_DOFORK);
#endif
        mutex_.unlock();
    }

    void after_fork_in_child() noexcept {
        for (const Buffer& b : free_) {
            if (b.inherited) unmap(b.start, b.bytes);
        }
        free_.clear();
        held_ = 0;
        mutex_.unlock();
    }

private:
    struct Buffer {
        void* start = nullptr;
        std::size_t bytes = 0;
        bool inherited = true;  // by the child of a fork
    };

    // The members below are called with the mutex locked, save take().

    // The smallest free buffer that will do, of several the warmest.
    void* take(std::size_t need) noexcept {
        const std::lock_guard lock(mutex_);
        std::size_t best = free_.size();
        for (std::size_t i = free_.size(); i-- > 0;) {
            const std::size_t bytes = free_[i].bytes;
            if (bytes < need || bytes - need > need / 8) continue;
            if (best == free_.size() || bytes < free_[best].bytes) best = i;
            if (bytes == need) break;
        }
        if (best == free_.size()) return nullptr;
        const Buffer buffer = free_[best];
        if (!lend(buffer)) return nullptr;
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
        held_ -= buffer.bytes;
        ++hits_;
        return buffer.start;
    }

    bool lend(const Buffer& buffer) noexcept {
        try {
            used_.emplace(buffer.start, buffer.bytes);
        } catch (const std::bad_alloc&) {
            return false;
        }
        in_use_ += buffer.bytes;
        return true;
    }

    bool keep(const Buffer& buffer) noexcept {
        try {
            free_.push_back(buffer);
        } catch (const std::bad_alloc&) {
            return false;
        }
        held_ += buffer.bytes;
        return true;
    }

    Buffer oldest() noexcept {
        const Buffer buffer = free_.front();
        free_.erase(free_.begin());
        held_ -= buffer.bytes;
        return buffer;
    }

    std::mutex mutex_;
    std::vector<Buffer> free_;                     // least recently released first
    std::unordered_map<void*, std::size_t> used_;  // bytes of what is lent
    std::size_t limit_, held_ = 0, in_use_ = 0;
    std::uint64_t hits_ = 0, misses_ = 0;
};

Cache& cache() {
    // Never destroyed: arrays die late, on other threads and after the modules are torn down.
    static Cache& the_cache = *[] {
        auto* const made = new Cache(default_limit());
#if defined(BATCHNORM_HAS_MMAP)
        pthread_atfork([] { cache().before_fork(); }, [] { cache().after_fork_in_parent(); }, [] { cache().after_fork_in_child(); });
#endif
        return made;
    }();
    return the_cache;
}

}  // namespace

void* acquire(std::size_t bytes) noexcept { return cache().acquire(bytes); }
bool release(void* buffer) noexcept { return cache().release(buffer); }
std::size_t size(const void* buffer) noexcept { return cache().size(buffer); }
Info info() { return cache().info(); }
void set_limit(std::size_t bytes) noexcept { cache().set_limit(bytes); }
std::size_t empty() noexcept { return cache().shrink(0); }

}  // namespace batchnorm::memory
