// Formulas are shared by host and device, and by translation units built for different instruction sets: they must be
// inlined everywhere, or the linker would keep one instruction set's copy for all.
#pragma once

#if defined(__CUDACC__)
#define LIMPET_FORMULA __host__ __device__ __forceinline__
#else
#define LIMPET_FORMULA inline __attribute__((always_inline))
#endif
