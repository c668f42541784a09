// The threads of a call, from one of two sources: team_openmp.cpp, or team_threads.cpp in a build without OpenMP. Whichever it is, a
// system that refuses a thread means fewer threads. Used by parallel.cpp alone.
#pragma once

#include <cstdint>
#include <string>

namespace batchnorm::team {

// A reference to a callable, without an allocation.
template <class... Arguments>
class Ref {
public:
    template <class F>
    Ref(const F& f)  // NOLINT: implicit on purpose
        : object_(&f), call_([](const void* o, Arguments... a) { (*static_cast<const F*>(o))(a...); }) {}
    void operator()(Arguments... a) const { call_(object_, a...); }

private:
    const void* object_;
    void (*call_)(const void*, Arguments...);
};

int offered();     // what OMP_NUM_THREADS says, or else the CPUs this process may run on
int processors();  // that this process may run on
bool inside();     // whether the calling thread is one of a team
std::string name();

// Calls work(i, n) for all i in [0, n), n being `active` or what the system grants, each on a thread of its own if it can be. A thread's
// calls keep one team of `size` threads, of which those beyond n have nothing to do: a team that changes its size ends and makes threads.
void run(int active, int size, Ref<std::int64_t, std::int64_t> work);
void resize();  // from now on teams may become smaller

}  // namespace batchnorm::team
