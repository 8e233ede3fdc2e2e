// A linear layer of few rows in the time that its weights take to be read: y[rows, out] = x[rows, in] W[out, in]ᵀ + bias
// of up to 16 rows; 16-bit types, fp32 sums; in % 64 = 0, out % 8 = 0 (sm_90 and newer).
//
// Rows of x are the 16 rows of mma.sync's first operand, and a unit of 8 features the columns of the second. A block takes
// units that lie side by side, by groups; its warps share the columns, each takes every WARPS-th piece of PIECE. What it has
// of a piece of x stays in registers for all units of a group.
//
// Weights come by bulk copies into stages of UNIT x PIECE that each warp owns, and asks for in the order of their use across
// units, pieces and groups: no barrier of the block keeps memory waiting. Nobody writes weights while steps run, so the first
// stages are filled while the kernel before this one runs.
//
// The order of columns is permuted alike in both operands, so that both are read 16 bytes at a time. The order of sums
// depends on `in` only: not on other rows, the features of a block, or the device.
#include "cluster.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "sync.cuh"

#define ROWS 16
#define UNIT 8             // features
#define PIECE (4 * LINE)   // columns
#define STEPS (PIECE / 32) // of 32 columns
#define THREADS (WARPS * 32)

// WARPS, STAGES of a warp, GROUP units at most; IS_AHEAD: a piece of x is loaded while the one before is used; FAR pieces
// that a warp needs after its first stages are brought to L2 while the kernel waits for x.
#ifndef WARPS
#define WARPS 8
#define STAGES 3
#define GROUP 4
#define IS_AHEAD 0
#define FAR 0
#endif

#if __CUDA_ARCH__ >= 900
struct Memory {
  alignas(SWIZZLE_BYTES) u16 stages[WARPS][STAGES][UNIT * PIECE];
  float4 sums[WARPS][GROUP * 32]; // each lane's of each unit, over its warp's columns
  u64 full[WARPS][STAGES];
};

struct Linear {
  const Element *x, *bias; // bias may be nullptr
  Element* y;
  int rows, in, out;
};

// A warp's way through its pieces of weights.
struct Walk {
  int in, end, warp;      // `end` of the block's units
  int group, unit, piece; // the next one; there is none if `group` is `end`

  __device__ __forceinline__ bool is_over() const { return group >= end; }

  __device__ __forceinline__ void next() {
    if (++unit < min(end, group + GROUP)) return;
    unit = group, piece += WARPS;
    if (piece * PIECE < in) return;
    unit = group += GROUP, piece = warp;
  }
};

// Have a stage filled with the next piece, if there is one. A stage that was used is asked for as soon as what was read of it
// has been computed with: a load may wait in line behind others for longer than a copy takes.
//
// With a block's last request the next kernel may start: its own first requests then follow this kernel's, and keep memory
// busy while the results are added up and x of the next kernel is on its way.
__device__ __forceinline__ void ask(Walk& walk, const TileMap& weights, u16* stage, u64* full) {
  if (walk.is_over()) return;
  __syncwarp(); // all lanes have read what was in the stage
  if (is_elected()) {
    expect_bytes(full, UNIT * PIECE * 2);
    copy_tile<UNIT, PIECE / LINE>(stage, weights, walk.unit * UNIT, walk.piece * (PIECE / LINE), full);
  }
  walk.next();
  if (walk.is_over()) let_next_kernel_start();
}

// A lane's part of a piece of x: 8 of every 32 columns of rows g and g + 8. Which 8 is the lane's that reads the same of a
// stage: see `multiply`. In place of a row that is not there is the last one.
struct Rows {
  uint4 low[STEPS], high[STEPS];

  __device__ __forceinline__ void load(const Linear& linear, int piece) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Element* low_row = linear.x + (long long)min(g, linear.rows - 1) * linear.in;
    const Element* high_row = linear.x + (long long)min(g + 8, linear.rows - 1) * linear.in;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      int column = piece * PIECE + j * 32;
      column = (column < linear.in ? column : 0) + (t ^ j / 2) * 8;
      low[j] = load_once(low_row + column), high[j] = load_once(high_row + column);
    }
  }
};

// The same as operands of products, zeros from column `size` of the piece on. What is masked is put where products want it,
// once; what is only loaded would be moved there for each unit.
struct Operands {
  u32 at[STEPS][8];

  __device__ __forceinline__ void set(const Rows& x, int size) {
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
      u32 mask = j * 32 < size ? ~0u : 0;
      uint4 low = x.low[j], high = x.high[j];
      at[j][0] = low.x & mask, at[j][1] = high.x & mask, at[j][2] = low.y & mask, at[j][3] = high.y & mask;
      at[j][4] = low.z & mask, at[j][5] = high.z & mask, at[j][6] = low.w & mask, at[j][7] = high.w & mask;
    }
  }
};

// sum[16 rows, 8 features] += x times a stage: four products at a time, since each waits for the one that it adds to.
//
// A stage is [8 features][4 lines of 64 columns], whose 16 bytes i of line n are at i ^ n % 8 of it. So in step j, of line
// j / 2, lane 4g + t finds 16 bytes of feature g at place t ^ j / 2 of a half line, if it reads from place t: all features
// the same columns, and 8 lanes from all banks.
__device__ __forceinline__ float4 multiply(float4 sum, const Operands& x, const u16* stage) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const char* even = (const char*)stage + g * PIECE * 2 + g % 2 * 64 + t * 16;
  const char* odd = (const char*)stage + g * PIECE * 2 + (1 - g % 2) * 64 + t * 16;
  float part[4][4] = {{sum.x, sum.y, sum.z, sum.w}};
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    uint4 w = *(const uint4*)((j % 2 ? odd : even) + j / 2 * LINE * 2);
    const u32* a = x.at[j];
    mma_16(part[j % 2 * 2], a[0], a[1], a[2], a[3], w.x, w.y);
    mma_16(part[j % 2 * 2 + 1], a[4], a[5], a[6], a[7], w.z, w.w);
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

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    few_rows(const __grid_constant__ TileMap weights, const Element* x_rows, const Element* bias, Element* y, int rows, int in,
             int out) {
  Linear linear = {x_rows, bias, y, rows, in, out};
  Memory& memory = *(Memory*)shared_memory;
  // The compiler knows that all lanes get the same from one: what copies need is computed once for a warp.
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, units = out / UNIT;
  int begin = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + 1) / gridDim.x;
  u64* full = memory.full[warp];
  if (lane < STAGES) init_barrier(full + lane);
  bool has_columns = warp * PIECE < in;
  Walk walk = {in, end, warp, has_columns ? begin : end, begin, warp};
#pragma unroll 1
  for (int s = 0; s < STAGES; s++) ask(walk, weights, memory.stages[warp][s], full + s);
  Walk later = walk;
#pragma unroll 1
  for (int i = 0; i < FAR && !later.is_over(); i++, later.next())
    if (is_elected()) prefetch_tile(weights, later.unit * UNIT, later.piece * (PIECE / LINE));
  wait_for_previous_kernel();

  Rows next;
  Operands x;
  int stage = 0, parity = 0;
  if (IS_AHEAD && has_columns) next.load(linear, warp), x.set(next, in - warp * PIECE);
  for (int group = begin; group < end; group += GROUP) {
    int count = min(GROUP, end - group);
#pragma unroll 1
    for (int unit = 0; unit < count; unit++) memory.sums[warp][unit * 32 + lane] = make_float4(0, 0, 0, 0);
    for (int piece = warp; piece * PIECE < in; piece += WARPS) {
      int next_piece = (piece + WARPS) * PIECE < in ? piece + WARPS : warp; // this group's or the next one's
      next.load(linear, IS_AHEAD ? next_piece : piece);
      if (!IS_AHEAD) x.set(next, in - piece * PIECE);
#pragma unroll 1
      for (int unit = 0; unit < count; unit++) {
        float4& sum = memory.sums[warp][unit * 32 + lane];
        wait_barrier(full + stage, parity);
        sum = multiply(sum, x, memory.stages[warp][stage]);
        ask(walk, weights, memory.stages[warp][stage], full + stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      if (IS_AHEAD) x.set(next, in - next_piece * PIECE);
    }
    __syncthreads();
    store_sums(memory, linear, group, count);
    __syncthreads(); // the sums may be written anew
  }
}
#endif
