// The library as a whole: threads, instruction sets, tuning, version.
#include "check.h"
#include "parallel.h"
#include "tuning.h"

namespace batchnorm {
inline namespace v0_2 {

int num_threads() { return parallel::threads(); }

void set_num_threads(int n) {
    check::thread_count(n);
    parallel::set_threads(n);
}

std::string tuning() {
    check::active_level();  // the environment's settings are in force
    return tune::text();
}

void set_tuning(std::string_view settings) {
    check::active_level();
    check::tuning(settings);
}

std::string isa() { return check::active_level().isa; }

void set_isa(std::string_view name) { kernels::use(&check::level(name)); }

std::vector<std::string> isa_levels() {
    std::vector<std::string> names;
    for (const auto& l : kernels::levels()) {
        if (l.supported) names.emplace_back(l.table->isa);
    }
    return names;
}

std::vector<std::string> isa_built() {
    std::vector<std::string> names;
    for (const auto& l : kernels::levels()) names.emplace_back(l.table->isa);
    return names;
}

std::string isa_reason() { return kernels::reason(); }

std::string openmp_runtime() { return team::name(); }

std::string compiler() {
#if defined(__clang__)
    return "clang++ " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown";
#endif
}

std::string version() { return BATCHNORM_VERSION; }

void set_interrupt_poll(bool (*poll)()) { parallel::set_poll(poll); }

}  // namespace v0_2
}  // namespace batchnorm
