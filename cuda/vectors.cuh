// The element type of activations, weights and pages: ELEMENT is float, __nv_bfloat16 or __half.
// Arithmetic is in fp32; rows are moved in vectors of 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef ELEMENT element;
constexpr int VECTOR = 16 / sizeof(element);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float x, float& out) { out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& out) { out = __float2half_rn(x); }

// A value as it is after being stored.
__device__ __forceinline__ float rounded(float x) {
    element e;
    from_float(x, e);
    return to_float(e);
}

struct alignas(16) Vector {
    element at[VECTOR];
};

__device__ __forceinline__ void load(const element* source, float (&out)[VECTOR]) {
    const Vector v = *reinterpret_cast<const Vector*>(source);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = to_float(v.at[i]);
}

__device__ __forceinline__ void add(const element* source, float (&out)[VECTOR]) {
    const Vector v = *reinterpret_cast<const Vector*>(source);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] += to_float(v.at[i]);
}

__device__ __forceinline__ void store(const float (&values)[VECTOR], element* target) {
    Vector v;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) from_float(values[i], v.at[i]);
    *reinterpret_cast<Vector*>(target) = v;
}
