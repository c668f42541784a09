// The calls of any_call.h under libFuzzer: clang++ -fsanitize=fuzzer. The target `fuzz_calls`; what it found worth keeping lies in
// tests/data/calls.
#include <cstdlib>

#include "any_call.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    test::AnyCall({data, size}).run();
    if (test::failed != 0) std::abort();  // the message is printed
    return 0;
}
