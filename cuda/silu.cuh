// silu(gate) * up in fp32, the same wherever it is computed. FAST: for what is rounded to 16 bits afterwards.
#pragma once

template <bool FAST>
__device__ __forceinline__ float silu_mul(float gate, float up) {
  if (!FAST) return gate / (1.0f + expf(-gate)) * up;
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return gate * inverse * up;
}
