#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define BATCHNORM_ISA_LEVEL(name, supported) \
    namespace batchnorm::name {              \
    extern const kernels::KernelTable table; \
    }
#include "isa_levels.h"
#undef BATCHNORM_ISA_LEVEL

namespace batchnorm::kernels {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports checks the operating system's part (XCR0) too. f16c is asked of cpuid because clang 14's builtin does not
// know the name; it needs the same state as avx.
bool has_f16c() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#define BATCHNORM_CPU_HAS_f16c has_f16c()
#define BATCHNORM_CPU_HAS_avx2 static_cast<bool>(__builtin_cpu_supports("avx2"))
#define BATCHNORM_CPU_HAS_fma static_cast<bool>(__builtin_cpu_supports("fma"))
#define BATCHNORM_CPU_HAS_avx512f static_cast<bool>(__builtin_cpu_supports("avx512f"))
#define BATCHNORM_CPU_HAS_avx512bw static_cast<bool>(__builtin_cpu_supports("avx512bw"))
#define BATCHNORM_CPU_HAS_avx512dq static_cast<bool>(__builtin_cpu_supports("avx512dq"))
#define BATCHNORM_CPU_HAS_avx512vl static_cast<bool>(__builtin_cpu_supports("avx512vl"))
#endif

struct Choice {
    std::atomic<const KernelTable*> table;
    std::atomic<const char*> reason;
    Choice() {
        const char* const name = std::getenv("BATCHNORM_ISA");
        const bool forced = name != nullptr && *name != '\0';
        const KernelTable* found = nullptr;
        for (const Level& level : levels()) {
            if (level.supported && (!forced || std::string(level.table->isa) == name)) found = level.table;
        }
        table = found;
        reason = forced ? "BATCHNORM_ISA" : "the best this CPU supports";
    }
};

Choice& choice() {
    static Choice the_choice;
    return the_choice;
}

}  // namespace

const std::vector<Level>& levels() {
    static const std::vector<Level> all = {
#define BATCHNORM_ISA_LEVEL(name, supported) {&batchnorm::name::table, supported},
#include "isa_levels.h"
#undef BATCHNORM_ISA_LEVEL
    };
    return all;
}

const KernelTable* active() { return choice().table.load(std::memory_order_relaxed); }

void use(const KernelTable* table) {
    choice().table = table;
    choice().reason = "set_isa()";
}

const char* reason() { return choice().reason; }

}  // namespace batchnorm::kernels
