// LoRA of one layer group: delta[rows, out] = scale * (x[rows, in] A^T[in, ranks]) B^T[ranks, out], segment by segment.
//
//   x      [rows, in]   rows of a segment belong to one adapter; a segment without adapter gives zeros
//   delta  [rows, out]  the group's modules side by side
//   A, B^T [rank, in], [rank, out]  of each module, in the adapter's pages, 16-byte aligned rows
//   sums   [rows, sums_stride] fp32: the intermediate, in partial sums
//
// lora_work: a block for each layer group makes the lists of a step, a thread for each segment.
// lora_cluster: a constant grid of clusters, each takes every n-th unit: segments of few rows, where there are clusters.
// lora_shrink, lora_expand: a constant grid; each warp, or block, takes every n-th item of a list.
// lora_silu_mul: the consumer of gate_up's delta as an expand: it takes the place of lora_expand and of silu_mul.
// Weights and lists do not depend on the kernel before: they are on their way before a warp waits for that kernel. Weights
// that are being swapped in are waited for by each kernel (wait_for_weights).
#include "lora_cluster.cuh"
#include "lora_expand.cuh"
#include "lora_fp32.cuh"
#include "lora_shrink.cuh"
#include "lora_silu.cuh"
#include "lora_units.cuh"
#include "lora_work.cuh"
#include "sync.cuh"

struct Groups {
  Group of[4];
};

// Where the rows of a segment's A lie (those of its modules follow each other), and of each module's B.
__device__ __forceinline__ Segment describe(
    const Pool& pool, const Group& group, const Work& work, int layer, int adapter, int first_row, int num_rows, int most_few,
    int sum_chunks) {
  Segment s = {first_row, num_rows, adapter};
  bool is_many = num_rows > most_few;
  int num_splits = 0, stride = row_bytes(group.in);
  const char* follows = nullptr; // where the next module's A is if there is no split
  for (int m = 0; m < group.num_modules && adapter >= 0; m++) {
    int module = layer * NUM_MODULES + group.first_module + m;
    const int* words = pool.modules + ((long long)adapter * pool.num_layers * NUM_MODULES + module) * MODULE_WORDS;
    int rank = words[0], a_first = words[5], b_first = words[10];
    SegmentModule& to = s.modules[m];
    to.rank = rank, to.first_rank = s.ranks;
    if (!rank) continue;
    is_many |= HAS_CLUSTER && rank > UNIT_RANKS;
    to.scale = __int_as_float(words[1]);
    to.b_split = b_first;
    to.b.first = far_row(pool, adapter, module, 7, 0);
    if (b_first < rank) to.b.next = far_row(pool, adapter, module, 7, b_first);
    s.is_far |= rank - b_first > words[11];
    const char* a = far_row(pool, adapter, module, 2, 0);
    if (!follows) s.a.first = a;
    if (follows && a != follows) s.a_split = s.ranks, s.a.next = a, num_splits++;
    follows = a + (long long)rank * stride;
    if (a_first < rank) {
      s.a_split = s.ranks + a_first;
      s.a.next = far_row(pool, adapter, module, 2, a_first);
      follows = s.a.next + (long long)(rank - a_first) * stride;
      num_splits++;
      s.is_far |= rank - a_first > words[6];
    }
    s.ranks += rank;
  }
  if (!num_splits) s.a_split = s.ranks;
  s.is_far |= num_splits > 1;
  s.sum_chunks = DTYPE != 0 && is_many ? sum_chunks : 0;
  s.out_columns = HAS_CLUSTER && sum_chunks == SUM_CHUNKS ? OUT_COLUMNS : OUT_COLUMNS / 4;
  s.sums_stride = HAS_CLUSTER ? work.sums_stride * (SUM_CHUNKS / sum_chunks) : work.sums_stride;
  return s;
}

__device__ __forceinline__ void count_items(const Group& group, const Segment& s, bool leaves_expand, int counts[NUM_LISTS]) {
  int parts = ceil_div(group.in, chunk_columns(group.in, s.tiles())), columns = 0, rest = ceil_div(group.out[0], SILU_COLUMNS);
  for (int m = 0; m < group.num_modules; m++) columns += ceil_div(group.out[m], item_columns(s, s.modules[m].rank));
  if (s.is_many()) {
    counts[MANY] = ceil_div(s.num_rows, SHRINK_ROWS) * ceil_div(s.tiles(), max(1, s.tiles_at_once())) * ceil_div(parts, s.sum_chunks);
    counts[MANY_OUT] = ceil_div(s.num_rows, EXPAND_ROWS) * (leaves_expand ? rest : columns);
  } else {
    if (leaves_expand) counts[REST] = ceil_div(s.num_rows, 8) * rest;
#if !HAS_CLUSTER // else units
    counts[FEW] = ceil_div(s.num_rows, 8) * s.tiles() * parts;
    counts[FEW_OUT] = ceil_div(s.num_rows, 8) * columns;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(256) lora_work(
    Pool pool, Groups groups, Work work, const int* num_segments, const int* seg_indptr, const int* seg_adapter, int most_few,
    int sum_chunks, int num_rows, int num_clusters, int cluster, int expanding_group) {
  __shared__ int warp_ends[NUM_LISTS][8];
  int list = blockIdx.x, layer = list / 4, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Group& group = groups.of[list % 4];
  int n = min(*num_segments, work.max_segments), before[NUM_LISTS] = {};
  for (int first = 0; first < n; first += 256) {
    int i = first + threadIdx.x, ends[NUM_LISTS] = {};
    if (i < n) {
      int first_row = seg_indptr[i], rows = seg_indptr[i + 1] - first_row;
      Segment s = describe(pool, group, work, layer, seg_adapter[i], first_row, rows, most_few, sum_chunks);
      count_items(group, s, list % 4 == expanding_group, ends);
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
  if (threadIdx.x == 0) {
    work.totals[list].segments = n, work.totals[list].leaves_expand = list % 4 == expanding_group;
    for (int l = 0; l < NUM_LISTS; l++) work.totals[list].items[l] = before[l];
  }
#if HAS_CLUSTER
  list_units(group, work, list, n, min(num_clusters, num_rows * group.num_modules) * cluster, cluster);
#endif
}

// A list of a layer group.
struct List {
  const int* ends;
  const Segment* segments;
  int num_segments, size;

  __device__ __forceinline__ List(const Work& work, int list, int which)
      : ends(work.ends + ((long long)list * NUM_LISTS + which) * work.max_segments),
        segments(work.segments + (long long)list * work.max_segments),
        num_segments(__ldg(&work.totals[list].segments)), size(__ldg(&work.totals[list].items[which])) {}

  // The segment of item `i`, which becomes its place among the segment's.
  __device__ __forceinline__ Segment segment(int& i) const { return load_segment(segments + find_segment(ends, num_segments, i)); }

  // Items of a warp share nothing: neighbours go to different multiprocessors, so that all have equally much to read.
  template <typename Body>
  __device__ __forceinline__ void each_of_warp(Body body) const {
    for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < size; item += gridDim.x * WARPS) {
      int i = item;
      Segment s = segment(i);
      body(s, i);
    }
  }

  template <typename Body>
  __device__ __forceinline__ void each_of_block(Body body) const {
    for (int item = blockIdx.x; item < size; item += gridDim.x) {
      int i = item;
      Segment s = segment(i);
      body(s, i);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    lora_shrink(Pool pool, Group group, Work work, int list, const Element* x) {
  int layer = list / 4, needed_step = __ldg(pool.needed_step);
  let_next_kernel_start();
  bool has_waited = false;
  List many(work, list, MANY);
  wait_for_weights(pool, layer, needed_step);
#if !HAS_CLUSTER
  List(work, list, FEW).each_of_warp([&](const Segment& s, int i) { shrink_few(pool, group, work, s, layer, i, x, has_waited); });
#endif
  wait_once(has_waited);
#if DTYPE != 0
  many.each_of_block([&](const Segment& s, int i) {
    shrink_many(*(ShrinkMemory*)shared_memory, pool, group, work, s, layer, i, x);
  });
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    lora_expand(Pool pool, Group group, Work work, int list, Element* delta) {
  int layer = list / 4, needed_step = __ldg(pool.needed_step);
  let_next_kernel_start();
  bool has_waited = false;
  List many(work, list, MANY_OUT);
  bool leaves_expand = __ldg(&work.totals[list].leaves_expand);
  wait_for_weights(pool, layer, needed_step);
#if !HAS_CLUSTER
  List(work, list, FEW_OUT).each_of_warp([&](const Segment& s, int i) {
    expand_few(pool, group, work, s, layer, i, delta, has_waited);
  });
#endif
  wait_once(has_waited);
#if DTYPE != 0
  if (leaves_expand) return;
  many.each_of_block([&](const Segment& s, int i) {
    expand_many(*(ExpandMemory<1>*)shared_memory, pool, group, work, s, layer, i, delta);
  });
#endif
}

#if DTYPE != 0 && ALIGNED
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    lora_silu_mul(Pool pool, Group group, Work work, int list, const Element* gate_up, const Element* delta, Element* out) {
  int layer = list / 4, needed_step = __ldg(pool.needed_step);
  List many(work, list, MANY_OUT), rest(work, list, REST);
  wait_for_weights(pool, layer, needed_step);
  wait_for_previous_kernel();
  let_next_kernel_start();
  many.each_of_block([&](const Segment& s, int i) {
    silu_mul_many(*(ExpandMemory<2>*)shared_memory, pool, group, work, s, layer, i, gate_up, out);
  });
  rest.each_of_warp([&](const Segment& s, int i) { silu_mul_rest(group, s, i, gate_up, delta, out); });
}
#endif

#if HAS_CLUSTER
extern "C" __global__ void __launch_bounds__(TEAM_THREADS, 1)
    lora_cluster(Pool pool, Group group, Work work, int list, const Element* x, Element* delta) {
  let_next_kernel_start();
  run_units(*(ClusterMemory*)shared_memory, pool, group, work, list, x, delta);
}
#endif
