// A linear layer of few rows in the time that its weights take to be read: y[rows, out] = x[rows, in] W[out, in]ᵀ + bias
// of up to 16 rows; 16-bit types, fp32 sums; in % 32 = 0, out % 8 = 0 (sm_90 and newer).
//
// Rows of x are the 16 rows of mma.sync's first operand, and a unit of 8 features the columns of the second. A block takes
// units that lie side by side, by groups; its warps share the columns, each takes every WARPS-th piece of PIECE. What it has
// of a piece of x stays in registers for all units of a group.
//
// Weights come by bulk copies into stages of UNIT x PIECE that each warp owns, and asks for in the order of their use across
// units, pieces and groups: no barrier of the block keeps memory waiting. Nobody writes weights while steps run, so the first
// stages are filled while the kernel before this one runs.
//
// The order of columns within 32 is permuted alike in both operands, so that both are read 16 bytes at a time. The order of
// sums depends on `in` only: not on other rows, the features of a block, or the device.
#include "cluster.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "sync.cuh"

#define ROWS 16
#define UNIT 8    // features
#define PIECE 256 // columns
#define WARPS 4
#define THREADS (WARPS * 32)
#define GROUP 8                // units, at most
#define STEPS (PIECE / 32)     // of 32 columns
#define STRIDE (PIECE * 2 + 64) // bytes from feature to feature: lanes read from different banks
#ifndef STAGES
#define STAGES 5 // of a warp: two blocks fit a multiprocessor, this kernel's and the next one's
#endif

#if __CUDA_ARCH__ >= 900
struct Memory {
  u64 full[WARPS][STAGES];
  float4 sums[WARPS][GROUP * 32]; // each lane's of each unit, over its warp's columns
  alignas(16) char stages[WARPS][STAGES][UNIT * STRIDE];
};

struct Linear {
  const Element *x, *weights, *bias; // bias may be nullptr
  Element* y;
  int rows, in, out;
};

// Asks for a warp's stages.
struct Feed {
  const Element* weights;
  int in, end, warp;      // of the block's units
  int group, unit, piece; // the next one; there is none if `group` is `end`

  __device__ __forceinline__ void ask(char* stage, u64* full) {
    if (group >= end) return;
    __syncwarp(); // all lanes have read what was in the stage
    if (is_elected()) {
      int column = piece * PIECE, bytes = min(PIECE, in - column) * 2;
      const Element* from = weights + (long long)(unit * UNIT) * in + column;
      expect_bytes(full, UNIT * bytes);
#pragma unroll
      for (int i = 0; i < UNIT; i++, from += in) copy_bulk(stage + i * STRIDE, from, bytes, full);
    }
    if (++unit < min(end, group + GROUP)) return;
    unit = group, piece += WARPS;
    if (piece * PIECE < in) return;
    unit = group += GROUP, piece = warp;
  }
};

// A lane's part of a piece of x: 8 of every 32 columns of rows g and g + 8.
struct Rows {
  uint4 low[STEPS], high[STEPS];

  __device__ __forceinline__ void load(const Linear& linear, int piece) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Element* at = linear.x + (long long)g * linear.in + piece * PIECE + t * 8;
#pragma unroll
    for (int j = 0; j < STEPS; j++, at += 32) {
      bool is_inside = piece * PIECE + j * 32 < linear.in;
      low[j] = load_if(is_inside && g < linear.rows, at);
      high[j] = load_if(is_inside && g + 8 < linear.rows, at + 8LL * linear.in);
    }
  }
};

// A lane's part of a stage: 8 of every 32 columns of feature g. Of its columns, `columns` are filled.
struct Weights {
  uint4 at[STEPS];

  __device__ __forceinline__ void load(const char* stage, int columns) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < STEPS; j++) at[j] = *(const uint4*)(stage + lane / 4 * STRIDE + j * 64 + lane % 4 * 16);
    if (columns >= PIECE) return;
#pragma unroll
    for (int j = 0; j < STEPS; j++)
      if (j * 32 >= columns) at[j] = make_uint4(0, 0, 0, 0); // what an earlier use left
  }
};

// sum[16 rows, 8 features] += x times weights: four products at a time, since each waits for the one that it adds to.
__device__ __forceinline__ float4 multiply(float4 sum, const Rows& x, const Weights& w) {
  float part[4][4] = {{sum.x, sum.y, sum.z, sum.w}};
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    mma_16(part[j % 2 * 2], x.low[j].x, x.high[j].x, x.low[j].y, x.high[j].y, w.at[j].x, w.at[j].y);
    mma_16(part[j % 2 * 2 + 1], x.low[j].z, x.high[j].z, x.low[j].w, x.high[j].w, w.at[j].z, w.at[j].w);
  }
#pragma unroll
  for (int e = 0; e < 4; e++) part[0][e] = part[0][e] + part[1][e] + (part[2][e] + part[3][e]);
  return make_float4(part[0][0], part[0][1], part[0][2], part[0][3]);
}

// Add up what the warps have of `count` units from `first` on.
__device__ __forceinline__ void store_sums(const Memory& memory, const Linear& linear, int first, int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count * 32; i += THREADS) {
    float4 sum = memory.sums[0][i];
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
      float4 other = memory.sums[w][i];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    int row = i % 32 / 4, feature = (first + i / 32) * UNIT + i % 4 * 2;
    if (linear.bias) {
      u32 pair = *(const u32*)(linear.bias + feature);
      float low = unpack_low(pair), high = unpack_high(pair);
      sum.x += low, sum.y += high, sum.z += low, sum.w += high;
    }
    u32* to = (u32*)(linear.y + (long long)row * linear.out + feature);
    if (row < linear.rows) *to = pack(sum.x, sum.y);
    if (row + 8 < linear.rows) to[4LL * linear.out] = pack(sum.z, sum.w);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    few_rows(const Element* x_rows, const Element* weights, const Element* bias, Element* y, int rows, int in, int out) {
  let_next_kernel_start();
  Linear linear = {x_rows, weights, bias, y, rows, in, out};
  Memory& memory = *(Memory*)shared_memory;
  // What all lanes get from one is known to be the same: addresses of copies are made once for a warp.
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, units = out / UNIT;
  int begin = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + 1) / gridDim.x;
  u64* full = memory.full[warp];
  if (lane < STAGES) init_barrier(full + lane);
  bool has_columns = warp * PIECE < in;
  Feed feed = {weights, in, end, warp, has_columns ? begin : end, begin, warp};
#pragma unroll 1
  for (int s = 0; s < STAGES; s++) feed.ask(memory.stages[warp][s], full + s);
  wait_for_previous_kernel();

  Rows x, next;
  next.load(linear, warp);
  int stage = 0, parity = 0;
  for (int group = begin; group < end; group += GROUP) {
    int count = min(GROUP, end - group);
#pragma unroll 1
    for (int unit = 0; unit < count; unit++) memory.sums[warp][unit * 32 + lane] = make_float4(0, 0, 0, 0);
    for (int piece = warp; piece * PIECE < in; piece += WARPS) {
      x = next;
      next.load(linear, (piece + WARPS) * PIECE < in ? piece + WARPS : warp); // the next group's are the same
#pragma unroll 1
      for (int unit = 0; unit < count; unit++) {
        float4 sum = memory.sums[warp][unit * 32 + lane];
        Weights w;
        wait_barrier(full + stage, parity);
        w.load(memory.stages[warp][stage], in - piece * PIECE);
        feed.ask(memory.stages[warp][stage], full + stage);
        memory.sums[warp][unit * 32 + lane] = multiply(sum, x, w);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    __syncthreads();
    store_sums(memory, linear, group, count);
    __syncthreads(); // the sums may be written anew
  }
}
#endif
