// Marks functions that threads of a GPU call as well.
#pragma once

#ifdef __CUDACC__
#define BATCHNORM_HOST_DEVICE __host__ __device__
#else
#define BATCHNORM_HOST_DEVICE
#endif
