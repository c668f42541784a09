#define BATCHNORM_ISA avx512
#define BATCHNORM_VECTOR_BYTES 64
#include "isa_body.h"
