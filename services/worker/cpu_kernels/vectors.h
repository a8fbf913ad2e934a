// Vectors of floats as wide as the processor's registers, and how many of them a product keeps in registers.
//
// Each result is computed by the same additions in the same order whatever the width, the number of rows beside it or
// the number of threads: only explicit multiply-adds, no reordering by the compiler.
#ifndef SHOAL_VECTORS_H
#define SHOAL_VECTORS_H

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS_AT_ONCE 12 // 24 sums, 2 vectors of weights, 6 registers left
#else
#define LANES 8
#define ROWS_AT_ONCE 6 // 12 sums, 2 vectors of weights, 2 registers left
#endif

typedef float floats __attribute__((ext_vector_type(LANES)));
typedef int32_t ints __attribute__((ext_vector_type(LANES)));
typedef floats unaligned_floats __attribute__((aligned(4)));
typedef ints unaligned_ints __attribute__((aligned(4)));

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll") // so that an array of vectors is kept in registers

static inline floats load(const float *from) { return *(const unaligned_floats *)from; }
static inline void store(float *to, floats values) { *(unaligned_floats *)to = values; }

// Have a value in a register once: the compiler would rather load it anew in each operation that takes it, and the
// processor's loads are what a product of many rows waits for.
#if defined(__AVX2__)
#define LOADED_ONCE(value) __asm__("" : "+v"(value))
#else
#define LOADED_ONCE(value)
#endif

static inline floats multiply_add(floats a, floats b, floats c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_elementwise_fma(a, b, c);
#else
    return a * b + c; // as one operation it would be a call of the C library
#endif
}

#endif
