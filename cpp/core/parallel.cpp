#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "float_mode.h"
#include "limits.h"

namespace batchnorm::parallel {
namespace {

std::atomic<int> limit{0};  // 0: what the team and the container offer
std::atomic<bool (*)()> poll{nullptr};
// A team counts the CPUs this process may run on, not the share of their time that a container grants: threads beyond that only wait.
// Read at the first use, not under a lock, which a fork could leave locked.
std::atomic<int> quota{-1};

int container_cpus() {
    int n = quota.load(std::memory_order_relaxed);
    if (n < 0) quota.store(n = limits::cpus(), std::memory_order_relaxed);
    return n > 0 ? n : std::numeric_limits<int>::max();
}

// Threads do not survive fork: a team in the child would wait for those that are not there. So a child runs serially.
std::atomic<bool> forked{false};

thread_local int limit_of_call = 0;

[[maybe_unused]] const int register_fork_handler = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif
    return 0;
}();

// When this thread's call began, or last asked the poll.
thread_local std::chrono::steady_clock::time_point last_asked;

// Asks the poll at most every 50 ms, so that it costs nothing and Ctrl-C is answered well within half a second.
class Poll {
public:
    explicit Poll(bool wanted) : poll_(wanted ? poll.load(std::memory_order_relaxed) : nullptr) {}
    bool stop() {
        if (poll_ == nullptr) return false;
        const auto now = std::chrono::steady_clock::now();
        if (now - last_asked < std::chrono::milliseconds(50)) return false;
        last_asked = now;
        return poll_();
    }

private:
    bool (*poll_)();
};

}  // namespace

int threads() {
    const int n = limit.load(std::memory_order_relaxed);
    return n > 0 ? n : std::max(1, std::min({team::offered(), team::processors(), container_cpus()}));
}

void set_threads(int n) {
    limit.store(n, std::memory_order_relaxed);
    team::resize();
}

Limit::Limit(int n) : before_(limit_of_call) {
    limit_of_call = n;
    last_asked = std::chrono::steady_clock::now();
}
Limit::~Limit() { limit_of_call = before_; }

void set_poll(bool (*f)()) { poll = f; }

bool asked_to_stop() { return Poll(true).stop(); }

bool for_each(std::int64_t n, const How& how, Body body) {
    if (n == 1) {
        body(0);
        return true;
    }
    std::atomic<bool> stopped{false}, failed{false};
    std::exception_ptr error;  // of the first item that failed: for want of memory
    const auto stretch = [&](std::int64_t t, std::int64_t team) noexcept {
        const FloatMode mode;
        Poll asked(how.interruptible && t == 0);
        const std::int64_t first = n * t / team, last = n * (t + 1) / team;
        try {
            for (std::int64_t i = first; i < last && !stopped.load(std::memory_order_relaxed); ++i) {
                body(how.backwards ? first + last - 1 - i : i);
                if (asked.stop()) stopped = true;
            }
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
            stopped = true;
        }
    };
    if (!how.worth_it || n < 1 || forked.load(std::memory_order_relaxed) || team::inside()) {
        stretch(0, 1);
    } else {
        // Far more threads than processors help nobody.
        const int most = std::max(64, 4 * team::processors());
        const int size = std::min(limit_of_call > 0 ? limit_of_call : threads(), most);
        const int active = static_cast<int>(std::min<std::int64_t>(size, n));
        active == 1 ? stretch(0, 1) : team::run(active, size, stretch);
    }
    if (error) std::rethrow_exception(error);
    return !stopped;
}

}  // namespace batchnorm::parallel
