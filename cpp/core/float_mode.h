// The floating-point mode of the core: round to nearest, denormals are numbers, nothing traps. While one lives its thread computes so,
// whatever the caller or another library has set (torch.set_flush_denormal, fesetround, feenableexcept); afterwards the mode, raised
// flags included, is as before. One stands in each public function and in each thread of a team. The poll of an interrupt runs in it.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

#include <cstdint>

namespace batchnorm {

class FloatMode {
public:
#if defined(__x86_64__)
    FloatMode() : before_(_mm_getcsr()) {
        if (before_ != kDefault) _mm_setcsr(kDefault);
    }
    ~FloatMode() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
    FloatMode() {
        asm volatile("mrs %0, fpcr\n mrs %1, fpsr" : "=r"(before_), "=r"(flags_)::"memory");
        if (before_ != 0) asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}) : "memory");
    }
    ~FloatMode() {
        if (before_ != 0) asm volatile("msr fpcr, %0" ::"r"(before_) : "memory");
        asm volatile("msr fpsr, %0" ::"r"(flags_) : "memory");
    }
#else
    FloatMode() { std::feholdexcept(&before_), std::fesetenv(FE_DFL_ENV); }
    ~FloatMode() { std::fesetenv(&before_); }
#endif
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

private:
#if defined(__x86_64__)
    static constexpr unsigned kDefault = 0x1f80;  // every exception masked, no flag raised
    unsigned before_;
#elif defined(__aarch64__)
    std::uint64_t before_, flags_;
#else
    std::fenv_t before_;
#endif
};

}  // namespace batchnorm
