// The same items for fp32, by FMA: exact rather than fast.
#pragma once

#include "lora_expand.cuh"
#include "lora_shrink.cuh"

#if DTYPE == 0
// A lane takes every 32nd column; the lanes' sums are added in a tree.
__device__ __forceinline__ void shrink_few(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                           int layer, int i, const Element* x, bool& has_waited) {
  FewItem item = few_item(group, s, i);
  int lane = threadIdx.x % 32, rows = min(8, s.num_rows - item.row);
  int chunk = chunk_columns(group.in, s.tiles()), begin = item.part * chunk, end = min(group.in, begin + chunk);
  const Element* x_rows = x + (long long)(s.first_row + item.row) * group.in;
  wait_once(has_waited);
  for (int r = 0; r < 16; r++) {
    const float* a = (const float*)a_row(pool, group, s, layer, item.tile * 16 + r);
    float acc[8] = {};
    for (int k = begin + lane; k < end; k += 32) {
      float w = a[k];
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (j < rows) acc[j] = fmaf(w, __ldcg(x_rows + (long long)j * group.in + k), acc[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      for (int d = 16; d; d /= 2) acc[j] += __shfl_xor_sync(~0u, acc[j], d);
      float* to = work.sums + (long long)(s.first_row + item.row + j) * s.sums_stride;
      if (lane == 0 && j < rows) __stcg(to + (item.part * s.tiles() + item.tile) * 16 + r, acc[j]);
    }
  }
}

// A lane takes every 32nd column.
__device__ __forceinline__ void expand_few(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                           int layer, int i, Element* delta, bool& has_waited) {
  __shared__ float all[WARPS][RANK_BLOCK * 8]; // [rank, row]
  OutItem item = out_item(group, s, 8, i);
  WeightRows b(group, s, layer, item.index);
  int lane = threadIdx.x % 32, rank = item.module.rank, rows = item.num_rows;
  float* shrunk = all[threadIdx.x / 32];
  wait_once(has_waited);
  Sums sums(group, work, s);
  delta += (long long)(s.first_row + item.row) * group.out_stride + item.delta_column;
  int end = min(item.out, item.column + item.columns);
  for (int first = 0; first == 0 || first < rank; first += RANK_BLOCK) {
    int n = min(RANK_BLOCK, rank - first);
    for (int e = lane; e < ceil_div(n, 4) * 8; e += 32) {
      float total[4];
      sums.total(total, item.row + min(e % 8, rows - 1), item.module.first_rank + first + e / 8 * 4, n - e / 8 * 4);
#pragma unroll
      for (int j = 0; j < 4; j++) shrunk[(e / 8 * 4 + j) * 8 + e % 8] = total[j] * item.module.scale;
    }
    __syncwarp();
    for (int column = item.column + lane; column < end; column += 32) {
      float acc[8];
#pragma unroll
      for (int j = 0; j < 8; j++) acc[j] = first && j < rows ? delta[(long long)j * group.out_stride + column] : 0.0f;
      for (int k = 0; k < n; k++) {
        float w = ((const float*)b.at(pool, first + k))[column];
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] = fmaf(w, shrunk[k * 8 + j], acc[j]);
      }
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (j < rows) delta[(long long)j * group.out_stride + column] = acc[j];
    }
    __syncwarp();
  }
}
#endif
