#include "parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "limits.h"

namespace batchnorm::parallel {
namespace {

std::atomic<int> limit{0};  // 0: what OpenMP and the container offer
std::atomic<bool (*)()> poll{nullptr};
// OpenMP counts the CPUs this process may run on, not the share of their time that a container grants: threads beyond that only wait.
// Read at the first use, not under a lock, which a fork could leave locked.
std::atomic<int> quota{-1};

int container_cpus() {
    int n = quota.load(std::memory_order_relaxed);
    if (n < 0) quota.store(n = limits::cpus(), std::memory_order_relaxed);
    return n > 0 ? n : std::numeric_limits<int>::max();
}

// libgomp's pool does not survive fork: a parallel region in the child waits for threads that are not there. So a child runs serially.
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
    return n > 0 ? n : std::max(1, std::min({omp_get_max_threads(), omp_get_num_procs(), container_cpus()}));
}

void set_threads(int n) { limit.store(n, std::memory_order_relaxed); }

Limit::Limit(int n) : before_(limit_of_call) {
    limit_of_call = n;
    last_asked = std::chrono::steady_clock::now();
}
Limit::~Limit() { limit_of_call = before_; }

void set_poll(bool (*f)()) { poll = f; }

std::string runtime() {
    std::string name =
#if defined(__clang__)
        "libomp";
#elif defined(__GNUC__)
        "libgomp";
#else
        "OpenMP";
#endif
    // _OPENMP is the month of the specification.
    const char* const specification = _OPENMP >= 202111 ? "5.2" : _OPENMP >= 202011 ? "5.1" : _OPENMP >= 201811 ? "5.0" : "4.5";
    return name + " (OpenMP " + specification + ")";
}

bool for_each(std::int64_t n, const How& how, Body body) {
    int n_threads = 1;
    if (how.worth_it && n > 1 && !forked.load(std::memory_order_relaxed) && !omp_in_parallel()) {
        // libgomp ends the process when the system refuses it a thread; far more threads than processors help nobody.
        const int most = std::max(64, 4 * omp_get_num_procs());
        n_threads = static_cast<int>(std::min<std::int64_t>({limit_of_call > 0 ? limit_of_call : threads(), most, n}));
    }
    if (n_threads <= 1) {
        if (n == 1) {
            body(0);
            return true;
        }
        Poll asked(how.interruptible);
        for (std::int64_t i = 0; i < n; ++i) {
            body(how.backwards ? n - 1 - i : i);
            if (asked.stop()) return false;
        }
        return true;
    }
    std::atomic<bool> stopped{false};
#pragma omp parallel num_threads(n_threads)
    {
        const std::int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
        Poll asked(how.interruptible && t == 0);
        const std::int64_t first = n * t / team, last = n * (t + 1) / team;
        for (std::int64_t i = first; i < last && !stopped.load(std::memory_order_relaxed); ++i) {
            body(how.backwards ? first + last - 1 - i : i);
            if (asked.stop()) stopped = true;
        }
    }
    return !stopped;
}

}  // namespace batchnorm::parallel
