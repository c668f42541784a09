// Teams of threads of our own, of a build without OpenMP: one pool for the process, whose threads sleep while they have nothing to do.
// Calls from several threads share it. What no thread of the pool has begun the caller does itself, so a call never waits for another.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

#include "team.h"

namespace batchnorm::team {
namespace {

thread_local bool member = false;

constexpr std::size_t kStack = std::size_t{1} << 20;

// One call of run, in a list of those that have something left to begin.
struct Job {
    Ref<std::int64_t, std::int64_t> work;
    std::int64_t n, begun = 1, done = 0;
    Job* next = nullptr;
};

class Pool {
public:
    void run(int wanted, Ref<std::int64_t, std::int64_t> work) {
        std::unique_lock lock(mutex_);
        while (size_ < wanted - 1 && grow()) ++size_;  // at most every second, if the system has refused one
        Job job{work, std::min(wanted, size_ + 1)};
        if (job.n > 1) {
            Job** last = &first_;
            while (*last != nullptr) last = &(*last)->next;
            *last = &job;
            work_.notify_all();
        }
        part(job, 0, lock);  // the caller's own, who may be asked for an interrupt there
        while (job.begun < job.n) part(job, next(job), lock);
        done_.wait(lock, [&] { return job.done == job.n; });
    }

private:
    // One thread more, unless the system refuses it. musl and macOS give threads less stack than a call may need.
    bool grow() {
        const auto now = std::chrono::steady_clock::now();
        if (now < again_) return false;
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes) != 0) return false;
        std::size_t stack = 0;
        if (pthread_attr_getstacksize(&attributes, &stack) == 0 && stack < kStack) pthread_attr_setstacksize(&attributes, kStack);
        pthread_t thread;
        const auto serve = [](void* pool) -> void* { static_cast<Pool*>(pool)->serve(); };
        const bool made = pthread_create(&thread, &attributes, serve, this) == 0;
        if (made) pthread_detach(thread);
        if (!made) again_ = now + std::chrono::seconds(1);
        pthread_attr_destroy(&attributes);
        return made;
    }
    [[noreturn]] void serve() {
        member = true;
        std::unique_lock lock(mutex_);
        for (;;) {
            work_.wait(lock, [&] { return first_ != nullptr; });
            Job& job = *first_;
            part(job, next(job), lock);
        }
    }
    // The next part of a job, which leaves the list with its last.
    std::int64_t next(Job& job) {
        const std::int64_t i = job.begun++;
        if (job.begun < job.n) return i;
        Job** at = &first_;
        while (*at != &job) at = &(*at)->next;
        *at = job.next;
        return i;
    }
    // The lock is held before and after.
    void part(Job& job, std::int64_t i, std::unique_lock<std::mutex>& lock) {
        lock.unlock();
        const bool before = std::exchange(member, true);
        job.work(i, job.n);
        member = before;
        lock.lock();
        if (++job.done == job.n) done_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    Job* first_ = nullptr;
    int size_ = 0;  // threads, which never end
    std::chrono::steady_clock::time_point again_{};
};

}  // namespace

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}
int offered() {
    static const long asked = [] {  // once, as OpenMP does
        const char* const text = std::getenv("OMP_NUM_THREADS");
        return text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    }();
    return asked > 0 && asked <= 1 << 16 ? static_cast<int>(asked) : processors();
}
bool inside() { return member; }
void resize() {}
std::string name() { return "none: threads of the library's own"; }

void run(int active, int, Ref<std::int64_t, std::int64_t> work) {
    static Pool& pool = *new Pool;  // never destroyed: its threads wait in it
    pool.run(active, work);
}

}  // namespace batchnorm::team
