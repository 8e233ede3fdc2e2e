// Shrink and expand in one kernel, for segments of few rows: a team, one block of a cluster or both, takes a unit of 8 rows.
//
// The columns of x are cut into LEAVES chunks, whose sums are added in a binary tree. Each warp of a team has one leaf or
// two; its block adds up its warps' sums through shared memory and stores them to the other block of the team, and each adds
// up both: the same tree, whether a team has one block or two. Then each warp expands every n-th 256 columns of the output.
// Nothing but delta is written to memory, and no fence waits for what is on its way from it.
//
// Weights come through stages in shared memory, 16 rows of 512 bytes each, by bulk copies: an SM begins one in about 10 cycles.
// Each warp has two stages to itself and fills one while it uses the other. Stages are asked for in the order of their use,
// across tiles, phases and units, so that copies are on their way while warps wait for each other.
#pragma once

#include "cluster.cuh"
#include "lora_expand.cuh"
#include "lora_shrink.cuh"

#if HAS_CLUSTER
#define STAGE_COLUMNS 256
#define A_STRIDE (STAGE_COLUMNS * 2 + 64) // bytes from row to row: lanes read from different banks
#define B_STRIDE (STAGE_COLUMNS * 2 + 32)
#define V_STRIDE (UNIT_RANKS + 4)
#define ROUND 4 // tiles whose sums are exchanged together

struct ClusterMemory {
  u64 full[TEAM_WARPS][2];                       // a warp's stages
  u64 arrived[2];                                // the other block's sums
  float v[8 * V_STRIDE];                         // [row, rank]: the sums over all columns
  float sums[2][CLUSTER][ROUND * 16 * 8];        // [rank, row]: over each block's columns; rounds take turns
  float partial[TEAM_WARPS][ROUND * 16 * 8];     // [rank, row]: over a warp's columns
  Segment asked[TEAM_WARPS], used[TEAM_WARPS];   // of the unit whose stages are asked for, used
  alignas(128) char stages[TEAM_WARPS][2][16 * A_STRIDE];
};

// The blocks of a cluster as teams of `size` blocks.
struct Team {
  int size, num_teams, index; // of all teams
  int member, num_warps;      // the warp's place in its team
  int leaves;                 // of a warp
  int ids[2], count;          // the first two units; how many there are for all teams

  __device__ __forceinline__ Team(const Start& start, int block) {
    int4 numbers = __ldg((const int4*)&start);
    ids[0] = numbers.x, ids[1] = numbers.y, size = numbers.z, count = numbers.w;
    num_teams = gridDim.x / size, index = blockIdx.x / size;
    member = block % size * TEAM_WARPS + threadIdx.x / 32, num_warps = size * TEAM_WARPS, leaves = CLUSTER / size;
  }

  // The team's `turn`th unit, or -1.
  __device__ __forceinline__ int unit_at(const UnitList* units, int turn) const {
    if (turn < 2) return turn ? ids[1] : ids[0];
    int at = place_of(index, turn, num_teams);
    return at < count ? __ldg(units->ids + at) : -1;
  }
};

// A unit, 8 rows from `row` of a segment, and all modules or one.
struct Unit {
  int first_row, num_rows, first_module, last_module, first_rank, num_ranks;

  // A lane's part of a segment.
  __device__ static __forceinline__ int4 part(const Segment* from) {
    return ((const int4*)from)[min(threadIdx.x % 32, (int)sizeof(Segment) / 16 - 1)];
  }

  // `copy`: the warp's own, in shared memory.
  __device__ __forceinline__ void load(int id, const Group& group, int4 part, Segment& copy) {
    int m = id / MAX_SEGMENTS % 4, row = id / MAX_SEGMENTS / 4 * 8, lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < (int)sizeof(Segment) / 16) ((int4*)&copy)[lane] = part;
    __syncwarp();
    first_row = copy.first_row + row, num_rows = min(8, copy.num_rows - row);
    first_module = m == ALL_MODULES ? 0 : m, last_module = m == ALL_MODULES ? group.num_modules - 1 : m;
    first_rank = copy.modules[first_module].first_rank;
    num_ranks = copy.modules[last_module].first_rank + copy.modules[last_module].rank - first_rank;
  }

  __device__ static __forceinline__ int columns(const Group& group, int m) {
    return m == 0 ? group.out[0] : m == 1 ? group.out[1] : group.out[2];
  }

  // Which module the `i`th STAGE_COLUMNS columns belong to, or -1; `i` becomes its place there.
  __device__ __forceinline__ int module_of(const Group& group, int& i) const {
    for (int m = first_module; m <= last_module; m++) {
      int n = (columns(group, m) + STAGE_COLUMNS - 1) / STAGE_COLUMNS;
      if (i < n) return m;
      i -= n;
    }
    return -1;
  }
};

// Asks for a warp's stages.
struct Feed {
  const Pool& pool;
  const Group& group;
  const UnitList* units;
  const Segment* segments;
  ClusterMemory& memory;
  const Team& team;
  int4 first; // part of the first unit's segment
  int layer, chunk;
  int next_id;            // of the unit after this one, -1: there is none
  int id = -1, turn = -1; // of this one
  Unit unit;
  int is_b = 1, run = 0;  // A: a tile's leaf; B: columns of delta
  int done = 0, size = 0; // columns of the leaf, ranks of the module; how many of them were asked for

  // Find what to ask for next; `size` is 0 if there is nothing more.
  __device__ __forceinline__ void next_run(Segment& copy) {
    done = size = 0;
    while (true) {
      run += is_b ? team.num_warps : 1;
      if (!is_b) {
        int begin = (team.member * team.leaves + (team.leaves > 1 ? run % 2 : 0)) * chunk;
        size = max(0, min(group.in - begin, chunk));
        if ((team.leaves > 1 ? run / 2 : run) * 16 >= unit.num_ranks) is_b = 1, run = team.member;
        else if (size) return;
        else continue;
      }
      int i = run, m = id >= 0 ? unit.module_of(group, i) : -1;
      if (m >= 0) {
        size = copy.modules[m].rank;
        if (size) return;
        continue;
      }
      size = 0;
      id = next_id, turn++;
      if (id < 0) return;
      next_id = team.unit_at(units, turn + 1);
      unit.load(id, group, turn ? Unit::part(segments + id % MAX_SEGMENTS) : first, copy);
      is_b = 0, run = -1;
    }
  }

  // Have stage `s` filled with STAGE_COLUMNS columns of 16 ranks of A, or of B.
  __device__ __forceinline__ void ask(int s) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Segment& copy = memory.asked[warp];
    if (done >= size && (id >= 0 || turn < 0)) next_run(copy);
    if (done >= size) return;
    const char* from;
    int rows, bytes, stride;
    bool is_b_stage = is_b;
    if (is_b) {
      int column = run, m = unit.module_of(group, column), width = Unit::columns(group, m);
      const SegmentModule& module = copy.modules[m];
      column *= STAGE_COLUMNS;
      rows = min(16, size - done), bytes = min(STAGE_COLUMNS, width - column) * 2, stride = B_STRIDE;
      int i = done + min(lane, rows - 1);
      from = copy.is_far ? far_row(pool, copy.adapter, layer * NUM_MODULES + group.first_module + m, 7, i)
                         : near_row(module.b, module.b_split, row_bytes(width), i);
      from += column * 2;
      done += 16;
    } else {
      int tile = team.leaves > 1 ? run / 2 : run, leaf = team.leaves > 1 ? run % 2 : 0;
      int column = (team.member * team.leaves + leaf) * chunk + done;
      rows = min(16, unit.num_ranks - tile * 16), bytes = min(STAGE_COLUMNS, size - done) * 2, stride = A_STRIDE;
      from = a_row(pool, group, copy, layer, unit.first_rank + tile * 16 + min(lane, rows - 1)) + column * 2;
      done += STAGE_COLUMNS;
    }
    u64* full = &memory.full[warp][s];
    __syncwarp(); // all lanes have read what was in the stage
    if (lane == 0) expect_bytes(full, rows * bytes);
    __syncwarp();
    int place = is_b_stage ? lane % 4 * 4 + lane / 4 : lane; // of B, lanes read ranks 4t .. 4t + 4 from different banks
    if (lane < rows) copy_bulk(memory.stages[warp][s] + place * stride, from, bytes, full);
  }
};

// Exchanges and adds up sums, ROUND tiles at a time.
struct Exchange {
  ClusterMemory& memory;
  const Team& team;
  int block;
  int uses = 0;     // of the two buffers
  int first, n = 0; // tiles that wait to be added up

  // Add up what the warps of this block have of tiles `first` .. `first` + `n`, and let the other block have it.
  __device__ __forceinline__ void give(int first_, int n_) {
    first = first_, n = n_;
    u64* arrived = &memory.arrived[uses % 2];
    if (threadIdx.x == 0 && team.size > 1) expect_bytes(arrived, n * 512);
    for (int e = threadIdx.x * 4; e < n * 128; e += TEAM_THREADS * 4) {
      float4 tree[TEAM_WARPS];
#pragma unroll
      for (int w = 0; w < TEAM_WARPS; w++) tree[w] = *(const float4*)(memory.partial[w] + e);
#pragma unroll
      for (int d = 1; d < TEAM_WARPS; d *= 2)
#pragma unroll
        for (int w = 0; w < TEAM_WARPS; w += 2 * d) {
          tree[w].x += tree[w + d].x, tree[w].y += tree[w + d].y;
          tree[w].z += tree[w + d].z, tree[w].w += tree[w + d].w;
        }
      float* to = memory.sums[uses % 2][team.size > 1 ? block : 0] + e;
      *(float4*)to = tree[0];
      if (team.size > 1) store_to_block(to, tree[0], arrived, 1 - block);
    }
  }

  // Wait for the other's sums of what was given last, and add up both. This block's own were stored before a __syncthreads.
  __device__ __forceinline__ void take() {
    if (!n) return;
    if (team.size > 1) wait_barrier(&memory.arrived[uses % 2], uses / 2 % 2);
    const float(*sums)[ROUND * 16 * 8] = memory.sums[uses % 2];
    for (int e = threadIdx.x; e < n * 128; e += TEAM_THREADS) {
      float total = sums[0][e];
      if (team.size > 1) total += sums[1][e];
      memory.v[e % 8 * V_STRIDE + first * 16 + e / 8] = total;
    }
    n = 0, uses++;
  }
};

// acc[16 ranks, 8 rows] += a stage of A times `columns` of x.
__device__ __forceinline__ void shrink_stage(float acc[4], const char* stage, const Element* x, int columns, u64* full, int phase) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4 v[STAGE_COLUMNS / 32];
#pragma unroll
  for (int j = 0; j < STAGE_COLUMNS / 32; j++) v[j] = load_x(x, j * 32 + t * 8, columns);
  wait_barrier(full, phase);
#pragma unroll
  for (int j = 0; j < STAGE_COLUMNS / 32; j++) {
    const char* at = stage + g * A_STRIDE + j * 64 + t * 16;
    uint4 low = *(const uint4*)at, high = *(const uint4*)(at + 8 * A_STRIDE);
    if (j * 32 + t * 8 >= columns) low = high = make_uint4(0, 0, 0, 0); // what an earlier stage left
    shrink_step(acc, low, high, v[j]);
  }
}

// acc[64 columns each, 8 rows] += a stage of B, of ranks `first` .. of `rank`, times v.
__device__ __forceinline__ void expand_stage(float acc[STAGE_COLUMNS / 64][4][4], const char* stage, const float* v, int first, int rank, float scale) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, r = first + t * 4;
  float mine[4];
#pragma unroll
  for (int i = 0; i < 4; i++) mine[i] = r + i < rank ? v[r + i] : 0.0f;
  uint4 operands = operand(mine, scale);
#pragma unroll
  for (int c = 0; c < STAGE_COLUMNS / 64; c++) {
    uint4 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w[i] = *(const uint4*)(stage + (i * 4 + t) * B_STRIDE + c * 128 + g * 16);
      if (r + i >= rank) w[i] = make_uint4(0, 0, 0, 0); // what an earlier stage left
    }
    expand_step(acc[c], w, operands);
  }
}

__device__ __forceinline__ void run_units(ClusterMemory& memory, const Pool& pool, const Group& group, const Work& work, int list,
                                          const Element* x, Element* delta) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, block = cluster_rank();
  const Start& start = work.starts[list * MAX_BLOCKS + blockIdx.x];
  int4 first = Unit::part(&start.segment);
  Team team(start, block);
  if (threadIdx.x < TEAM_WARPS * 2 + 2) init_barrier(memory.full[0] + threadIdx.x); // `arrived` follows `full`
  arrive_in_cluster();
  const UnitList* units = work.units(list);
  const Segment* segments = work.segments + (long long)list * work.max_segments;
  int chunk = chunk_columns(group.in, 0), stage = 0, phases = 0;
  Feed feed = {pool, group, units, segments, memory, team, first, list / 4, chunk, team.unit_at(units, 0)};
  Exchange exchange = {memory, team, block};
  __syncthreads();
#pragma unroll 1
  for (int s = 0; s < 2; s++) feed.ask(s);
  wait_for_previous_kernel();
  wait_for_cluster();
  auto next_stage = [&] { // the stage in use may be filled anew, the other one is next
    feed.ask(stage);
    phases ^= 1 << stage, stage = 1 - stage;
  };

  int id = team.unit_at(units, 0);
  for (int turn = 0; id >= 0; turn++) {
    Segment& segment = memory.used[warp];
    Unit unit;
    bool is_asked = feed.turn == turn && feed.id >= 0;
    unit.load(id, group, Unit::part(is_asked ? &memory.asked[warp] : segments + id % MAX_SEGMENTS), segment);
    id = team.unit_at(units, turn + 1);
    const Element* x_row = x + (long long)(unit.first_row + min(g, unit.num_rows - 1)) * group.in;
    int tiles = ceil_div(unit.num_ranks, 16);
    for (int first = 0; first < tiles; first += ROUND) {
      int n = min(ROUND, tiles - first);
      for (int tile = 0; tile < n; tile++) {
        float total[4] = {};
        for (int leaf = 0; leaf < team.leaves; leaf++) {
          int begin = (team.member * team.leaves + leaf) * chunk, end = min(group.in, begin + chunk);
          float acc[4] = {};
          for (int k = begin; k < end; k += STAGE_COLUMNS) {
            u64* full = &memory.full[warp][stage];
            shrink_stage(acc, memory.stages[warp][stage], x_row + k, end - k, full, phases >> stage & 1);
            next_stage();
          }
#pragma unroll
          for (int e = 0; e < 4; e++) total[e] = leaf ? total[e] + acc[e] : acc[e];
        }
        float* to = memory.partial[warp] + (tile * 16 + g) * 8 + t * 2;
        *(float2*)to = make_float2(total[0], total[1]);
        *(float2*)(to + 64) = make_float2(total[2], total[3]);
      }
      __syncthreads();
      exchange.take();
      if (first) __syncthreads(); // all have taken: the other block may use that buffer once it has what is given now
      exchange.give(first, n);
      if (first + ROUND < tiles) __syncthreads();
    }
    __syncthreads();
    exchange.take();
    __syncthreads();
    for (int i = team.member;; i += team.num_warps) {
      int column = i, m = unit.module_of(group, column);
      if (m < 0) break;
      int rank = segment.modules[m].rank, first_column = (m > 0 ? group.out[0] : 0) + (m > 1 ? group.out[1] : 0);
      const float* v = memory.v + g * V_STRIDE + segment.modules[m].first_rank - unit.first_rank;
      float acc[STAGE_COLUMNS / 64][4][4] = {};
      for (int r = 0; r < rank; r += 16) {
        wait_barrier(&memory.full[warp][stage], phases >> stage & 1);
        expand_stage(acc, memory.stages[warp][stage], v, r, rank, segment.modules[m].scale);
        next_stage();
      }
      Element* to = delta + (long long)(unit.first_row + t * 2) * group.out_stride + first_column;
#pragma unroll
      for (int c = 0; c < STAGE_COLUMNS / 64; c++)
        store_columns(to, group.out_stride, unit.num_rows - t * 2, column * STAGE_COLUMNS + c * 64 + g * 8,
                      Unit::columns(group, m), acc[c]);
    }
  }
}
#endif
