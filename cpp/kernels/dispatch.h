// The ISA levels in this build, which of them this machine can run, and the one in use. Knows no operation. Errors are the
// caller's: a name that cannot be used gives nullptr.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace batchnorm::kernels {

struct Level {
    const KernelTable* table;
    bool supported;  // every CPU feature its compiler flags allow is there
};

// All levels of this build, best last. The first, baseline, is always supported.
const std::vector<Level>& levels();

// The table in use: the best supported one, unless BATCHNORM_ISA or use() says otherwise. nullptr if BATCHNORM_ISA names no usable
// level.
const KernelTable* active();

// Uses `table` from now on, in every thread; calls already running finish with theirs.
void use(const KernelTable* table);

// Why the level in use is in use, for show_config().
const char* reason();

}  // namespace batchnorm::kernels
