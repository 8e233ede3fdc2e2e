// Expand, one warp an item: delta[row, columns] = sum over ranks of scale * sums[row, rank] * B^T[rank, columns].
//
// 64 columns are the rows of four tensor core products, 8 rows of the step their columns. Lane 4g + t reads columns
// 8g .. 8g + 8 of rank t (and t + 4) of 8, and ends with those columns of rows 2t and 2t + 1: 16 bytes either way. B is
// exact in tf32, and the intermediate goes in as two tf32 numbers that add up to its 22 leading bits. Lanes beyond the
// last rank or column read that one again: against zeros, or not stored.
#pragma once

#include "lora_memory.cuh"
#include "lora_work.cuh"
#include "mma.cuh"
#include "sync.cuh"

#define RANK_BLOCK 64
#define SHRUNK_STRIDE (RANK_BLOCK + 4) // keeps lanes' reads in different banks

// shrunk[8 rows, RANK_BLOCK]: scale times the sums of n ranks, zeros up to the next 8. `sums` is the first row's first rank,
// `parts` partial sums lie `stride` apart, and rows `row_stride`.
__device__ __forceinline__ void add_sums(
    const float* sums, int row_stride, int rows, int stride, int parts, bool has_few, int n, float scale, float* shrunk) {
  int lane = threadIdx.x % 32, shift = 3 + (n > 8) + (n > 16) + (n > 32);
  if (HAS_CLUSTER && (size_t)sums % 16 == 0) { // four ranks at once: fewer waits for memory
#pragma unroll 1
    for (int e = lane; e < rows << shift - 2; e += 32) {
      int r = e >> shift - 2, k = (e & (1 << shift - 2) - 1) * 4;
      const float* from = sums + (long long)r * row_stride + k;
      float4 tree[LEAVES / SUM_CHUNKS];
#pragma unroll
      for (int p = 0; p < LEAVES / SUM_CHUNKS; p++)
        tree[p] = p * SUM_CHUNKS < parts && k < n ? __ldcg((const float4*)(from + p * stride)) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int d = 1; d < LEAVES / SUM_CHUNKS; d *= 2)
#pragma unroll
        for (int p = 0; p < LEAVES / SUM_CHUNKS; p += 2 * d) {
          tree[p].x += tree[p + d].x, tree[p].y += tree[p + d].y;
          tree[p].z += tree[p + d].z, tree[p].w += tree[p + d].w;
        }
      float total[4] = {tree[0].x, tree[0].y, tree[0].z, tree[0].w};
#pragma unroll
      for (int i = 0; i < 4; i++) shrunk[r * SHRUNK_STRIDE + k + i] = k + i < n ? total[i] * scale : 0.0f;
    }
    __syncwarp();
    return;
  }
  for (int e = lane; e < rows << shift; e += 32) {
    int r = e >> shift, k = e & (1 << shift) - 1;
    const float* from = sums + (long long)r * row_stride + min(k, n - 1);
    float total = 0;
    if (HAS_CLUSTER) {
      float tree[LEAVES / SUM_CHUNKS];
#pragma unroll
      for (int p = 0; p < LEAVES / SUM_CHUNKS; p++) tree[p] = p * SUM_CHUNKS < parts ? __ldcg(from + p * stride) : 0.0f;
#pragma unroll
      for (int d = 1; d < LEAVES / SUM_CHUNKS; d *= 2)
#pragma unroll
        for (int p = 0; p < LEAVES / SUM_CHUNKS; p += 2 * d) tree[p] += tree[p + d];
      total = tree[0];
    } else if (has_few) {
#pragma unroll 4
      for (int p = 0; p < parts; p += SUM_CHUNKS) {
        float sum = __ldcg(from + p * stride);
#pragma unroll
        for (int j = 1; j < SUM_CHUNKS; j++) sum += p + j < parts ? __ldcg(from + (p + j) * stride) : 0.0f;
        total += sum;
      }
    } else {
#pragma unroll 4
      for (int p = 0; p < ceil_div(parts, SUM_CHUNKS); p++) total += __ldcg(from + p * stride);
    }
    shrunk[r * SHRUNK_STRIDE + k] = k < n ? total * scale : 0.0f;
  }
  __syncwarp();
}

__device__ __forceinline__ void add_sums(
    const Group& group, const Work& work, const Segment& s, int row, int first, int n, float scale, float* shrunk) {
  const float* sums = work.sums + (long long)(s.first_row + row) * work.sums_stride + first;
  add_sums(sums, work.sums_stride, min(8, s.num_rows - row), s.tiles * 16, ceil_div(group.in, chunk_columns(group.in, s.tiles)),
           !s.is_many, n, scale, shrunk);
}

// Which module, rows and columns an item of a segment's OUT list is.
struct OutItem {
  SegmentModule module;
  int index;                // of the module in its group
  int first_rank;           // of the module in its group
  int out, delta_column;    // of the module
  int column, columns;
  int row, num_rows;
};

__device__ __forceinline__ OutItem out_item(const Group& group, const Segment& s, int i) {
  OutItem item = {s.modules[0]};
  int tile = s.is_many ? EXPAND_ROWS : 8, row_tiles = ceil_div(s.num_rows, tile);
  item.row = i % row_tiles * tile;
  item.num_rows = min(tile, s.num_rows - item.row);
  i /= row_tiles;
#pragma unroll
  for (int m = 0; m < 3; m++) {
    if (m >= group.num_modules) break;
    item.module = s.modules[m];
    item.index = m;
    item.columns = item_columns(item.module.rank);
    item.out = group.out[m];
    int n = ceil_div(item.out, item.columns);
    if (i < n) break;
    i -= n;
    item.first_rank += item.module.rank;
    item.delta_column += item.out;
  }
  item.column = i * item.columns;
  return item;
}

#if DTYPE != 0
__device__ __forceinline__ float tf32_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

__device__ __forceinline__ void expand_step(float acc[4][4], uint4 low, uint4 high, float v0, float v1) {
  float h0 = tf32_part(v0), h1 = tf32_part(v1), l0 = v0 - h0, l1 = v1 - h1;
  u32 a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float w0 = unpack_low(a[j]), w1 = unpack_high(a[j]), w2 = unpack_low(b[j]), w3 = unpack_high(b[j]);
    mma_tf32(acc[j], w0, w1, w2, w3, h0, h1);
    mma_tf32(acc[j], w0, w1, w2, w3, l0, l1);
  }
}

// 8 columns of rows 2t and 2t + 1.
__device__ __forceinline__ void store_columns(Element* delta, int stride, int rows, int column, int out, float acc[4][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++)
    if (j < rows)
      store_delta(delta + j * stride, column, out,
                  make_uint4(pack(acc[0][j], acc[0][j + 2]), pack(acc[1][j], acc[1][j + 2]),
                             pack(acc[2][j], acc[2][j + 2]), pack(acc[3][j], acc[3][j + 2])));
}

// 8 steps of 8 ranks x 64 columns: all `rank_steps` of a block for the first 64 columns, then for the next.
template <bool is_far>
__device__ __forceinline__ void load_b(uint4 w[8][2], const Pool& pool, int adapter, const OutItem& item,
                                       int layer_module, int first, int rank_steps) {
  int lane = threadIdx.x % 32, t = lane % 4, k = 0, last = (item.out - 1) / 8 * 8, column = item.column + lane / 4 * 8;
  int bytes = row_bytes(item.out), rank = item.module.rank, split = item.module.b_split;
  // Rows of the next page, as if they followed the first page's at once.
  const char* next = item.module.b.next - (long long)split * bytes;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int offset = min(column, last) * 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int r = min(first + k * 8 + j * 4 + t, rank - 1);
      const char* row = is_far ? far_row(pool, adapter, layer_module, 7, r) : (r < split ? item.module.b.first : next) + r * bytes;
      w[i][j] = load_once(row + offset);
    }
    if (++k == rank_steps) k = 0, column += 64;
  }
}

__device__ __forceinline__ void expand(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                       int layer, int i, Element* delta, float* shrunk, bool& has_waited) {
  OutItem item = out_item(group, s, i);
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rank = item.module.rank;
  int layer_module = layer * NUM_MODULES + group.first_module + item.index, num_blocks = ceil_div(rank, RANK_BLOCK);
  uint4 w[8][2];
  if (rank && !s.is_far) load_b<false>(w, pool, 0, item, layer_module, 0, min(8, ceil_div(rank, 8)));
  if (rank && s.is_far) load_b<true>(w, pool, s.adapter, item, layer_module, 0, min(8, ceil_div(rank, 8)));
  wait_once(has_waited);
  delta += (long long)(s.first_row + item.row) * group.out_stride + item.delta_column;
  for (int row = 0; row < item.num_rows; row += 8) {
    float acc[4][4] = {};
    Element* to = delta + (row + t * 2) * group.out_stride;
    int rows = item.num_rows - row - t * 2, column = item.column + g * 8;
    if (!rank)
      for (int j = 0; j < item.columns; j += 64) store_columns(to, group.out_stride, rows, column + j, item.out, acc);
    for (int block = 0; block < num_blocks; block++) {
      int first = block * RANK_BLOCK, n = min(RANK_BLOCK, rank - first), steps = ceil_div(n, 8), k = 0;
      if (block > 0 || (row > 0 && num_blocks > 1)) {
        if (s.is_far) load_b<true>(w, pool, s.adapter, item, layer_module, first, steps);
        else load_b<false>(w, pool, 0, item, layer_module, first, steps);
      }
      add_sums(group, work, s, item.row + row, item.first_rank + first, n, item.module.scale, shrunk);
      const float* v = shrunk + g * SHRUNK_STRIDE + t;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i * 64 < steps * item.columns) {
          expand_step(acc, w[i][0], w[i][1], v[k * 8], v[k * 8 + 4]);
          if (++k == steps) {
            k = 0;
            if (block == num_blocks - 1) {
              store_columns(to, group.out_stride, rows, column, item.out, acc);
              column += 64;
#pragma unroll
              for (int j = 0; j < 16; j++) acc[j / 4][j % 4] = 0;
            }
          }
        }
      }
      __syncwarp();
    }
  }
}
#endif
