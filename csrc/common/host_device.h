// Lets one definition serve the CPU kernels and the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define HEARKEN_HD __host__ __device__ __forceinline__
#else
#define HEARKEN_HD inline
#endif
