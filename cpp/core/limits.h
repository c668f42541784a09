// What this process may use of the machine where a container, a resource limit or the environment grants less than all: the CPU quota
// for parallel.cpp, the memory for memory.cpp. Knows control groups, and nothing of what is done with the answers.
#pragma once

#include <cstdint>
#include <string>

namespace batchnorm::limits {

// 0 means no limit.
struct Container {
    int cpus = 0;  // CPU time per wall-clock time, rounded up
    std::uint64_t bytes = 0;
};

// The tightest limits of the control groups that `groups` names (the text of /proc/self/cgroup) and of their parents, version 1 and 2,
// below `root` (/sys/fs/cgroup). Files that are missing or make no sense limit nothing.
Container container(const std::string& root, const std::string& groups);

// The container's CPU quota; 0 without one, or if OMP_NUM_THREADS says how many threads are wanted.
int cpus() noexcept;

// Bytes of memory this process may use: the machine's, the container's or those of its resource limit. 0 if unknown.
std::uint64_t memory() noexcept;

}  // namespace batchnorm::limits
