#include "tuning.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>

namespace batchnorm::tune {
namespace {

using std::int64_t;

constexpr const char* kText[kNames] = {"l2_bytes",  "cached_bytes", "stream_run_bytes",  "group_bytes",
                                       "map_bytes", "fetch_bytes",  "parallel_elements", "gpu_block_values"};

using Numbers = std::array<int64_t, kNames>;

Numbers of_machine() {
    int64_t l2 = 1 << 20, l3 = 32 << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (const long n = sysconf(_SC_LEVEL2_CACHE_SIZE); n > 0) l2 = n;
    if (const long n = sysconf(_SC_LEVEL3_CACHE_SIZE); n > 0) l3 = n;
#endif
    Numbers d{};
    d[l2_bytes] = l2;
    d[cached_bytes] = std::min<int64_t>(l3, 32 << 20);
    d[stream_run_bytes] = 512;
    d[group_bytes] = 256 << 10;
    d[map_bytes] = 256 << 10;
    d[fetch_bytes] = 12 << 20;
    d[parallel_elements] = 49152;
    d[gpu_block_values] = 8192;
    return d;
}

Numbers& defaults() {
    static Numbers d = of_machine();
    return d;
}

std::array<std::atomic<int64_t>, kNames>& values() {
    static std::array<std::atomic<int64_t>, kNames> v;
    [[maybe_unused]] static const bool filled = [] {
        const auto d = defaults();
        for (int i = 0; i < kNames; ++i) v[static_cast<std::size_t>(i)] = d[static_cast<std::size_t>(i)];
        return true;
    }();
    return v;
}

// Puts the settings into `numbers`; returns what is wrong with them, or an empty string.
std::string read(std::string_view settings, Numbers& numbers) {
    while (!settings.empty()) {
        const std::string_view item = settings.substr(0, settings.find(','));
        settings.remove_prefix(std::min(settings.size(), item.size() + 1));
        const std::string_view name = item.substr(0, item.find('=')), number = item.substr(std::min(item.size(), name.size() + 1));
        const auto* const found = std::find(std::begin(kText), std::end(kText), name);
        if (found == std::end(kText)) {
            std::string names;
            for (const char* n : kText) names.append(names.empty() ? "" : ", ").append(n);
            return std::string("tuning has '").append(name).append("', expected one of ") + names;
        }
        int64_t value = 0;
        const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
        if (error != std::errc() || end != number.data() + number.size() || value < 0 || value > int64_t{1} << 50) {
            return std::string("tuning has ").append(name).append("='").append(number).append("', expected an integer from 0 to 2^50");
        }
        numbers[static_cast<std::size_t>(found - std::begin(kText))] = value;
    }
    return "";
}

void use(const Numbers& numbers) {
    for (int i = 0; i < kNames; ++i) values()[static_cast<std::size_t>(i)] = numbers[static_cast<std::size_t>(i)];
}

}  // namespace

int64_t get(Name name) { return values()[name].load(std::memory_order_relaxed); }

std::string set(std::string_view settings) {
    Numbers wanted = defaults();
    if (!settings.empty()) {
        for (int i = 0; i < kNames; ++i) wanted[static_cast<std::size_t>(i)] = get(static_cast<Name>(i));
    }
    std::string problem = read(settings, wanted);
    if (problem.empty()) use(wanted);
    return problem;
}

std::string set_defaults(std::string_view settings) {
    Numbers wanted = of_machine();
    std::string problem = read(settings, wanted);
    if (problem.empty()) use(defaults() = wanted);
    return problem;
}

std::string text() {
    std::string all;
    for (int i = 0; i < kNames; ++i) {
        all.append(all.empty() ? "" : ",").append(kText[i]).append("=").append(std::to_string(get(static_cast<Name>(i))));
    }
    return all;
}

}  // namespace batchnorm::tune
