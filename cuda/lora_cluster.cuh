// Shrink and expand in one kernel, for segments of few rows: a team of 1, 2, 4 or 8 blocks of a cluster takes a unit of 8 rows.
//
// The columns of x are cut into LEAVES chunks, whose sums are added in a binary tree. Pairs of blocks take every n-th tile
// of 16 ranks: each of a pair's 16 warps has a leaf, its block adds up its 8 through shared memory and stores them to all
// blocks of the team, and each adds up both halves. A team of one block has all tiles, and two leaves a warp: the same
// tree. Then each warp expands every n-th 256 columns of the output. Nothing but delta is written to memory, and no fence
// waits for what is on its way from it.
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
#define TILE (16 * 8) // sums of a tile
#define ROUND 4       // tiles that a block adds up and sends together

struct ClusterMemory {
  u64 full[TEAM_WARPS][2];                       // a warp's stages
  u64 arrived[2];                                // the other blocks' sums
  alignas(16) float mark[4];                     // where their marks go; never read
  float sums[2][2][UNIT_RANKS * 8];              // [half of the columns, place_of_rank, row]; units take turns
  float partial[TEAM_WARPS][ROUND * TILE];       // [rank, row]: over a warp's columns
  Segment asked[TEAM_WARPS], used[TEAM_WARPS];   // of the unit whose stages are asked for, used
  alignas(128) char stages[TEAM_WARPS][2][16 * A_STRIDE];
};

// Where the sums of a rank begin: those of neighbours, and of ranks 4 apart, lie in different banks.
__device__ __forceinline__ int place_of_rank(int rank) { return rank / 4 * 32 + (rank + rank / 4) % 4 * 8; }

// The blocks of all clusters as teams of `size` blocks, and what of a unit is a warp's.
struct Team {
  int size, num_teams, index; // of all teams
  int place, num_pairs;       // the block's in its team; of blocks that share tiles
  int first_leaf, leaves;     // of a tile
  int ids[2], count;          // the first two units; how many there are for all teams

  __device__ __forceinline__ Team(const Start& start, int block) {
    int4 numbers = __ldg((const int4*)&start);
    ids[0] = numbers.x, ids[1] = numbers.y, size = numbers.z, count = numbers.w;
    num_teams = gridDim.x / size, index = blockIdx.x / size, place = block % size, num_pairs = max(1, size / 2);
    leaves = size > 1 ? 1 : 2, first_leaf = (place % 2 * TEAM_WARPS + threadIdx.x / 32) * leaves;
  }

  // Its tiles are every `num_pairs`th from here on, its columns of delta every `num_warps`th STAGE_COLUMNS.
  __device__ __forceinline__ int first_tile() const { return place / 2; }
  __device__ __forceinline__ int first_columns() const { return threadIdx.x / 32 * size + place; } // all blocks have as many
  __device__ __forceinline__ int num_warps() const { return size * TEAM_WARPS; }

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
  bool is_b = true;
  int place = 0;          // A: a tile; B: STAGE_COLUMNS columns of all modules
  int leaf = 0, m = 0;    // A: of the warp's leaves; B: the module
  int column = 0;         // A: of x, where the leaf begins; B: of the module
  int done = 0, size = 0; // A: columns of the leaf; B: ranks of the module; how many of them were asked for

  // Find what to ask for next; `size` is 0 if there is nothing more.
  __device__ __forceinline__ void next_run(Segment& copy) {
    done = size = 0;
    while (!size) {
      if (is_b) place += team.num_warps();
      else if (++leaf == team.leaves) leaf = 0, place += team.num_pairs;
      if (!is_b && place * 16 >= unit.num_ranks) is_b = true, place = team.first_columns();
      if (!is_b) {
        column = (team.first_leaf + leaf) * chunk, size = max(0, min(group.in - column, chunk));
        continue;
      }
      column = place, m = id >= 0 ? unit.module_of(group, column) : -1;
      if (m >= 0) {
        column *= STAGE_COLUMNS, size = copy.modules[m].rank;
        continue;
      }
      id = next_id, turn++;
      if (id < 0) return;
      next_id = team.unit_at(units, turn + 1);
      unit.load(id, group, turn ? Unit::part(segments + id % MAX_SEGMENTS) : first, copy);
      is_b = false, place = team.first_tile(), leaf = -1;
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
    if (is_b) {
      int width = Unit::columns(group, m);
      const SegmentModule& module = copy.modules[m];
      rows = min(16, size - done), bytes = min(STAGE_COLUMNS, width - column) * 2, stride = B_STRIDE;
      int i = done + min(lane, rows - 1);
      from = copy.is_far ? far_row(pool, copy.adapter, layer * NUM_MODULES + group.first_module + m, 7, i)
                         : near_row(module.b, module.b_split, row_bytes(width), i);
      from += column * 2;
      done += 16;
    } else {
      rows = min(16, unit.num_ranks - place * 16), bytes = min(STAGE_COLUMNS, size - done) * 2, stride = A_STRIDE;
      from = a_row(pool, group, copy, layer, unit.first_rank + place * 16 + min(lane, rows - 1)) + (column + done) * 2;
      done += STAGE_COLUMNS;
    }
    u64* full = &memory.full[warp][s];
    __syncwarp(); // all lanes have read what was in the stage
    if (lane == 0) expect_bytes(full, rows * bytes);
    __syncwarp();
    int row = is_b ? lane % 4 * 4 + lane / 4 : lane; // of B, lanes read ranks 4t .. 4t + 4 from different banks
    if (lane < rows) copy_bulk(memory.stages[warp][s] + row * stride, from, bytes, full);
  }
};

// The team's blocks give each other their sums. Units with ranks take turns at two buffers, and each has a phase of its
// buffer's barrier: all bytes that the others send for it, a mark of each among them, even of blocks that have no tile.
//
// A block sends its mark when all its warps are through with the unit before: behind the __syncthreads after its first
// round. So whoever has waited for unit n knows that all others have read what they had of unit n - 1, and have seen that
// phase end: what it sends for unit n + 1, into the same buffer, overwrites nothing that is still read, and counts for no
// earlier phase. Nobody ends before all that is sent to it has arrived: it waits for what belongs to its last unit, too.
struct Exchange {
  ClusterMemory& memory;
  const Team& team;
  int block;    // in the cluster; those of its team are `block` ^ 1 .. `block` ^ (size - 1)
  int uses = 0; // of the buffers, before this one

  // Add up what the warps of this block have of its tiles `first` .. `first` + `n` of `mine`, and let all blocks have it.
  __device__ __forceinline__ void give(int first, int n, int mine, int tiles) {
    u64* arrived = &memory.arrived[uses % 2];
    float* sums = memory.sums[uses % 2][team.place % 2];
    if (first == 0 && team.size > 1) {
      int i = threadIdx.x;
      if (i == 0) expect_bytes(arrived, (2 * tiles - mine) * TILE * 4 + (team.size - 1) * 16);
      else if (i < team.size) mark_block(memory.mark, arrived, block ^ i);
    }
    for (int e = threadIdx.x * 4; e < n * TILE; e += TEAM_THREADS * 4) {
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
      int tile = team.first_tile() + (first + e / TILE) * team.num_pairs;
      float* to = sums + place_of_rank(tile * 16 + e % TILE / 8) + e % 8;
      *(float4*)to = tree[0];
      for (int i = 1; i < team.size; i++) store_to_block(to, tree[0], arrived, block ^ i);
    }
  }

  // All sums of the unit [place_of_rank, row]: of one half of the columns, then of the other if there are two blocks or more.
  __device__ __forceinline__ const float* take() {
    __syncthreads();
    if (team.size > 1) wait_barrier(&memory.arrived[uses % 2], uses / 2 % 2);
    return memory.sums[uses++ % 2][0];
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

// acc[64 columns each, 8 rows] += a stage of B, of ranks `first` .. of the module's `rank`, times the unit's sums, of which
// the module's begin with `first_rank`; they are halves if `is_halved`.
__device__ __forceinline__ void expand_stage(float acc[STAGE_COLUMNS / 64][4][4], const char* stage, const float* sums,
                                             bool is_halved, int first_rank, int first, int rank, float scale) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, r = first + t * 4;
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float* at = sums + place_of_rank(first_rank + r + i) + g;
    v[i] = r + i < rank ? at[0] + (is_halved ? at[UNIT_RANKS * 8] : 0.0f) : 0.0f;
  }
  uint4 operands = operand(v, scale);
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
  int needed_step = __ldg(pool.needed_step);
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
  wait_for_weights(pool, list / 4, needed_step);
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
    int tiles = ceil_div(unit.num_ranks, 16), mine = ceil_div(max(0, tiles - team.first_tile()), team.num_pairs);
    const float* sums = nullptr;
    if (tiles) {
      int first = 0;
      do {
        int n = min(ROUND, mine - first);
        if (first) __syncthreads(); // the last round's partial sums are added up
        for (int tile = 0; tile < n; tile++) {
          float total[4] = {};
          for (int leaf = 0; leaf < team.leaves; leaf++) {
            int begin = (team.first_leaf + leaf) * chunk, end = min(group.in, begin + chunk);
            float acc[4] = {};
            for (int k = begin; k < end; k += STAGE_COLUMNS) {
              u64* full = &memory.full[warp][stage];
              shrink_stage(acc, memory.stages[warp][stage], x_row + k, end - k, full, phases >> stage & 1);
              next_stage();
            }
#pragma unroll
            for (int e = 0; e < 4; e++) total[e] = leaf ? total[e] + acc[e] : acc[e];
          }
          float* to = memory.partial[warp] + tile * TILE + g * 8 + t * 2;
          *(float2*)to = make_float2(total[0], total[1]);
          *(float2*)(to + 64) = make_float2(total[2], total[3]);
        }
        __syncthreads();
        exchange.give(first, n, mine, tiles);
        first += ROUND;
      } while (first < mine);
      sums = exchange.take();
    }
    for (int i = team.first_columns();; i += team.num_warps()) {
      int column = i, m = unit.module_of(group, column);
      if (m < 0) break;
      int rank = segment.modules[m].rank, first_column = (m > 0 ? group.out[0] : 0) + (m > 1 ? group.out[1] : 0);
      int first_rank = segment.modules[m].first_rank - unit.first_rank;
      float acc[STAGE_COLUMNS / 64][4][4] = {};
      for (int r = 0; r < rank; r += 16) {
        wait_barrier(&memory.full[warp][stage], phases >> stage & 1);
        expand_stage(acc, memory.stages[warp][stage], sums, team.size > 1, first_rank, r, rank, segment.modules[m].scale);
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
