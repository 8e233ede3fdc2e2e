// In place of cuda/silu.cuh.
#pragma once
template <bool FAST>
float silu_mul(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}
