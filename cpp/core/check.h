// Every argument check of the C++ library, and the only place that throws. Called first by each driver; a call that passes here
// cannot fail later except for memory or an interrupt.
#pragma once

#include <string_view>

#include "kernels/dispatch.h"
#include "types.h"

namespace batchnorm::check {

Geometry arguments(const BatchNormArgs& a);
Geometry arguments(const BatchNormTrainArgs& a);
Geometry arguments(const BatchNormBackwardArgs& a);
Geometry arguments(const ChannelSumsArgs& a);
Geometry arguments(const CombineArgs& a);
Geometry moments_arguments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int num_threads,
                           const Positions& positions);
Geometry moment_sums_arguments(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions);
// Numbers of channels.
std::int64_t sums(std::span<const double> sums, const char* name);
std::int64_t merged_sums(std::span<double> sums, std::span<const double> others);
std::int64_t sums_to_moments(std::span<const double> sums, std::span<double> mean, std::span<double> m2);
Geometry mask_geometry(const ConstTensor& x);
void arguments(const UpdateRunningArgs& a);
void thread_count(int n);
void tuning(std::string_view settings);  // sets it, or throws

// BATCHNORM_CACHE_LIMIT in bytes, if it is set.
std::int64_t cache_limit(std::int64_t otherwise);

// The table of a named level, or of the level in use.
const kernels::KernelTable& level(std::string_view name);
const kernels::KernelTable& active_level();

[[noreturn]] void interrupted();

}  // namespace batchnorm::check
