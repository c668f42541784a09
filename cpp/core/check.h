// Every argument check of the C++ library, and the only place that throws. Called first by each driver; a call that passes here
// cannot fail later except for memory, an interrupt, or statistics that are not finite where the caller forbids that.
#pragma once

#include <string_view>

#include "call.h"
#include "kernels/dispatch.h"

namespace batchnorm::check {

Call inference(const Forward& f);
Call training(const Forward& f);
Call saving(const Forward& f, const ConstChannels& inv_std);
// What b.saved holds.
const Saved::Impl& backward(const Backward& b);
const Saved::Impl& double_backward(const DoubleBackward& b);
Call moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, int64_t ddof, int num_threads, const Positions& positions,
             Group* group, int64_t sample_outer, bool device = false);
// Of a call whose counts are there: with a group only once they are exchanged.
void enough_values(const Forward& f, const Call& call);
void enough_for(int64_t ddof, const Call& call, const Positions& positions);
Call moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions);
// Numbers of channels.
int64_t merged_sums(std::span<double> sums, std::span<const double> others);
int64_t sums_to_moments(std::span<const double> sums, std::span<double> count, std::span<double> mean, std::span<double> m2);
void running_step(const UpdateRunningArgs& a);
void thread_count(int n);
void tuning(std::string_view settings);  // sets it, or throws

// BATCHNORM_CACHE_LIMIT in bytes, if it is set.
int64_t cache_limit(int64_t otherwise);

// The table of a named level, or of the level in use.
const kernels::KernelTable& level(std::string_view name);
const kernels::KernelTable& active_level();

[[noreturn]] void not_finite(int64_t channel);                          // running statistics would become so
[[noreturn]] void squares_overflow(const char* name, int64_t channel);  // in sums that are merged
[[noreturn]] void interrupted();
[[noreturn]] void rank_failed(int rank, const std::string& message);
[[noreturn]] void ranks_differ(int rank, const char* in);  // from rank 0
[[noreturn]] void no_ranks();
[[noreturn]] void not_among_ranks();
// By a GPU, on which `instead` is.
[[noreturn]] void not_served(const char* argument, const std::string& got, const std::string& instead);

}  // namespace batchnorm::check
