// The work of a step's LoRA: what the segments of a layer group need, and which item is whose.
//
// A layer group is qkv, o, gate_up or down of one layer: `num_modules` linears on the same x [rows, in], with outputs
// side by side in delta [rows, out]. A's rows of all its modules, one after the other, are its `ranks` rows, in `tiles`
// of 16. A segment has *many* rows if it has more than the step says, or where there are clusters, a module of more ranks
// than a unit may have, else *few*. Items are worth a warp's while, and their number follows from (in, out, ranks, rows of
// the segment) alone:
//   few       8 rows x one tile x chunk_columns of x
//   few_out   8 rows x all ranks of a module x item_columns of delta
//   many      SHRINK_ROWS rows x up to MANY_TILES tiles x sum_chunks chunks
//   many_out  EXPAND_ROWS rows x all ranks of a module x item_columns of delta
// Shrinking leaves partial sums, one for each chunk (few) or sum_chunks of them (many); expanding adds them in order.
// Where there are clusters, units of 8 rows take the place of the items of few rows, and sums are added in a binary tree.
// In a group whose consumer expands, a many_out item is EXPAND_ROWS rows x SILU_COLUMNS of its output, and those of
// segments of few rows are
//   rest      8 rows x SILU_COLUMNS
#pragma once

#include "element.cuh"
#include "lora_memory.cuh"
#include "swap_in.cuh"

#define THREADS 256
#define WARPS 8
#define BLOCKS_PER_SM 2
#define MAX_SEGMENTS 1024
#define SHRINK_ROWS 128
#define EXPAND_ROWS 64
#define EXPAND_STAGES 3
#define SUM_CHUNKS 4 // sum_chunks at most; steps of fewer rows have 1 or 2, for more items, and as many more sums a row
#define MANY_TILES 3
#define SILU_COLUMNS 1024
#define OUT_COLUMNS 2048 // of a many_out item in large steps, else a quarter
#define RANK_BLOCK 64 // ranks whose sums a warp expands together
// Blocks of a cluster do all of a unit (lora_cluster.cuh) where they have the shared memory for it: not on sm_120.
#define HAS_CLUSTER (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 && DTYPE != 0 && ALIGNED)
#define TEAM_WARPS 8    // of a block
#define TEAM_THREADS (TEAM_WARPS * 32)
#define LEAVES 16       // chunks of the columns of x
#define UNIT_RANKS 256  // at most, of all modules of a unit
#define ALL_MODULES 3
#define MAX_BLOCKS 256  // of all clusters
#define UNIT_OVERHEAD 24 // what a unit costs beside its weights, in 1024 elements of them that a block reads meanwhile
#define MODULE_WORDS 12
#define NUM_MODULES 7
#if HAS_CLUSTER
enum { MANY, MANY_OUT, REST, NUM_LISTS };
#else
enum { MANY, MANY_OUT, REST, FEW, FEW_OUT, NUM_LISTS };
#endif

struct Pool {
  const char* pages;        // [num_pages, page_bytes]
  long long page_bytes;
  const int* modules;       // [max_adapters, layers * 7, 12]: docs/architecture.md
  const int* adapter_pages; // [max_adapters, max_adapter_pages]
  int max_adapter_pages;
  int num_layers;
  const u64* arrived;       // written by the copy engine: step << 32 | n: of a step's swap-ins the first n layers, and all before
  const int* needed_step;   // of the plan: whose swap-ins the step needs; 0: none that may not have arrived
};

struct Group {
  int in;
  int first_module;
  int num_modules;
  int out[3];     // of each module
  int out_stride; // of delta: their sum
};

// Rows at equal distances: row i < split at first + i * stride, further ones at next + (i - split) * stride.
struct Rows {
  const char* first;
  const char* next;
};

struct SegmentModule {
  int rank;
  float scale;
  int b_split;
  int first_rank; // of A's rows of the group
  Rows b;
};

struct alignas(16) Segment {
  int first_row;
  int num_rows;
  int adapter; // descriptor row, or -1
  short is_far;      // rows lie in more pages than `Rows` can say: look each up in the descriptor
  short out_columns; // of a many_out item
  int ranks;
  int a_split;
  int sum_chunks; // of many rows: chunks that a partial sum is over; 0: few rows
  int sums_stride; // from the sums of a row to the next one's
  Rows a; // of all modules
  SegmentModule modules[3];

  __device__ __forceinline__ bool is_many() const { return sum_chunks; }
  __device__ __forceinline__ int tiles() const { return (ranks + 15) / 16; }

  // That a block takes together: x is read once for them.
  __device__ __forceinline__ int tiles_at_once() const { return tiles() == 4 ? 2 : tiles() < MANY_TILES ? tiles() : MANY_TILES; }
};

// What clusters do, largest first: segment + MAX_SEGMENTS * (module or ALL_MODULES + 4 * (row / 8)).
struct UnitList {
  int count;
  int team_size; // blocks that share a unit
  int ids[1];    // count of them
};

// Where a team's `turn`th unit stands in the list. Units are ordered by their bytes: forth and back, all teams get as much.
__device__ __forceinline__ int place_of(int team, int turn, int num_teams) {
  return turn * num_teams + (turn % 2 ? num_teams - 1 - team : team);
}

// How a block of a cluster begins: its first two units, or -1, and the segment of the first.
struct alignas(16) Start {
  int ids[2];
  int team_size; // as in UnitList
  int count;
  Segment segment;
};

struct alignas(16) Totals {
  int segments, leaves_expand, items[NUM_LISTS];
};

struct Work {
  Totals* totals;    // [layers * 4]
  int* ends;         // [layers * 4, NUM_LISTS, max_segments]: items of a list up to and with each segment
  Segment* segments; // [layers * 4, max_segments]
  float* sums;       // [rows, sums_stride * SUM_CHUNKS / sum_chunks]: partial sums [chunks, tiles * 16] of a row
  int* unit_lists;   // [layers * 4, 2 + max_units]
  Start* starts;     // [layers * 4, MAX_BLOCKS]
  int max_segments;
  int sums_stride;
  int max_units;

  __device__ __forceinline__ UnitList* units(int list) const {
    return (UnitList*)(unit_lists + (long long)list * (2 + max_units));
  }
};

// Of a whole block, before it reads weights of `layer`. `needed_step` is what lies at the pool's, read early: a kernel of a
// recorded graph must ask, whether or not there is something to wait for. PageCopies says why the wait ends.
__device__ __forceinline__ void wait_for_weights(const Pool& pool, int layer, int needed_step) {
  if (!needed_step) return;
  if (threadIdx.x == 0) wait_for_value(pool.arrived, (u64)(u32)needed_step << 32 | (layer + 1));
  __syncthreads();
  fence_bulk_copies();
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Bytes from one row of an adapter's image to the next.
__device__ __forceinline__ int row_bytes(int elements) { return (elements * (int)sizeof(Element) + 15) / 16 * 16; }

// Columns of x that one partial sum covers: a leaf's, or more where there are more ranks, which keeps a row's sums few.
__device__ __forceinline__ int chunk_columns(int in, int tiles) {
  return HAS_CLUSTER ? ceil_div(in, LEAVES * 32) * 32 : (in > 8192 ? 512 : 256) * max(1, ceil_div(tiles, 4));
}

// Columns of delta that an item takes: of few rows, about 8 KB of weights.
__device__ __forceinline__ int item_columns(const Segment& s, int rank) {
  return s.is_many() ? s.out_columns : rank <= 16 ? 256 : rank <= 32 ? 128 : 64;
}

// Row i of a module's A (words 2..6 of its descriptor) or B (7..11), wherever it lies.
__device__ __noinline__ const char* far_row(const int* words, const int* pages, const char* pool, long long page_bytes, int i) {
  int page = words[0], offset = words[1], row_bytes = words[2], rows_first = words[3], rows_per_page = words[4];
  int beyond = i - rows_first;
  if (beyond >= 0) {
    page += 1 + beyond / rows_per_page;
    i = beyond % rows_per_page;
    offset = 0;
  }
  return pool + pages[page] * page_bytes + offset + (long long)i * row_bytes;
}

__device__ __forceinline__ const char* far_row(const Pool& pool, int adapter, int module, int which, int i) {
  const int* words = pool.modules + ((long long)adapter * pool.num_layers * NUM_MODULES + module) * MODULE_WORDS + which;
  return far_row(words, pool.adapter_pages + (long long)adapter * pool.max_adapter_pages, pool.pages, pool.page_bytes, i);
}

__device__ __forceinline__ const char* near_row(const Rows& rows, int split, int stride, int i) {
  return i < split ? rows.first + (long long)i * stride : rows.next + (long long)(i - split) * stride;
}

// All of a segment at once: one wait instead of several.
__device__ __forceinline__ Segment load_segment(const Segment* from) {
  union {
    Segment segment;
    int4 parts[sizeof(Segment) / 16];
  } to;
#pragma unroll
  for (int i = 0; i < sizeof(Segment) / 16; i++) to.parts[i] = __ldg((const int4*)from + i);
  return to.segment;
}

// Of a whole warp: the segment of item `i` of a list of `n` <= 1024 segments' ends; `i` becomes its place among the segment's.
__device__ __forceinline__ int find_segment(const int* ends, int n, int& i) {
  int lane = threadIdx.x % 32, stride = ceil_div(n, 32), first = 0;
  if (stride > 1) {
    int place = lane * stride + stride - 1;
    first = stride * __popc(__ballot_sync(~0u, place < n && __ldg(ends + min(place, n - 1)) <= i));
  }
  int place = first + lane, width = stride > 1 ? stride : 32;
  int end = __ldg(ends + min(place, n - 1)), before = 0;
  int count = __popc(__ballot_sync(~0u, lane < width && place < n && end <= i));
  if (count > 0) before = __shfl_sync(~0u, end, count - 1);
  else if (first > 0) before = __ldg(ends + first - 1);
  i -= before;
  return first + count;
}
