// Teams of OpenMP: the only file that knows it.
//
// libgomp and libomp end the process where the system refuses them a thread. So before a team grows, as many threads with stacks of the
// same size are asked for here, and let go; what the system refuses these is not asked of OpenMP. One calling thread at a time does so.
// Between the two another process may take the last thread that is left, for which one more than needed is asked for.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <latch>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "team.h"

namespace batchnorm::team {
namespace {

// The deepest call takes 130 KiB: grad_sums of gathered rows in double, below tile_sums, below for_parts.
constexpr std::size_t kLeastStack = std::size_t{192} << 10;

// What `text` says, a number and perhaps a unit B, K, M or G; 0 if OpenMP does not take it.
std::size_t bytes_of(const char* text, int shift) {
    char* end = nullptr;
    const unsigned long long size = std::strtoull(text, &end, 10);
    if (end == text) return 0;
    while (*end == ' ') ++end;
    constexpr std::string_view kUnits = "bkmg";
    const std::size_t unit = kUnits.find(static_cast<char>(std::tolower(static_cast<unsigned char>(*end))));
    if (unit != kUnits.npos) {
        shift = 10 * static_cast<int>(unit);
        ++end;
    }
    while (*end == ' ') ++end;
    return *end != '\0' || size > (SIZE_MAX >> shift) ? 0 : static_cast<std::size_t>(size) << shift;
}
// The stack that the environment gives each thread; 0: the system's default.
std::size_t stack_asked() {
    struct Variable {
        const char* name;
        int shift;  // of a number without a unit
    };
    for (const Variable& v : {
#if defined(__clang__)
             Variable{"KMP_STACKSIZE", 0},
#endif
             Variable{"OMP_STACKSIZE", 10}, Variable{"GOMP_STACKSIZE", 10}}) {
        const char* const text = std::getenv(v.name);
        const std::size_t size = text == nullptr ? 0 : bytes_of(text, v.shift);
        if (size != 0) return size;
    }
    return 0;
}

#if defined(__unix__) || defined(__APPLE__)
// As OpenMP read it, which is loaded just before, or by another library earlier.
const std::size_t asked_of_openmp = stack_asked();

class Attributes {
public:
    Attributes() : valid_(pthread_attr_init(&attributes_) == 0) {
#if defined(__linux__)
        if (valid_) pthread_getattr_default_np(&attributes_);
#endif
        // What the system does not take OpenMP leaves at the default.
        if (valid_ && asked_of_openmp != 0) pthread_attr_setstacksize(&attributes_, asked_of_openmp);
    }
    Attributes(const Attributes&) = delete;
    Attributes& operator=(const Attributes&) = delete;
    ~Attributes() {
        if (valid_) pthread_attr_destroy(&attributes_);
    }
    std::size_t stack() const {
        std::size_t size = 0;
        return valid_ && pthread_attr_getstacksize(&attributes_, &size) == 0 ? size : 0;
    }
    const pthread_attr_t* get() const { return valid_ ? &attributes_ : nullptr; }

private:
    pthread_attr_t attributes_;
    bool valid_;
};

bool enough_stack() {
    static const bool enough = Attributes().stack() >= kLeastStack;
    return enough;
}

// How many of so many threads the system grants beside those there are.
int granted(int wanted) {
    try {
        const Attributes attributes;
        std::latch leave(1);
        std::vector<pthread_t> made;
        made.reserve(static_cast<std::size_t>(wanted) + 1);
        const auto wait = [](void* at) -> void* {
            static_cast<std::latch*>(at)->wait();
            return nullptr;
        };
        for (pthread_t one{}; made.size() <= static_cast<std::size_t>(wanted); made.push_back(one)) {
            if (pthread_create(&one, attributes.get(), wait, &leave) != 0) break;
        }
        leave.count_down();
        for (const pthread_t one : made) pthread_join(one, nullptr);
        return std::min(wanted, std::max(0, static_cast<int>(made.size()) - 1));
    } catch (...) {
        return 0;
    }
}
#else
bool enough_stack() { return true; }
int granted(int wanted) { return wanted; }
#endif

using Count = std::shared_ptr<std::atomic<int>>;

// What a thread of a team belongs to. Another library's smaller team may end it, which the count then tells.
struct Member {
    Count count;
    ~Member() {
        if (count) --*count;
    }
};
thread_local Member member;
thread_local bool ended = false;  // static destructors may still call

std::atomic<unsigned> resized{0};
std::mutex growing;  // held from the test for threads until OpenMP has made them

// The team of one calling thread.
class Team {
public:
    ~Team() { ended = true; }
    // `lock` is taken if threads are to be made.
    int grown_to(int size, std::unique_lock<std::mutex>& lock) {
        if (const unsigned now = resized.load(std::memory_order_relaxed); now != resized_) {
            resized_ = now;
            size_ = 1;
            refused_ = false;
        }
        size = std::max(size, size_);
        const int there = 1 + others->load(std::memory_order_relaxed);
        if (size <= there) return size_ = size;
        const auto now = std::chrono::steady_clock::now();
        if (refused_ && now - when_ < std::chrono::seconds(1)) return std::min(size_, there);
        lock.lock();
        granted_to(there + granted(size - there), size);
        return size_;
    }
    // What came of a wish: less is asked for again after a second.
    void granted_to(int size, int wanted) {
        size_ = size;
        refused_ = size < wanted;
        when_ = std::chrono::steady_clock::now();
    }
    const Count others = std::make_shared<std::atomic<int>>(0);

private:
    int size_ = 1;
    unsigned resized_ = 0;
    bool refused_ = false;
    std::chrono::steady_clock::time_point when_{};
};

}  // namespace

int offered() { return omp_get_max_threads(); }
int processors() { return omp_get_num_procs(); }
bool inside() { return omp_in_parallel() != 0; }
void resize() { resized.fetch_add(1, std::memory_order_relaxed); }

std::string name() {
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
    name += " (OpenMP " + std::string(specification) + ")";
    return enough_stack() ? name : name + "; calls run on one thread, as others would have less than 192 KiB of stack (OMP_STACKSIZE)";
}

void run(int active, int size, Ref<std::int64_t, std::int64_t> work) {
    thread_local Team team;
    std::unique_lock<std::mutex> lock(growing, std::defer_lock);
    const int threads = ended || !enough_stack() ? 1 : team.grown_to(size, lock);
    if (threads == 1) {
        if (lock.owns_lock()) lock.unlock();
        return work(0, 1);
    }
    const Count& others = team.others;
    int came = threads;  // less where OpenMP has a limit of its own
#pragma omp parallel num_threads(threads)
    {
        const int i = omp_get_thread_num(), n = std::min(active, omp_get_num_threads());
        if (i == 0) {
            came = omp_get_num_threads();
            if (lock.owns_lock()) lock.unlock();
        } else if (member.count != others) {  // libomp lends a thread to one team after another
            if (member.count) --*member.count;
            member.count = others;
            ++*others;
        }
        if (i < n) work(i, n);
    }
    if (came < threads) team.granted_to(came, threads);
}

}  // namespace batchnorm::team
