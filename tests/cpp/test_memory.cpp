// core/memory.h, the cache of buffers, and core/limits.h, what a container grants.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "core/limits.h"
#include "core/memory.h"
#include "tensors.h"

namespace test {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

// The limit for as long as this lives, and nothing held before and after.
struct Limited {
    size_t before = memory::info().limit;
    explicit Limited(size_t bytes) {
        memory::empty();
        memory::set_limit(bytes);
    }
    ~Limited() {
        memory::set_limit(before);
        memory::empty();
    }
};

TEST(buffers_are_used_again) {
    const Limited limited(64 * kMiB);
    const memory::Info start = memory::info();
    CHECK(start.held == 0 && start.buffers == 0 && start.limit == 64 * kMiB);
    void* const a = memory::acquire(10 * kMiB);
    CHECK(a != nullptr && reinterpret_cast<std::uintptr_t>(a) % (2 * kMiB) == 0 && memory::size(a) == 10 * kMiB);
    std::memset(a, 1, 10 * kMiB);
    CHECK(memory::info().in_use == start.in_use + 10 * kMiB && memory::info().misses == start.misses + 1);
    int other = 0;
    CHECK(!memory::release(&other) && !memory::release(nullptr) && memory::size(&other) == 0);
    CHECK(memory::release(a) && !memory::release(a) && memory::size(a) == 0);
    CHECK(memory::info().held == 10 * kMiB && memory::info().buffers == 1 && memory::info().in_use == start.in_use);
    // A kept buffer serves a request that fills at least 8/9 of it.
    void* const smaller = memory::acquire(9 * kMiB);
    CHECK(smaller == a && memory::info().hits == start.hits + 1 && memory::info().held == 0);
    memory::release(smaller);
    void* const too_small = memory::acquire(8 * kMiB);
    CHECK(too_small != a);
    memory::release(too_small);
    // Of several the best fitting one.
    void* const fits = memory::acquire(8 * kMiB);
    CHECK(fits == too_small);
    memory::release(fits);
    CHECK(memory::empty() == 18 * kMiB && memory::info().held == 0);
    CHECK(memory::acquire(std::numeric_limits<size_t>::max()) == nullptr && memory::acquire(size_t{1} << 60) == nullptr);
    void* const tiny = memory::acquire(0);
    CHECK(tiny != nullptr && memory::size(tiny) == 64 << 10 && memory::release(tiny));
}

TEST(the_oldest_buffers_give_way) {
    const Limited limited(8 * kMiB);
    void* buffers[4];
    for (void*& b : buffers) b = memory::acquire(3 * kMiB);
    for (void* const b : buffers) CHECK(memory::release(b) && memory::info().held <= 8 * kMiB);
    CHECK(memory::info().buffers == 2);
    void* const latest = memory::acquire(3 * kMiB);
    CHECK(latest == buffers[3]);  // the warmest
    void* const large = memory::acquire(9 * kMiB);
    memory::release(large);  // too large alone: it drives nothing out
    CHECK(memory::info().buffers == 1 && memory::info().held == 3 * kMiB);
    memory::release(latest);
    memory::set_limit(4 * kMiB);
    CHECK(memory::info().held == 3 * kMiB && memory::acquire(3 * kMiB) == buffers[3]);
    memory::set_limit(0);
    memory::release(buffers[3]);
    CHECK(memory::info().held == 0);
}

TEST(calls_take_scratch_memory_from_the_cache) {
    const Limited limited(64 * kMiB);
    std::vector<float> x(3 * 40000);
    Vector mean(40000), var(40000);
    const size_t in_use = memory::info().in_use;
    moments(View<float>::nsc(x.data(), 3, 40000), mean, var);
    const memory::Info first = memory::info();
    moments(View<float>::nsc(x.data(), 3, 40000), mean, var);
    CHECK(first.held > 0 && first.in_use == in_use && memory::info().misses == first.misses && memory::info().hits > first.hits);
}

// Control groups as files in a folder, and what they grant: (CPUs, bytes).
using Granted = std::pair<int, std::uint64_t>;
Granted granted(const std::string& groups, const std::map<std::string, std::string>& files) {
    const auto top = std::filesystem::temp_directory_path() / ("batchnorm_groups_" + std::to_string(getpid()));
    std::filesystem::remove_all(top);
    for (const auto& [path, text] : files) {
        std::filesystem::create_directories((top / path).parent_path());
        std::ofstream(top / path) << text;
    }
    const limits::Container c = limits::container(top.string(), groups);
    std::filesystem::remove_all(top);
    return {c.cpus, c.bytes};
}

TEST(limits_of_control_groups) {
    const auto cpus = [](const char* text) { return granted("0::/\n", {{"cpu.max", text}}).first; };
    CHECK(cpus("150000 100000\n") == 2 && cpus("100001 100000") == 2 && cpus("1000 100000\n") == 1 &&
          cpus("18446744073709551615 1\n") == 2147483647);
    for (const char* const text : {"max 100000\n", "", "junk\n", "-1 100000\n", "100000 0\n", "1e5 100000\n"}) CHECK(cpus(text) == 0);
    const std::uint64_t gib = std::uint64_t{1} << 30;
    const std::string one = "1073741824\n", v1 = "memory/b/memory.limit_in_bytes";
    CHECK(granted("0::/a\n", {{"a/memory.max", one}}) == Granted(0, gib) &&
          granted("0::/a\n", {{"a/memory.max", "max\n"}}) == Granted(0, 0));
    CHECK(granted("5:memory:/b\n", {{v1, one}}) == Granted(0, gib) &&
          granted("5:memory:/b\n", {{v1, "9223372036854771712\n"}}) == Granted(0, 0));
    const std::string job = "cpu,cpuacct/job/cpu.cfs_";
    CHECK(granted("3:cpu,cpuacct:/job\n", {{job + "quota_us", "250000\n"}, {job + "period_us", "100000\n"}}) == Granted(3, 0));
    // Parents count, and so does the top for a path that leads outside.
    std::map<std::string, std::string> tree{{"a/cpu.max", "200000 100000\n"}, {"a/b/cpu.max", "max 100000\n"}, {"a/b/memory.max", one}};
    tree["a/b/c/cpu.max"] = "800000 100000\n", tree["other/cpu.max"] = "1000 100000\n";
    CHECK(granted("0::/a/b/c", tree) == Granted(2, gib));
    for (const char* const path : {"/docker/1234", "/../outside", "/..", "", "/a//b/"}) {
        CHECK(granted(std::string("0::") + path + "\n", {{"cpu.max", "300000 100000\n"}}) == Granted(3, 0));
    }
    for (const char* const groups : {"", "\n", "junk", "1:cpu", "::", "7:cpuset:/\n8:cpu2:/x"}) CHECK(granted(groups, {}) == Granted(0, 0));
    CHECK(limits::memory() > 0 && limits::cpus() >= 0);
}

}  // namespace
}  // namespace test
