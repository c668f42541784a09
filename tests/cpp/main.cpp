// Runs the tests: all, those whose name has the argument in it, or with --quick a sample of what takes long. `test_batchnorm --hash`
// instead prints one hash of the bits of many results (no check of them), to be compared between machines, compilers and settings of
// BATCHNORM_ISA and OMP_NUM_THREADS.
#include <cstdlib>
#include <exception>

#include "check.h"

namespace test {
std::uint64_t hash_of_results();  // test_same_bits.cpp
}

int main(int argc, char** argv) {
    using namespace test;
    std::string_view wanted;
    for (int i = 1; i < argc; ++i) {
        const std::string_view argument = argv[i];
        if (argument == "--hash") {
            try {
                std::printf("%016llx\n", static_cast<unsigned long long>(hash_of_results()));
                return 0;
            } catch (const std::exception& e) {
                std::fprintf(stderr, "%s\n", e.what());
                return 1;
            }
        }
        if (argument == "--levels") {
            for (const std::string& level : isa_levels()) std::printf("%s\n", level.c_str());
            return 0;
        }
        argument == "--quick" ? void(quick = true) : void(wanted = argument);
    }
    const std::string best = isa();
    for (const Test& t : tests()) {
        if (std::string_view(t.name).find(wanted) == std::string_view::npos) continue;
        context = t.name;
        set_num_threads(1);
        set_tuning("");
        set_isa(best);
        set_interrupt_poll(nullptr);
        try {
            t.run();
        } catch (const std::exception& e) {
            check(false, e.what(), t.name, 0);
        }
    }
    std::printf("%lld bad calls, ", static_cast<long long>(bad_calls));
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
#ifdef BATCHNORM_ON_GPU  // all memory is the driver's, which goes before static objects do
    std::fflush(stdout);
    std::_Exit(failed == 0 ? 0 : 1);
#endif
    return failed == 0 ? 0 : 1;
}
