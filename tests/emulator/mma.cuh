// In place of cuda/mma.cuh.
#pragma once
#include "element.cuh"
#if DTYPE != 0
// d[16, 8] += a[16, k] b[k, 8] with a(row, k) and b(k, column) of a warp's operands.
template <typename A, typename B>
void multiply(float d[4], unsigned const (&mine)[6], int k, A a, B b) {
  Unwatched unwatched;
  memcpy(lane_now->warp->operands[lane_now->index], mine, sizeof(mine));
  exchange();
  for (int e = 0; e < 4; e++)
    for (int i = 0; i < k; i++)
      d[e] += a(lane_now->index / 4 + e / 2 * 8, i) * b(i, lane_now->index % 4 * 2 + e % 2);
  exchange();
}
inline void mma_16(float d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  auto& all = lane_now->warp->operands;
  auto half = [](u32 pair, int k) { return k % 2 ? unpack_high(pair) : unpack_low(pair); };
  multiply(
      d, {a0, a1, a2, a3, b0, b1}, 16,
      [&](int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k); },
      [&](int k, int column) { return half(all[column * 4 + k % 8 / 2][4 + k / 8], k); });
}
inline void mma_tf32(float d[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  auto& all = lane_now->warp->operands;
  auto word = [](float x) { return __float_as_uint(x) & 0xffffe000u; };
  multiply(
      d, {word(a0), word(a1), word(a2), word(a3), word(b0), word(b1)}, 8,
      [&](int row, int k) { return __uint_as_float(all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return __uint_as_float(all[column * 4 + k % 4][4 + k / 4]); });
}
#endif
