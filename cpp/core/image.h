// Integer images: x of type uint8, int16 or uint16, whose arguments have been checked. Called by forward.cpp.
#pragma once

#include "call.h"

namespace batchnorm {

void integer_batch_norm(const Forward& f, const Call& call);

}  // namespace batchnorm
