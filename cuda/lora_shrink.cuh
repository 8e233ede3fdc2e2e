// Shrink, one warp an item: sums[row, rank] += x[row, columns] . A[rank, columns], in fp32.
//
// A's ranks are the 16 rows of the tensor core's first operand, the rows of x its 8 columns. Both come straight from
// memory, 16 bytes a lane: the order of the columns is free as long as both operands have the same one, so lane 4g + t
// takes columns 8t .. 8t + 8 of 32 for rank g (and g + 8) and for row g. Lanes beyond the last rank or row read that one
// again, and what they compute is not used; columns beyond the end are zeros in x.
#pragma once

#include "lora_memory.cuh"
#include "lora_work.cuh"
#include "mma.cuh"
#include "sync.cuh"

// Where rank i of the group's A lies, looked up in the descriptor.
__device__ __forceinline__ const char* far_a_row(const Pool& pool, const Group& group, const Segment& s, int layer, int i) {
  int module = layer * NUM_MODULES + group.first_module;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    if (i < s.modules[m].rank) break;
    i -= s.modules[m].rank;
    module++;
  }
  return far_row(pool, s.adapter, module, 2, i);
}

__device__ __forceinline__ const char* a_row(const Pool& pool, const Group& group, const Segment& s, int layer, int i) {
  i = min(i, s.ranks - 1);
  return s.is_far ? far_a_row(pool, group, s, layer, i) : near_row(s.a, s.a_split, row_bytes(group.in), i);
}

// Which part of a segment an item of the FEW list is.
struct FewItem {
  int row, part, tile;
};

__device__ __forceinline__ FewItem few_item(const Group& group, const Segment& s, int i) {
  int row_tiles = ceil_div(s.num_rows, 8), parts = ceil_div(group.in, chunk_columns(group.in, s.tiles));
  return {i % row_tiles * 8, i / row_tiles % parts, i / row_tiles / parts};
}

// The same of the MANY list: 16 rows from `row`, MANY_TILES tiles from `tile`, SUM_CHUNKS chunks.
struct ManyItem {
  int row, part, tile;
};

__device__ __forceinline__ ManyItem many_item(int num_rows, int tiles, int i) {
  int row_tiles = ceil_div(num_rows, 16), blocks = ceil_div(tiles, MANY_TILES);
  return {i / blocks % row_tiles * 16, i / blocks / row_tiles, i % blocks * MANY_TILES};
}

#if DTYPE != 0
// 32 columns: acc[16 ranks, 8 rows] += low and high half of the ranks x rows.
__device__ __forceinline__ void shrink_step(float acc[4], uint4 low, uint4 high, uint4 x) {
  mma_16(acc, low.x, high.x, low.y, high.y, x.x, x.y);
  mma_16(acc, low.z, high.z, low.w, high.w, x.z, x.w);
}

// Ranks of `tile` for rows `row` and `row` + 1 of the segment.
__device__ __forceinline__ void store_sums(const Work& work, const Segment& s, int row, int part, int tile, const float acc[4]) {
  int g = threadIdx.x % 32 / 4;
  float* to = work.sums + (long long)(s.first_row + row) * work.sums_stride + (part * s.tiles + tile) * 16 + g;
  for (int j = 0; j < 2; j++, to += work.sums_stride) {
    if (row + j >= s.num_rows) break;
    __stcg(to, acc[j]);
    __stcg(to + 8, acc[j + 2]);
  }
}

__device__ __forceinline__ void shrink_few(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                           int layer, int i, const Element* x, bool& has_waited) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  FewItem item = few_item(group, s, i);
  const char* low = a_row(pool, group, s, layer, item.tile * 16 + g);
  const char* high = a_row(pool, group, s, layer, item.tile * 16 + g + 8);
  const Element* x_row = x + (long long)(s.first_row + min(item.row + g, s.num_rows - 1)) * group.in;
  float acc[4] = {};
  int chunk = chunk_columns(group.in, s.tiles), end = min(group.in, (item.part + 1) * chunk), last = (group.in - 1) / 8 * 8;
  for (int k = item.part * chunk + t * 8; k - t * 8 < end; k += 256) {
    uint4 w[8][2], v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int column = min(k + j * 32, last);
      w[j][0] = load_once(low + column * 2);
      w[j][1] = load_once(high + column * 2);
    }
    wait_once(has_waited);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = load_x(x_row, k + j * 32, end);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int valid = group.in - min(k + j * 32, last);
      shrink_step(acc, mask_tail(w[j][0], valid), mask_tail(w[j][1], valid), v[j]);
    }
  }
  store_sums(work, s, item.row + t * 2, item.part, item.tile, acc);
}

// Add the sums of chunk `i`: in order, or with clusters in the tree of their leaves, up to four of them.
__device__ __forceinline__ void add_chunk(float total[16], float pair[16], const float acc[16], int i) {
#pragma unroll
  for (int e = 0; e < 16; e++) {
    if (!HAS_CLUSTER) total[e] += acc[e];
    else if (i % 4 == 0) total[e] = acc[e];
    else if (i % 4 == 1) total[e] += acc[e];
    else if (i % 4 == 2) pair[e] = acc[e];
    else total[e] += pair[e] + acc[e];
  }
}

// The same sums as of few rows, added up over SUM_CHUNKS chunks.
__device__ __forceinline__ void shrink_many(
    const Pool& pool, const Group& group, const Work& work, const Segment& s, int layer, int i, const Element* x) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  ManyItem item = many_item(s.num_rows, s.tiles, i);
  int tile = item.tile, row = item.row, part = item.part;
  const char* a[4];
  const Element* x_rows[2];
#pragma unroll
  for (int j = 0; j < 4; j++) a[j] = a_row(pool, group, s, layer, tile * 16 + j * 8 + g);
#pragma unroll
  for (int j = 0; j < 2; j++) x_rows[j] = x + (long long)(s.first_row + min(row + j * 8 + g, s.num_rows - 1)) * group.in;
  float total[16] = {}, pair[16]; // [tile, 8 rows, 4]
  int chunk = chunk_columns(group.in, s.tiles), begin = part * SUM_CHUNKS * chunk;
  int end = min(group.in, begin + SUM_CHUNKS * chunk), last = (group.in - 1) / 8 * 8;
  for (int i = 0; i < SUM_CHUNKS; i++, begin += chunk) {
    float acc[4][4] = {};
    int chunk_end = min(end, begin + chunk);
    for (int k = begin + t * 8; k - t * 8 < chunk_end; k += 64) {
      uint4 w[2][4], v[2][2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int column = min(k + j * 32, last);
#pragma unroll
        for (int m = 0; m < 2; m++) v[j][m] = load_x(x_rows[m], k + j * 32, chunk_end);
#pragma unroll
        for (int m = 0; m < 4; m++) w[j][m] = mask_tail(__ldg((const uint4*)(a[m] + column * 2)), group.in - column);
      }
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int m = 0; m < 4; m++) shrink_step(acc[m], w[j][m / 2 * 2], w[j][m / 2 * 2 + 1], v[j][m % 2]);
    }
#pragma unroll
    add_chunk(total, pair, acc[0], i);
  }
#pragma unroll
  for (int m = 0; m < 4; m++)
    if (tile + m / 2 < s.tiles) store_sums(work, s, row + m % 2 * 8 + t * 2, part, tile + m / 2, total + m * 4);
}
#endif
