// LoRA of one layer group: delta[rows, out] = scale * (x[rows, in] A^T[in, ranks]) B^T[ranks, out], segment by segment.
//
//   x      [rows, in]   rows of a segment belong to one adapter; a segment without adapter gives zeros
//   delta  [rows, out]  the group's modules side by side
//   A, B^T [rank, in], [rank, out]  of each module, in the adapter's pages, 16-byte aligned rows
//   sums   [rows, sums_stride] fp32: the intermediate, in partial sums
//
// lora_work: a block for each layer group makes the lists of a step, a thread for each segment.
// lora_shrink, lora_expand: a constant grid of warps; each takes every n-th item of a list. Weights and lists do not depend on the
// kernel before: a warp has its first item's weights on the way before it waits for that kernel.
#include "lora_expand.cuh"
#include "lora_fp32.cuh"
#include "lora_shrink.cuh"
#include "lora_work.cuh"
#include "sync.cuh"

#define WARPS 8
#define BLOCKS_PER_SM 2

struct Groups {
  Group of[4];
};

// Rows of A (which: 2) or B (7); true if they lie in more than two pages.
__device__ __forceinline__ bool find_rows(const Pool& pool, int adapter, int module, const int* words, int which, Rows& rows, int& rows_first) {
  rows_first = words[which + 3];
  rows.first = far_row(pool, adapter, module, which, 0);
  if (rows_first >= words[0]) return false;
  rows.next = far_row(pool, adapter, module, which, rows_first);
  return words[0] - rows_first > words[which + 4];
}

__device__ __forceinline__ Segment describe(const Pool& pool, const Group& group, int layer, int adapter, int first_row, int num_rows) {
  Segment s = {first_row, num_rows, adapter};
  for (int m = 0; m < group.num_modules && adapter >= 0; m++) {
    int module = layer * NUM_MODULES + group.first_module + m;
    const int* words = pool.modules + ((long long)adapter * pool.num_layers * NUM_MODULES + module) * MODULE_WORDS;
    SegmentModule& to = s.modules[m];
    to.rank = words[0];
    if (!to.rank) continue;
    to.scale = __int_as_float(words[1]);
    s.is_far |= find_rows(pool, adapter, module, words, 2, to.a, to.a_rows_first);
    s.is_far |= find_rows(pool, adapter, module, words, 7, to.b, to.b_rows_first);
    s.ranks += to.rank;
  }
  s.tiles = ceil_div(s.ranks, 16);
  s.chunk = chunk_columns(group.in, s.tiles);
  return s;
}

__device__ __forceinline__ void count_items(const Group& group, const Segment& s, int counts[NUM_LISTS]) {
  int parts = ceil_div(group.in, s.chunk), columns = 0;
  bool many = is_many(s.num_rows);
  for (int m = 0; m < group.num_modules; m++) columns += ceil_div(group.out[m], expand_steps(s.modules[m].rank) * 64);
  counts[FEW] = many ? 0 : ceil_div(s.num_rows, 8) * s.tiles * parts;
  counts[MANY] = many ? ceil_div(s.num_rows, 16) * ceil_div(s.tiles, 2) * ceil_div(parts, SUM_CHUNKS) : 0;
  counts[OUT] = ceil_div(s.num_rows, many ? EXPAND_ROWS : 8) * columns;
}

extern "C" __global__ void __launch_bounds__(256) lora_work(
    Pool pool, Groups groups, Work work, const int* num_segments, const int* seg_indptr, const int* seg_adapter) {
  __shared__ int warp_ends[NUM_LISTS][8];
  int list = blockIdx.x, layer = list / 4, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Group& group = groups.of[list % 4];
  int n = min(*num_segments, work.max_segments), before[NUM_LISTS] = {};
  for (int first = 0; first < n; first += 256) {
    int i = first + threadIdx.x, ends[NUM_LISTS] = {};
    if (i < n) {
      Segment s = describe(pool, group, layer, seg_adapter[i], seg_indptr[i], seg_indptr[i + 1] - seg_indptr[i]);
      count_items(group, s, ends);
      work.segments[(long long)list * work.max_segments + i] = s;
    }
    for (int l = 0; l < NUM_LISTS; l++) {
      for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, ends[l], d);
        if (lane >= d) ends[l] += other;
      }
      if (lane == 31) warp_ends[l][warp] = ends[l];
    }
    __syncthreads();
    for (int l = 0; l < NUM_LISTS; l++) {
      int total = 0;
      for (int w = 0; w < 8; w++) {
        if (w == warp) ends[l] += before[l] + total;
        total += warp_ends[l][w];
      }
      before[l] += total;
      if (i < n) work.ends[((long long)list * NUM_LISTS + l) * work.max_segments + i] = ends[l];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) work.totals[list] = make_int4(n, before[FEW], before[MANY], before[OUT]);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
    lora_shrink(Pool pool, Group group, Work work, int list, const Element* x) {
  int warp = threadIdx.x / 32, layer = list / 4, num_warps = gridDim.x * WARPS;
  int4 totals = __ldg(work.totals + list);
  const int* ends = work.ends + (long long)list * NUM_LISTS * work.max_segments;
  const Segment* segments = work.segments + (long long)list * work.max_segments;
  bool has_waited = false;
  let_next_kernel_start();
  // Items share nothing: neighbours go to different multiprocessors, so that all have equally much to read.
  for (int item = warp * gridDim.x + blockIdx.x; item < totals.y; item += num_warps) {
    int i = item, segment = find_segment(ends + FEW * work.max_segments, totals.x, i);
    shrink_few(pool, group, work, load_segment(segments + segment), layer, i, x, has_waited);
  }
  wait_once(has_waited);
  // Neighbouring items share their weights: warps of one block take them together.
  for (int item = blockIdx.x * WARPS + warp; item < totals.z; item += num_warps) {
    int i = item, segment = find_segment(ends + MANY * work.max_segments, totals.x, i);
    shrink_many(pool, group, work, load_segment(segments + segment), layer, i, x);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
    lora_expand(Pool pool, Group group, Work work, int list, Element* delta) {
  __shared__ float shrunk[WARPS][8 * SHRUNK_STRIDE];
  int warp = threadIdx.x / 32, layer = list / 4, num_warps = gridDim.x * WARPS;
  int4 totals = __ldg(work.totals + list);
  const int* ends = work.ends + ((long long)list * NUM_LISTS + OUT) * work.max_segments;
  const Segment* segments = work.segments + (long long)list * work.max_segments;
  bool has_waited = false;
  let_next_kernel_start();
  for (int item = warp * gridDim.x + blockIdx.x; item < totals.w; item += num_warps) {
    int i = item, segment = find_segment(ends, totals.x, i);
    expand(pool, group, work, load_segment(segments + segment), layer, i, delta, shrunk[warp], has_waited);
  }
  wait_once(has_waited);
}
