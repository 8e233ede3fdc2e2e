// In place of cuda/element.cuh: fp32 and bf16.
#pragma once
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#if DTYPE == 0
typedef float Element;
#else
typedef u16 Element;
inline float unpack_low(u32 pair) { return __uint_as_float(pair << 16); }
inline float unpack_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline u32 rounded(float x) {
  u32 word = __float_as_uint(x);
  return x != x ? 0x7fc0u : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
#endif
