// The harness: TEST(name) { ... } registers a test, CHECK counts, main.cpp runs them. A test starts with one thread, the best level, the
// default tuning and no poll; main puts them back.
#pragma once

#include <algorithm>
#include <atomic>
#include <batchnorm/batchnorm.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace test {

using namespace batchnorm;
using std::int64_t;
using std::size_t;

inline std::atomic<int64_t> passed = 0, failed = 0, bad_calls = 0;  // by several threads; REFUSED tries bad calls
inline std::string context;                                         // what is being tested, for the message of a failed check
inline bool quick = false;                                          // --quick: a sample of what takes long

inline bool check(bool ok, const std::string& what, const char* file, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed <= 50) std::printf("%s:%d: %s  [%s]\n", file, line, what.c_str(), context.c_str());
    return ok;
}
#define CHECK(...) test::check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define FAIL(what) test::check(false, what, __FILE__, __LINE__)

// f must throw E with a message that begins with `start`.
template <class E, class F>
void throws(const std::string& start, const char* file, int line, const F& f) {
    try {
        f();
        check(false, "no exception, expected: " + start, file, line);
    } catch (const E& e) {
        check(std::string_view(e.what()).starts_with(start), "got '" + std::string(e.what()) + "', expected '" + start + "...'", file,
              line);
    }
}
#define THROWS(E, start, ...) test::throws<E>(start, __FILE__, __LINE__, [&] { __VA_ARGS__; })

// An Error of that kind within 50 ms, whose argument is what its message begins with.
template <class F>
void refused(Error::Kind kind, const std::string& start, const char* file, int line, const F& f) {
    ++bad_calls;
    std::chrono::nanoseconds least = std::chrono::hours(1);
    throws<Error>(start, file, line, [&] {
        const auto begin = std::chrono::steady_clock::now();
        try {
            f();
        } catch (const Error& e) {
            least = std::chrono::steady_clock::now() - begin;
            const std::string_view text = e.what(), rest = text.substr(std::min(text.size(), e.argument.size()));
            bool verb = false;
            for (const char* const word : {" has ", " is ", " are ", " holds ", " sum ", " overlaps "}) verb |= rest.starts_with(word);
            check(e.kind == kind && text.starts_with(e.argument) && verb, "kind, or argument '" + e.argument + "', of: " + e.what(), file,
                  line);
            throw;
        }
    });
    for (int again = 0; again < 2 && least > std::chrono::milliseconds(50); ++again) {  // the machine may be busy
        const auto begin = std::chrono::steady_clock::now();
        try {
            f();
        } catch (const Error&) {
            least = std::min<std::chrono::nanoseconds>(least, std::chrono::steady_clock::now() - begin);
        }
    }
    check(least <= std::chrono::milliseconds(50), "an error came later than after 50 ms: " + start, file, line);
}
#define REFUSED(kind, start, ...) test::refused(Error::kind, start, __FILE__, __LINE__, [&] { __VA_ARGS__; })

struct Test {
    const char* name;
    void (*run)();
};
inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
inline bool add_test(const char* name, void (*run)()) {
    tests().push_back({name, run});
    return true;
}
#define TEST(name)                                                                         \
    static void name();                                                                    \
    [[maybe_unused]] static const bool name##_is_registered = test::add_test(#name, name); \
    static void name()

}  // namespace test
