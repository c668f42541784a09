// The only file pair that knows OpenMP. Runs independent work items on several threads; items write disjoint results, so neither
// their order nor the number of threads can change a bit.
#pragma once

#include <cstdint>
#include <string>

namespace batchnorm::parallel {

int threads();
void set_threads(int n);
std::string runtime();
void set_poll(bool (*poll)());

// A reference to a callable, without an allocation.
class Body {
public:
    template <class F>
    Body(const F& f) : object_(&f), call_([](const void* o, std::int64_t i) { (*static_cast<const F*>(o))(i); }) {}  // NOLINT
    void operator()(std::int64_t i) const { call_(object_, i); }

private:
    const void* object_;
    void (*call_)(const void*, std::int64_t);
};

// Calls body(i) for i in [0, n), on up to threads() threads if `worth_it`. The body must not throw. Returns false if the poll asked to
// stop: some items were then not run.
[[nodiscard]] bool for_each(std::int64_t n, bool worth_it, Body body);

}  // namespace batchnorm::parallel
