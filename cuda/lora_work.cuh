// The work of a step's LoRA: what the segments of a layer group need, and which item is whose.
//
// A layer group is qkv, o, gate_up or down of one layer: `num_modules` linears on the same x [rows, in], with outputs
// side by side in delta [rows, out]. A's rows of all its modules, one after the other, are its `ranks` rows, in `tiles`
// of 16. Items are worth a warp's while, and their number follows from (in, out, ranks, rows of the segment) alone:
//   few   <= MANY_ROWS rows: 8 rows x one tile x one chunk of columns
//   many  more rows: 16 rows x two tiles x SUM_CHUNKS chunks
//   out   8 rows (few) or EXPAND_ROWS (many) x a module's B, 64 columns at a time, all ranks
// Shrinking leaves partial sums, one for each chunk (few) or SUM_CHUNKS of them (many); expanding adds them in order.
#pragma once

#include "element.cuh"

#define MANY_ROWS 64
#define EXPAND_ROWS 64
#define SUM_CHUNKS 4
#define MODULE_WORDS 12
#define NUM_MODULES 7
enum { FEW, MANY, OUT, NUM_LISTS };

struct Pool {
  const char* pages;        // [num_pages, page_bytes]
  long long page_bytes;
  const int* modules;       // [max_adapters, layers * 7, 12]: docs/architecture.md
  const int* adapter_pages; // [max_adapters, max_adapter_pages]
  int max_adapter_pages;
  int num_layers;
};

struct Group {
  int in;
  int first_module;
  int num_modules;
  int out[3];     // of each module
  int out_stride; // of delta: their sum
};

// `rank` rows at equal distances in one page and the next, or (is_far) in more pages than that.
struct Rows {
  const char* first; // the first row
  const char* next;  // row rows_first
};

struct SegmentModule {
  int rank;
  float scale;
  int a_rows_first;
  int b_rows_first;
  Rows a, b;
};

struct alignas(16) Segment {
  int first_row;
  int num_rows;
  int adapter; // descriptor row, or -1
  int is_far;
  int tiles;
  int chunk; // columns
  int ranks;
  int unused;
  SegmentModule modules[3];
};

struct Work {
  int4* totals;      // [layers * 4]: segments, then the items of each list
  int* ends;         // [layers * 4, NUM_LISTS, max_segments]: items of a list up to and with each segment
  Segment* segments; // [layers * 4, max_segments]
  float* sums;       // [rows, sums_stride]: partial sums [chunk, tiles * 16] of a row
  int max_segments;
  int sums_stride;
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Bytes from one row of an adapter's image to the next.
__device__ __forceinline__ int row_bytes(int elements) { return (elements * (int)sizeof(Element) + 15) / 16 * 16; }

// Columns of x that one partial sum covers: what keeps 64 ranks' sums of a row within in / 4 floats.
__device__ __forceinline__ int chunk_columns(int in, int tiles) {
  return (in > 8192 ? 512 : 256) * max(1, ceil_div(tiles, 4));
}

// How many times 64 columns an OUT item takes: about 64 ranks' worth of bytes.
__device__ __forceinline__ int expand_steps(int rank) { return max(1, 8 / max(1, ceil_div(rank, 8))); }

__device__ __forceinline__ bool is_many(int num_rows) { return DTYPE != 0 && num_rows > MANY_ROWS; }

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

__device__ __forceinline__ const char* near_row(const Rows& rows, int rows_first, int bytes, int i) {
  return i < rows_first ? rows.first + (long long)i * bytes : rows.next + (long long)(i - rows_first) * bytes;
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
