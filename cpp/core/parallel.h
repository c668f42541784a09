// Runs independent work items on several threads; items write disjoint results, so neither their order nor the number of threads can
// change a bit.
#pragma once

#include <cstdint>
#include <string>

#include "team.h"

namespace batchnorm::parallel {

int threads();
void set_threads(int n);
void set_poll(bool (*poll)());

// A call: how many threads it may use while this lives; 0: as many as threads() says. The poll is asked from 50 ms after its start on.
class Limit {
public:
    explicit Limit(int n);
    ~Limit();
    Limit(const Limit&) = delete;
    Limit& operator=(const Limit&) = delete;

private:
    int before_;
};

using Body = team::Ref<std::int64_t>;

struct How {
    bool worth_it;              // to wake other threads
    bool backwards = false;     // the order in which a thread takes its items, which are a stretch of all
    bool interruptible = true;  // by the poll
};

// Calls body(i) for i in [0, n), on up to threads() threads, or what a Limit says. Returns false if the poll asked to
// stop: some items were then not run. Nor are they if one throws, which for_each then does.
[[nodiscard]] bool for_each(std::int64_t n, const How& how, Body body);

// The poll's answer, asked at most every 50 ms: for an item that takes long by itself, on the thread that entered the library.
bool asked_to_stop();

}  // namespace batchnorm::parallel
