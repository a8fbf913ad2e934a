// exp, and sums and maxima over a vector's lanes.
#ifndef SHOAL_EXPONENTIAL_H
#define SHOAL_EXPONENTIAL_H

#include "vectors.h"

// exp(x) to 2 units in the last place; 0 below -87.3, infinite above 88. Cody and Waite's reduction to |r| <= ln(2) /
// 2, then Cephes' polynomial (expf).
static inline floats exponential(floats x) {
    const floats bounded = __builtin_elementwise_max(__builtin_elementwise_min(x, (floats)88.0f), (floats)-87.3f);
    const floats n = __builtin_elementwise_roundeven(bounded * 1.44269504f);
    floats r = multiply_add(n, (floats)-0.693359375f, bounded);
    r = multiply_add(n, (floats)2.12194440e-4f, r);
    floats y = 1.9875691500e-4f;
    y = multiply_add(y, r, (floats)1.3981999507e-3f);
    y = multiply_add(y, r, (floats)8.3334519073e-3f);
    y = multiply_add(y, r, (floats)4.1665795894e-2f);
    y = multiply_add(y, r, (floats)1.6666665459e-1f);
    y = multiply_add(y, r, (floats)5.0000001201e-1f);
    y = multiply_add(y, r * r, r + 1);
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    y *= (floats)power;
    y = x < -87.3f ? (floats)0 : y;
    return x > 88.0f ? (floats)__builtin_inff() : y;
}

#define HALVE(v, n) /* the lanes n and up of v, below them */                                                          \
    __builtin_shufflevector(v, v, (0 + n) % LANES, (1 + n) % LANES, (2 + n) % LANES, (3 + n) % LANES, (4 + n) % LANES, \
                            (5 + n) % LANES, (6 + n) % LANES, (7 + n) % LANES REST(n))
#if LANES == 16
#define REST(n)                                                                                                        \
    , (8 + n) % LANES, (9 + n) % LANES, (10 + n) % LANES, (11 + n) % LANES, (12 + n) % LANES, (13 + n) % LANES,        \
        (14 + n) % LANES, (15 + n) % LANES
#else
#define REST(n)
#endif

static inline float add_lanes(floats v) {
#if LANES == 16
    v += HALVE(v, 8);
#endif
    v += HALVE(v, 4);
    v += HALVE(v, 2);
    v += HALVE(v, 1);
    return v[0];
}

static inline float largest_lane(floats v) {
#if LANES == 16
    v = __builtin_elementwise_max(v, HALVE(v, 8));
#endif
    v = __builtin_elementwise_max(v, HALVE(v, 4));
    v = __builtin_elementwise_max(v, HALVE(v, 2));
    v = __builtin_elementwise_max(v, HALVE(v, 1));
    return v[0];
}

#endif
