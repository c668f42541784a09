#include "limits.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <new>
#include <sstream>
#include <string_view>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace batchnorm::limits {
namespace {

// What a control group without a limit reads as in version 1 is the largest multiple of the page size, so anything like it is no limit.
constexpr std::uint64_t kNoMemoryLimit = std::uint64_t{1} << 60;

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// The number that `text` begins with, which is taken off together with one space behind it; 0 ("max", "-1", nothing) if there is none.
std::uint64_t number(std::string_view& text) {
    std::uint64_t value = 0;
    const char* const end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || (rest != end && *rest != ' ')) return 0;
    text.remove_prefix(std::min(text.size(), static_cast<std::size_t>(rest - text.data()) + 1));
    return value;
}

std::uint64_t number_in(const std::string& path) {
    const std::string line = first_line(path);
    std::string_view text = line;
    return number(text);
}

template <class T>
void tighten(T& limit, T other) {
    if (other != 0 && (limit == 0 || other < limit)) limit = other;
}

void tighten_cpus(Container& limit, std::uint64_t quota, std::uint64_t period) {
    if (quota == 0 || period == 0) return;
    const std::uint64_t cpus = (quota - 1) / period + 1;
    tighten(limit.cpus, static_cast<int>(std::min<std::uint64_t>(cpus, std::numeric_limits<int>::max())));
}

void tighten_bytes(Container& limit, std::uint64_t bytes) {
    if (bytes < kNoMemoryLimit) tighten(limit.bytes, bytes);
}

// Calls f with the folder of a group and of each parent. A path that leads out of what this process can see (its group lies outside the
// container's own tree) or to nothing still ends at the top, where a container finds its own limits.
template <class F>
void for_each_folder(const std::string& top, std::string path, F f) {
    if (path.find("/..") != std::string::npos) path.clear();
    for (;;) {
        f(top + path + "/");
        const std::size_t slash = path.rfind('/');
        if (slash == std::string::npos) return;
        path.resize(slash);
    }
}

bool among(std::string_view name, std::string_view list) {
    while (!list.empty()) {
        const std::size_t comma = std::min(list.find(','), list.size());
        if (list.substr(0, comma) == name) return true;
        list.remove_prefix(std::min(comma + 1, list.size()));
    }
    return false;
}

// libgomp takes a list of numbers, one per level of nesting; the first is ours.
bool thread_count_is_given() {
    const char* const value = std::getenv("OMP_NUM_THREADS");
    if (value == nullptr) return false;
    char* end = nullptr;
    const long n = std::strtol(value, &end, 10);
    return n > 0 && (*end == '\0' || *end == ',' || *end == ' ');
}

Container own() {
    std::ifstream file("/proc/self/cgroup");
    std::ostringstream text;
    text << file.rdbuf();
    return container("/sys/fs/cgroup", text.str());
}

}  // namespace

Container container(const std::string& root, const std::string& groups) {
    Container limit;
    std::istringstream lines(groups);
    for (std::string line; std::getline(lines, line);) {  // number:controllers:path
        const std::size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        if (controllers.empty()) {  // version 2, alone or beside version 1
            for (const std::string& top : {root, root + "/unified"}) {
                for_each_folder(top, path, [&](const std::string& folder) {
                    const std::string cpu = first_line(folder + "cpu.max");  // "quota period"
                    std::string_view rest = cpu;
                    const std::uint64_t quota = number(rest);
                    tighten_cpus(limit, quota, number(rest));
                    tighten_bytes(limit, number_in(folder + "memory.max"));
                });
            }
        }
        for (const std::string& top : {root + "/cpu", root + "/" + controllers}) {
            if (!among("cpu", controllers)) break;
            for_each_folder(top, path, [&](const std::string& folder) {
                tighten_cpus(limit, number_in(folder + "cpu.cfs_quota_us"), number_in(folder + "cpu.cfs_period_us"));
            });
        }
        if (among("memory", controllers)) {
            for_each_folder(root + "/memory", path,
                            [&](const std::string& folder) { tighten_bytes(limit, number_in(folder + "memory.limit_in_bytes")); });
        }
    }
    return limit;
}

int cpus() noexcept {
    try {
        return thread_count_is_given() ? 0 : own().cpus;
    } catch (...) {
        return 0;
    }
}

std::uint64_t memory() noexcept {
    std::uint64_t bytes = 0;
#if defined(__unix__) || defined(__APPLE__)
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page > 0) bytes = static_cast<std::uint64_t>(pages) * static_cast<std::uint64_t>(page);
    rlimit address_space{};
    if (getrlimit(RLIMIT_AS, &address_space) == 0 && address_space.rlim_cur != RLIM_INFINITY) {
        tighten(bytes, static_cast<std::uint64_t>(address_space.rlim_cur));
    }
#endif
    try {
        tighten(bytes, own().bytes);
    } catch (...) {
        // Without memory for a file's text, the rest will do.
    }
    return bytes;
}

}  // namespace batchnorm::limits
