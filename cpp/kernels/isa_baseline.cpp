#define BATCHNORM_ISA baseline
#define BATCHNORM_VECTOR_BYTES 16
#include "isa_body.h"
