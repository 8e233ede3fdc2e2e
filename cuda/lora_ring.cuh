// Shrink and expand with weights through stages in shared memory, 16 KB each: an item is a stage.
//
// The block's last warp looks up 32 items at once, a lane each, and has their weights copied: it waits for no one but the
// stages' consumers. Each of the other warps has a stage of its own, and with it what that lane found out about the item.
#pragma once

#include "lora_expand.cuh"
#include "lora_shrink.cuh"
#include "barrier.cuh"

// Rows lie so much further apart than they are long that lanes read from different banks.
#define A_STRIDE (CHUNK * 2 + 64)

#if HAS_RING
// Weights to be copied: row i < split from first + i * stride, others from next + i * stride.
struct Source {
  const char* first;
  const char* next;
  int split, stride, num_rows, bytes;
  int is_far; // rows lie anywhere: number far_first and on of A, or of a module's B, from far_offset on
  int far_segment, far_module, far_first, far_offset;
};

// What the consumer of a stage must know.
struct StageItem {
  int row, num_rows;     // of the step
  int column, columns;   // of x (shrink), of delta (expand)
  int sums, sums_stride; // the first rank's place in a row of sums; from one partial sum to the next
  int rank;              // of the module; if more than RANK_BLOCK, nothing is in the stage
  float scale;
  int stride;            // of the stage's rows, bytes
  int has_few;
  int segment, index;
};

template <int stage_bytes>
struct Ring {
  u64 full[WARPS], empty[WARPS];
  StageItem items[WARPS];
  alignas(128) char stages[WARPS][stage_bytes];
};
typedef Ring<16 * A_STRIDE> ShrinkRing;
typedef Ring<64 * (256 + 32)> ExpandRing; // of all ranks, 64 need most

template <typename AnyRing>
__device__ __forceinline__ void init_ring(AnyRing& ring) {
  if (threadIdx.x < WARPS) {
    init_barrier(&ring.full[threadIdx.x], 1);
    init_barrier(&ring.empty[threadIdx.x], 1);
    fence_barrier_init();
  }
  __syncthreads();
}

// One lane's search in a list of segments' ends; `i` becomes its place among the segment's items.
__device__ __forceinline__ int search_segment(const int* ends, int n, int& i) {
  int low = 0, high = n - 1;
  while (low < high) {
    int middle = (low + high) / 2;
    if (__ldg(ends + middle) <= i) low = middle + 1;
    else high = middle;
  }
  if (low > 0) i -= __ldg(ends + low - 1);
  return low;
}

__device__ __forceinline__ void describe_shrink(
    const Group& group, const Work& work, const Segment& s, int segment, int i, Source& source, StageItem& stage) {
  FewItem item = few_item(group, s, i);
  int stride = row_bytes(group.in), first = item.tile * 16, column = item.part * CHUNK;
  stage.row = s.first_row + item.row;
  stage.num_rows = min(8, s.num_rows - item.row);
  stage.column = column;
  stage.columns = min(CHUNK, group.in - column);
  stage.sums = (item.part * s.tiles + item.tile) * 16;
  stage.stride = A_STRIDE;
  source.num_rows = min(16, s.ranks - first);
  source.bytes = stage.columns * 2;
  source.stride = stride;
  source.split = s.a_split - first;
  source.first = s.a.first + (long long)first * stride + column * 2;
  source.next = s.a.next + (long long)(first - s.a_split) * stride + column * 2;
  source.is_far = s.is_far;
  source.far_segment = segment;
  source.far_first = first;
  source.far_offset = column * 2;
}

__device__ __forceinline__ void describe_expand(
    const Group& group, const Work& work, const Segment& s, int segment, int i, Source& source, StageItem& stage) {
  OutItem item = out_item(group, s, i);
  int stride = row_bytes(item.out), width = min(item.columns, item.out - item.column);
  stage.row = s.first_row + item.row;
  stage.num_rows = item.num_rows;
  stage.column = item.delta_column + item.column;
  stage.columns = width;
  stage.sums = item.first_rank;
  stage.sums_stride = s.tiles * 16;
  stage.rank = item.module.rank;
  stage.scale = item.module.scale;
  stage.stride = item.columns * 2 + 32;
  stage.has_few = !is_many(s.num_rows);
  stage.segment = segment;
  stage.index = i;
  source.num_rows = stage.rank <= RANK_BLOCK ? stage.rank : 0;
  source.bytes = width * 2;
  source.stride = stride;
  source.split = item.module.b_split;
  source.first = item.module.b.first + item.column * 2;
  source.next = item.module.b.next - (long long)item.module.b_split * stride + item.column * 2;
  source.is_far = s.is_far;
  source.far_segment = segment;
  source.far_module = item.index;
  source.far_offset = item.column * 2;
}

// Of the filling warp: until the stage's consumer is done with what was in it.
template <typename AnyRing>
__device__ __forceinline__ void wait_empty(AnyRing& ring, int stage, int& uses) {
  int used = __shfl_sync(~0u, uses, stage);
  if (used > 0) wait_barrier(&ring.empty[stage], (used - 1) & 1);
  if (threadIdx.x % 32 == stage) uses++;
}

// Of the filling warp: fill the ring with this block's items of a list, in order.
// Lane s of `uses` counts how often stage s was filled.
template <bool is_shrink, typename AnyRing>
__device__ __forceinline__ void fill(AnyRing& ring, int& uses, const Pool& pool, const Group& group, const Work& work,
                                     const Segment* segments, const int* ends, int num_segments, int num_items, int layer) {
  int lane = threadIdx.x % 32, stage = -1;
  for (int base = blockIdx.x; base < num_items; base += 32 * gridDim.x) {
    Source mine = {};
    StageItem item = {};
    int i = base + lane * gridDim.x, count = min(32, ceil_div(num_items - base, gridDim.x));
    if (i < num_items) {
      int segment = search_segment(ends, num_segments, i);
      if (is_shrink) describe_shrink(group, work, load_segment(segments + segment), segment, i, mine, item);
      else describe_expand(group, work, load_segment(segments + segment), segment, i, mine, item);
    }
    for (int owner = 0; owner < count; owner++) {
      if (++stage == WARPS) stage = 0;
      const char* first = (const char*)__shfl_sync(~0u, (u64)mine.first, owner);
      const char* next = (const char*)__shfl_sync(~0u, (u64)mine.next, owner);
      int split = __shfl_sync(~0u, mine.split, owner), stride = __shfl_sync(~0u, mine.stride, owner);
      int num_rows = __shfl_sync(~0u, mine.num_rows, owner), bytes = __shfl_sync(~0u, mine.bytes, owner);
      int stage_stride = __shfl_sync(~0u, item.stride, owner), is_far = __shfl_sync(~0u, mine.is_far, owner);
      wait_empty(ring, stage, uses);
      if (lane == owner) ring.items[stage] = item;
      __syncwarp();
      if (lane == 0) arrive_expecting(&ring.full[stage], num_rows * bytes);
      __syncwarp();
      if (is_far) {
        const Segment& s = segments[__shfl_sync(~0u, mine.far_segment, owner)];
        int m = __shfl_sync(~0u, mine.far_module, owner), row = __shfl_sync(~0u, mine.far_first, owner);
        int offset = __shfl_sync(~0u, mine.far_offset, owner);
        for (int r = lane; r < num_rows; r += 32) {
          const char* from = is_shrink ? far_a_row(pool, group, s, layer, row + r)
                                       : far_row(pool, s.adapter, layer * NUM_MODULES + group.first_module + m, 7, r);
          copy_bulk(ring.stages[stage] + r * stage_stride, from + offset, bytes, &ring.full[stage]);
        }
      } else {
        for (int r = lane; r < num_rows; r += 32)
          copy_bulk(ring.stages[stage] + r * stage_stride, (r < split ? first : next) + (long long)r * stride, bytes,
                    &ring.full[stage]);
      }
    }
  }
}

// What of a segment is needed where its rows are near.
struct alignas(16) Near {
  int first_row, num_rows, adapter, is_far, tiles, ranks, a_split, unused;
  Rows a;
};

__device__ __forceinline__ Near load_near(const Segment* from) {
  union {
    Near near;
    int4 parts[sizeof(Near) / 16];
  } to;
#pragma unroll
  for (int i = 0; i < sizeof(Near) / 16; i++) to.parts[i] = __ldg((const int4*)from + i);
  return to.near;
}

// Of the filling warp, for MANY items: rows of x instead of weights, SUM_CHUNKS times a consumer's stage for its item.
// Consumers without an item get empty stages.
__device__ __forceinline__ void fill_many(ShrinkRing& ring, int& uses, const Group& group, const Segment* segments, const int* ends,
                                          int num_segments, int num_items, const Element* x) {
  int lane = threadIdx.x % 32;
  for (int base = blockIdx.x * WARPS; base < num_items; base += gridDim.x * WARPS) {
    const Element* first = x;
    int i = base + lane, num_rows = 0, column = 0;
    if (lane < WARPS && i < num_items) {
      int segment = search_segment(ends, num_segments, i);
      Near s = load_near(segments + segment);
      ManyItem item = many_item(s.num_rows, s.tiles, i);
      num_rows = min(16, s.num_rows - item.row);
      column = item.part * SUM_CHUNKS * CHUNK;
      first += (long long)(s.first_row + item.row) * group.in + column;
    }
    for (int c = 0; c < SUM_CHUNKS; c++) {
      for (int owner = 0; owner < WARPS; owner++) {
        const Element* from = (const Element*)__shfl_sync(~0u, (u64)first, owner) + c * CHUNK;
        int rows = __shfl_sync(~0u, num_rows, owner), columns = group.in - __shfl_sync(~0u, column, owner) - c * CHUNK;
        if (columns <= 0) rows = 0;
        wait_empty(ring, owner, uses);
        int bytes = min(CHUNK, columns) * 2;
        if (lane == 0) arrive_expecting(&ring.full[owner], rows * bytes);
        __syncwarp();
        if (lane < rows)
          copy_bulk(ring.stages[owner] + lane * A_STRIDE, from + (long long)lane * group.in, bytes, &ring.full[owner]);
      }
    }
  }
}

// Of a consuming warp: all of its MANY items. The rows of x are the 16 rows of the tensor core's first operand here, 8
// ranks its columns; every sum is made in the same order as by shrink_stage.
__device__ __forceinline__ void shrink_many_stages(ShrinkRing& ring, int uses, const Pool& pool, const Group& group, const Work& work,
                                                   const Segment* segments, const int* ends, int num_segments, int num_items,
                                                   int layer) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int base = blockIdx.x * WARPS; base < num_items; base += gridDim.x * WARPS) {
    int i = base + warp;
    bool has_item = i < num_items;
    const Segment* where = segments + (has_item ? find_segment(ends, num_segments, i) : 0);
    Near s = load_near(where);
    ManyItem item = has_item ? many_item(s.num_rows, s.tiles, i) : ManyItem{};
    int ranks = min(16 * MANY_TILES, s.ranks - item.tile * 16);
    float total[MANY_TILES * 2][4] = {};
    for (int c = 0; c < SUM_CHUNKS; c++, uses++) {
      int column = (item.part * SUM_CHUNKS + c) * CHUNK, columns = group.in - column;
      wait_barrier(&ring.full[warp], uses & 1);
      if (has_item && columns > 0) {
        const char* v = ring.stages[warp] + g * A_STRIDE + t * 16;
        int last = (group.in - 1) / 8 * 8;
#pragma unroll
        for (int m = 0; m < MANY_TILES; m++) {
          if (m * 16 >= ranks) break;
          const char* a[2];
          for (int j = 0; j < 2; j++) {
            int rank = min((item.tile + m) * 16 + j * 8 + g, s.ranks - 1);
            a[j] = s.is_far ? far_a_row(pool, group, *where, layer, rank) : near_row(s.a, s.a_split, row_bytes(group.in), rank);
          }
          float acc[2][4] = {};
#pragma unroll 4
          for (int j = 0; j < CHUNK / 32; j++) {
            int k = min(column + j * 32 + t * 8, last);
            uint4 w0 = __ldg((const uint4*)(a[0] + k * 2)), w1 = __ldg((const uint4*)(a[1] + k * 2));
            uint4 low = *(const uint4*)(v + j * 64), high = *(const uint4*)(v + j * 64 + 8 * A_STRIDE);
            if (j * 32 + t * 8 >= columns) low = high = w0 = w1 = make_uint4(0, 0, 0, 0);
            shrink_step(acc[0], low, high, w0);
            shrink_step(acc[1], low, high, w1);
          }
#pragma unroll
          for (int e = 0; e < 8; e++) total[m * 2 + e / 4][e % 4] += acc[e / 4][e % 4];
        }
      }
      __syncwarp();
      if (lane == 0) arrive(&ring.empty[warp]);
    }
    if (!has_item) continue;
    float* sums = work.sums + (item.part * s.tiles + item.tile) * 16 + t * 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int row = item.row + j * 8 + g;
      if (row >= s.num_rows) break;
      float* to = sums + (long long)(s.first_row + row) * work.sums_stride;
#pragma unroll
      for (int m = 0; m < MANY_TILES * 2; m++)
        if (m * 8 < ranks) __stcg((float2*)(to + m * 8), make_float2(total[m][j * 2], total[m][j * 2 + 1]));
    }
  }
}

// Of a consuming warp: its stage has the next item of the FEW list.
__device__ __forceinline__ void shrink_stage(ShrinkRing& ring, int uses, const Group& group, const Work& work, const Element* x) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stage = threadIdx.x / 32;
  wait_barrier(&ring.full[stage], uses & 1);
  StageItem item = ring.items[stage];
  const Element* x_row = x + (long long)(item.row + min(g, item.num_rows - 1)) * group.in + item.column;
  const char* a = ring.stages[stage] + g * A_STRIDE + t * 16;
  uint4 v[CHUNK / 32];
#pragma unroll
  for (int j = 0; j < CHUNK / 32; j++) v[j] = load_x(x_row, j * 32 + t * 8, item.columns);
  float acc[4] = {};
#pragma unroll
  for (int j = 0; j < CHUNK / 32; j++) {
    uint4 low = *(const uint4*)(a + j * 64), high = *(const uint4*)(a + j * 64 + 8 * A_STRIDE);
    if (j * 32 + t * 8 >= item.columns) low = high = make_uint4(0, 0, 0, 0); // what an earlier item left
    shrink_step(acc, low, high, v[j]);
  }
  __syncwarp();
  if (lane == 0) arrive(&ring.empty[stage]);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (t * 2 + j >= item.num_rows) break;
    float* to = work.sums + (long long)(item.row + t * 2 + j) * work.sums_stride + item.sums + g;
    __stcg(to, acc[j]);
    __stcg(to + 8, acc[j + 2]);
  }
}

__device__ __forceinline__ void expand_stage(ExpandRing& ring, int uses, const Pool& pool, const Group& group, const Work& work,
                                             const Segment* segments, int layer, Element* delta, float* shrunk) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stage = threadIdx.x / 32;
  wait_barrier(&ring.full[stage], uses & 1);
  StageItem item = ring.items[stage];
  if (item.rank > RANK_BLOCK) {
    __syncwarp();
    if (lane == 0) arrive(&ring.empty[stage]);
    bool has_waited = true;
    return expand(pool, group, work, load_segment(segments + item.segment), layer, item.index, delta, shrunk, has_waited);
  }
  const char* b = ring.stages[stage] + t * item.stride + g * 16;
  int steps = ceil_div(item.rank, 8), parts = ceil_div(group.in, CHUNK);
  for (int row = 0; row < item.num_rows; row += 8) {
    int rows = min(8, item.num_rows - row);
    const float* sums = work.sums + (long long)(item.row + row) * work.sums_stride + item.sums;
    if (steps)
      add_sums(sums, work.sums_stride, rows, item.sums_stride, parts, item.has_few, item.rank, item.scale, shrunk);
    Element* to = delta + (long long)(item.row + row + t * 2) * group.out_stride + item.column;
    for (int column = 0; column < item.columns; column += 64) {
      float acc[4][4] = {};
      const float* v = shrunk + g * SHRUNK_STRIDE + t;
#pragma unroll 2
      for (int k = 0; k < steps; k++) {
        const char* at = b + k * 8 * item.stride + column * 2;
        uint4 low = *(const uint4*)at, high = *(const uint4*)(at + 4 * item.stride);
        if (k * 8 + t >= item.rank) low = make_uint4(0, 0, 0, 0); // what an earlier item left
        if (k * 8 + t + 4 >= item.rank) high = make_uint4(0, 0, 0, 0);
        expand_step(acc, low, high, v[k * 8], v[k * 8 + 4]);
      }
      store_columns(to, group.out_stride, rows - t * 2, column + g * 8, item.columns, acc);
    }
    __syncwarp();
  }
  if (lane == 0) arrive(&ring.empty[stage]);
}
#endif
