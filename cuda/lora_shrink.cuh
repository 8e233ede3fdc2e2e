// Shrink: sums[row, rank] += x[row, columns] . A[rank, columns], in fp32.
//
// A's ranks are the 16 rows of the tensor core's first operand, the rows of x its 8 columns. Both come straight from
// memory, 16 bytes a lane: the order of the columns is free as long as both operands have the same one, so lane 4g + t
// takes columns 8t .. 8t + 8 of 32 for rank g (and g + 8) and for row g. Lanes beyond the last rank or row read that one
// again, and what they compute is not used; columns beyond the end are zeros in x.
// Of few rows, a warp takes an item. Of many, a block takes SHRINK_ROWS rows, 16 a warp, and both operands come through a
// ring of stages in shared memory.
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

#define STAGE_K 64 // columns of a stage
#define SHRINK_STAGES 4
#define K_STRIDE (STAGE_K * 2 + 16) // bytes from row to row: lanes read from different banks

// Which part of a segment an item of the FEW list is.
struct FewItem {
  int row, part, tile;
};

__device__ __forceinline__ FewItem few_item(const Group& group, const Segment& s, int i) {
  int row_tiles = ceil_div(s.num_rows, 8), parts = ceil_div(group.in, chunk_columns(group.in, s.tiles()));
  return {i % row_tiles * 8, i / row_tiles % parts, i / row_tiles / parts};
}

// The same of the MANY list: SHRINK_ROWS rows from `row`, the segment's tiles_at_once() from `tile`, part `part`.
struct ManyItem {
  int row, part, tile;
};

__device__ __forceinline__ ManyItem many_item(const Segment& s, int i) {
  int row_tiles = ceil_div(s.num_rows, SHRINK_ROWS), blocks = ceil_div(s.tiles(), s.tiles_at_once());
  return {i / blocks % row_tiles * SHRINK_ROWS, i / blocks / row_tiles, i % blocks * s.tiles_at_once()};
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
  float* to = work.sums + (long long)(s.first_row + row) * s.sums_stride + (part * s.tiles() + tile) * 16 + g;
  for (int j = 0; j < 2; j++, to += s.sums_stride) {
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
  int chunk = chunk_columns(group.in, s.tiles()), end = min(group.in, (item.part + 1) * chunk), last = (group.in - 1) / 8 * 8;
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
template <int N>
__device__ __forceinline__ void add_chunk(float (&total)[N], float (&pair)[N], const float (&acc)[N], int i) {
#pragma unroll
  for (int e = 0; e < N; e++) {
    if (i == 0) total[e] = acc[e];
    else if (HAS_CLUSTER && i == 2) pair[e] = acc[e];
    else total[e] += HAS_CLUSTER && i == 3 ? pair[e] + acc[e] : acc[e];
  }
}

struct ShrinkMemory {
  char x[SHRINK_STAGES][SHRINK_ROWS * K_STRIDE];
  char a[SHRINK_STAGES][MANY_TILES * 16 * K_STRIDE];
};

// Of a whole block: the same sums as of few rows, added up over sum_chunks chunks.
template <int TILES>
__device__ __forceinline__ void shrink_tiles(ShrinkMemory& memory, const Pool& pool, const Group& group, const Work& work,
                                             const Segment& s, int layer, const ManyItem& item, const Element* x) {
  constexpr int pieces = STAGE_K / 8, rows_at_once = THREADS / pieces, x_turns = SHRINK_ROWS / rows_at_once;
  constexpr int ranks = TILES * 16, a_turns = (ranks + rows_at_once - 1) / rows_at_once;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp_row = threadIdx.x / 32 * 16;
  int my_row = threadIdx.x / pieces, my_column = threadIdx.x % pieces * 8, last = (group.in - 1) / 8 * 8;
  int chunk = chunk_columns(group.in, s.tiles()), begin = item.part * s.sum_chunks * chunk, steps = ceil_div(chunk, STAGE_K);
  const char* a_source[a_turns];
#pragma unroll
  for (int j = 0; j < a_turns; j++) a_source[j] = a_row(pool, group, s, layer, item.tile * 16 + my_row + j * rows_at_once);
  int x_rows[x_turns];
#pragma unroll
  for (int j = 0; j < x_turns; j++) x_rows[j] = s.first_row + min(item.row + my_row + j * rows_at_once, s.num_rows - 1);
  int next_chunk = begin, next_column = 0; // what to ask for
  auto fill = [&](int stage) {
    int k = next_chunk + next_column + my_column, end = min(group.in, next_chunk + chunk);
    if (next_chunk < begin + s.sum_chunks * chunk) {
      int place = my_row * K_STRIDE + my_column * 2;
#pragma unroll
      for (int j = 0; j < x_turns; j++)
        copy_x(memory.x[stage] + place + j * rows_at_once * K_STRIDE, x + (long long)x_rows[j] * group.in, k, end);
#pragma unroll
      for (int j = 0; j < a_turns; j++)
        if (my_row + j * rows_at_once < ranks)
          copy_async(memory.a[stage] + place + j * rows_at_once * K_STRIDE, a_source[j] + min(k, last) * 2, true);
    }
    commit_copies();
    next_column += STAGE_K;
    if (next_column >= chunk) next_column = 0, next_chunk += chunk;
  };
  __syncthreads(); // the item before has been read
  for (int stage = 0; stage < SHRINK_STAGES - 1; stage++) fill(stage);
  float total[TILES * 8] = {}, pair[TILES * 8], acc[TILES * 8] = {}; // [tile, 8 rows, 4]
  bool is_mine = item.row + warp_row < s.num_rows;
  for (int step = 0, of_chunk = 0, c = 0; step < s.sum_chunks * steps; step++) {
    wait_copies<SHRINK_STAGES - 2>();
    __syncthreads();
    fill((step + SHRINK_STAGES - 1) % SHRINK_STAGES);
    if (!is_mine) continue;
    const char* v_at = memory.x[step % SHRINK_STAGES] + (warp_row + g) * K_STRIDE + t * 16;
    const char* w_at = memory.a[step % SHRINK_STAGES] + g * K_STRIDE + t * 16;
#pragma unroll
    for (int j = 0; j < STAGE_K / 32; j++) {
      uint4 v[2], w[TILES * 2];
#pragma unroll
      for (int m = 0; m < 2; m++) v[m] = *(const uint4*)(v_at + m * 8 * K_STRIDE + j * 64);
#pragma unroll
      for (int m = 0; m < TILES * 2; m++) {
        int valid = group.in - begin - c * chunk - of_chunk * STAGE_K - j * 32 - t * 8;
        w[m] = mask_tail(*(const uint4*)(w_at + m * 8 * K_STRIDE + j * 64), valid);
      }
#pragma unroll
      for (int m = 0; m < TILES * 2; m++) shrink_step(acc + m * 4, w[m / 2 * 2], w[m / 2 * 2 + 1], v[m % 2]);
    }
    if (++of_chunk < steps) continue;
    of_chunk = 0;
    add_chunk(total, pair, acc, c++);
#pragma unroll
    for (int e = 0; e < TILES * 8; e++) acc[e] = 0;
  }
#pragma unroll
  for (int m = 0; m < TILES * 2; m++)
    if (item.tile + m / 2 < s.tiles() && is_mine)
      store_sums(work, s, item.row + warp_row + m % 2 * 8 + t * 2, item.part, item.tile + m / 2, total + m * 4);
}

__device__ __forceinline__ void shrink_many(ShrinkMemory& memory, const Pool& pool, const Group& group, const Work& work,
                                            const Segment& s, int layer, int i, const Element* x) {
  ManyItem item = many_item(s, i);
  int tiles = s.tiles_at_once();
  if (tiles == 1) shrink_tiles<1>(memory, pool, group, work, s, layer, item, x);
  else if (tiles == 2) shrink_tiles<2>(memory, pool, group, work, s, layer, item, x);
  else shrink_tiles<3>(memory, pool, group, work, s, layer, item, x);
}
#endif
