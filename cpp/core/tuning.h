// The numbers that lay out a call's work but cannot change its result: cache sizes as the machine reports them, and thresholds with
// the measurements behind them. Read by plan.cpp and cuda/small.h alone; settable for experiments.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace batchnorm::tune {

enum Name : int {
    // A core's second-level cache. A channel larger than half of it is gone through backwards the second time (D14).
    l2_bytes,
    // What a call reads and writes beyond this many bytes will not be found in a cache afterwards, so its stores go past the caches
    // (D8): L3. A virtual machine reports that of the whole socket, of which its cores keep a part: hence a bound on what is believed.
    cached_bytes,
    // Runs that lie together in fewer bytes than this, or are shorter than a quarter of it, are not stored past the caches (D16).
    stream_run_bytes,
    // Channels are grouped until their data reaches this size: long contiguous stretches, still well inside L2 (D7).
    group_bytes,
    // Elementwise items.
    map_bytes,
    // What a call reads and writes up to this many bytes comes from caches as fast without fetching ahead (D13).
    fetch_bytes,
    // A call that goes through fewer elements (twice through its own if it sums first, and of rows 3/4 as many) does not wake threads.
    // Awake they gain from half as many on, asleep they cost 12 us (D9).
    parallel_elements,
    // On a GPU: a block that has so many elements at most does all for its channels, in one launch.
    gpu_block_values,
    kNames
};

std::int64_t get(Name name);

// Takes "name=number,name=number", or nothing at all: then every number is the default again. Returns what is wrong with it, in which
// case nothing was set, or an empty string.
std::string set(std::string_view settings);
// The same, and they are the defaults from now on. Called once, before any other call that reads or sets.
std::string set_defaults(std::string_view settings);
std::string text();

}  // namespace batchnorm::tune
