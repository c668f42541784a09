// The body of every ISA translation unit: all kernels of kernels.def at one vector width, and the unit's only external symbol, its
// table. The including file defines BATCHNORM_ISA and BATCHNORM_VECTOR_BYTES; isa.cmake gives it its compiler flags.
#include "grad_apply.h"
#include "image.h"
#include "moments.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// What each storage name of kernels.def is in memory.
namespace storage {
using float32 = float;
using float64 = double;
using float16 = Float16;
using bfloat16 = Bfloat16;
using uint8 = uint8_t;
using int16 = int16_t;
using uint16 = uint16_t;
}  // namespace storage

constexpr kernels::KernelTable make_table(const char* isa) {
    kernels::KernelTable t{};
    t.isa = isa;
#define BATCHNORM_KERNEL(op, direction, dtype) t.op[kernels::direction][kernels::dtype] = op##_##direction<storage::dtype>;
#include "kernels.def"
#undef BATCHNORM_KERNEL
    return t;
}

}  // namespace

#define BATCHNORM_STRING_(x) #x
#define BATCHNORM_STRING(x) BATCHNORM_STRING_(x)
extern const kernels::KernelTable table;
constexpr kernels::KernelTable table = make_table(BATCHNORM_STRING(BATCHNORM_ISA));

}  // namespace batchnorm::BATCHNORM_ISA
