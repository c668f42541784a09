#define BATCHNORM_ISA avx2
#define BATCHNORM_VECTOR_BYTES 32
#include "isa_body.h"
