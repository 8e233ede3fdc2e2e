// Elements of the base's type in memory; arithmetic on them is fp32.
//
// DTYPE: 0 fp32, 1 bf16, 2 fp16. `Element` is a bit pattern, `unpack_*` and `pack` go to fp32 and back, rounding to nearest.
#pragma once

#ifndef DTYPE
#define DTYPE 1
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if DTYPE == 0
typedef float Element;
#else
typedef u16 Element;

// Two neighbouring elements lie in one word, the first in its lower half.
#if DTYPE == 1
__device__ __forceinline__ float unpack_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float unpack_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
__device__ __forceinline__ float unpack_low(u32 pair) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(pair));
  return x;
}
__device__ __forceinline__ float unpack_high(u32 pair) {
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(pair));
  return x;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif
#endif
