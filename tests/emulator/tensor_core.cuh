// In place of cuda/tensor_core.cuh, for bf16.
#pragma once
#include "async_copy.cuh"
#include "mma.cuh"
typedef Element element;
// Rows of 16 bytes, whose addresses lanes 0 to 31 have, are four matrices of 8 rows; a lane gets what `at(row, column)` says
// of two neighbouring elements of each.
template <typename At>
void load_four(unsigned (&out)[4], unsigned address, At at) {
  aligned((const uint4*)(shared_memory + address));
  unsigned addresses[32];
  {
    Unwatched unwatched;
    auto& all = lane_now->warp->operands;
    all[lane_now->index][0] = address;
    exchange();
    for (int i = 0; i < 32; i++) addresses[i] = all[i][0];
    exchange();
  }
  for (int i = 0; i < 4; i++) {
    auto element_at = [&](int row, int column) {
      return (unsigned)((const element*)(shared_memory + addresses[i * 8 + row]))[column];
    };
    out[i] = at(element_at, lane_now->index / 4, lane_now->index % 4 * 2);
  }
}
inline void load_matrices(unsigned (&out)[4], unsigned address) {
  load_four(out, address, [](auto at, int g, int t) { return at(g, t) | at(g, t + 1) << 16; });
}
inline void load_matrices_transposed(unsigned (&out)[4], unsigned address) {
  load_four(out, address, [](auto at, int g, int t) { return at(t, g) | at(t + 1, g) << 16; });
}
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  mma_16(c, a[0], a[1], a[2], a[3], b0, b1);
}
