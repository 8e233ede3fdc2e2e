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
  int chunk = chunk_columns(group.in, s.tiles), begin = item.part * chunk, end = min(group.in, begin + chunk);
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
      float* to = work.sums + (long long)(s.first_row + item.row + j) * work.sums_stride;
      if (lane == 0 && j < rows) __stcg(to + (item.part * s.tiles + item.tile) * 16 + r, acc[j]);
    }
  }
}

__device__ __forceinline__ void shrink_many(
    const Pool&, const Group&, const Work&, const Segment&, int, int, const Element*) {}

// A lane takes every 32nd column.
__device__ __forceinline__ void expand(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                       int layer, int i, Element* delta, float* shrunk, bool& has_waited) {
  OutItem item = out_item(group, s, i);
  int lane = threadIdx.x % 32, rank = item.module.rank, rows = item.num_rows;
  int layer_module = layer * NUM_MODULES + group.first_module + item.index;
  wait_once(has_waited);
  delta += (long long)(s.first_row + item.row) * group.out_stride + item.delta_column;
  int end = min(item.out, item.column + item.columns);
  for (int first = 0; first == 0 || first < rank; first += RANK_BLOCK) {
    int n = min(RANK_BLOCK, rank - first);
    if (n) add_sums(group, work, s, item.row, item.first_rank + first, n, item.module.scale, shrunk);
    for (int column = item.column + lane; column < end; column += 32) {
      float acc[8];
#pragma unroll
      for (int j = 0; j < 8; j++) acc[j] = first && j < rows ? delta[(long long)j * group.out_stride + column] : 0.0f;
      for (int k = 0; k < n; k++) {
        float w = ((const float*)far_row(pool, s.adapter, layer_module, 7, first + k))[column];
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] = fmaf(w, shrunk[j * SHRUNK_STRIDE + k], acc[j]);
      }
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (j < rows) delta[(long long)j * group.out_stride + column] = acc[j];
    }
    __syncwarp();
  }
}
#endif
