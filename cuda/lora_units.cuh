// The units of a layer group's segments of few rows, and which team of blocks does them: by one block, once a step.
//
// A unit has all modules of a segment, or one: where the segment's ranks are more than a unit may have, and where there
// are so few units that teams would be left without.
#pragma once

#include "lora_work.cuh"

#if HAS_CLUSTER
// Elements of a module's weights in units of 1024: what its time is taken to depend on.
__device__ __forceinline__ int module_cost(const Group& group, const Segment& s, int m) {
  return ceil_div(s.modules[m].rank * (group.in + group.out[m]), 1024);
}

// All units together: of whole segments, where they may be, or of modules.
struct Units {
  int count, cost, largest;

  // The time that teams of `size` blocks take, as a cost.
  __device__ __forceinline__ float time(int num_blocks, int size) const {
    int turns = ceil_div(count, num_blocks / size);
    return turns * UNIT_OVERHEAD + max((float)largest, turns * (float)cost / max(count, 1)) / size;
  }
};

// `visit`(segment, module or ALL_MODULES, cost, units of 8 rows) for all of this thread's segments.
template <typename Visit>
__device__ __forceinline__ void each_unit(const Group& group, const Segment* segments, int n, bool of_modules, Visit visit) {
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const Segment& s = segments[i];
    if (s.is_many()) continue;
    int cost = 0, rows = ceil_div(s.num_rows, 8);
    bool is_split = of_modules || s.ranks > UNIT_RANKS;
    for (int m = 0; m < group.num_modules; m++) {
      int mine = module_cost(group, s, m);
      if (is_split) visit(i, m, mine, rows);
      cost += mine;
    }
    if (!is_split) visit(i, ALL_MODULES, cost, rows);
  }
}

// What units are of and how large teams are, so that the last one ends early: teams of modules are pairs at least, and
// have one turn.
__device__ __forceinline__ void choose_teams(const Units units[2], int num_blocks, int cluster, bool& of_modules, int& team_size) {
  float best = units[0].time(num_blocks, cluster);
  of_modules = false, team_size = cluster;
  for (int split = 0; split < 2; split++)
    for (int size = cluster; size > split; size /= 2) {
      float time = units[split].time(num_blocks, size);
      if (time >= best || (split && units[split].count > num_blocks / size)) continue;
      best = time, of_modules = split, team_size = size;
    }
}

// Of a whole block: list the units of `n` segments, those of the highest cost first, and say how each block begins.
__device__ __forceinline__ void list_units(const Group& group, const Work& work, int list, int n, int num_blocks, int cluster) {
  __shared__ int places[THREADS], warp_totals[WARPS], team_size;
  __shared__ bool of_modules;
  __shared__ Units all[2];
  UnitList* units = work.units(list);
  const Segment* segments = work.segments + (long long)list * work.max_segments;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  places[threadIdx.x] = 0;
  if (threadIdx.x < 2) all[threadIdx.x] = {0, 0, 0};
  __syncthreads();
  for (int split = 0; split < 2; split++)
    each_unit(group, segments, n, split, [&](int i, int m, int cost, int rows) {
      atomicAdd(&all[split].count, rows);
      atomicAdd(&all[split].cost, cost * rows);
      atomicMax(&all[split].largest, cost);
    });
  __syncthreads();
  if (threadIdx.x == 0) choose_teams(all, num_blocks, cluster, of_modules, team_size);
  __syncthreads();
  // Ranks from 64 on are alike.
  float per_cost = THREADS * 16.0f / (group.num_modules * group.in + group.out_stride);
  auto place = [&](int cost) { return max(0, THREADS - 1 - (int)((float)cost * per_cost)); };
  each_unit(group, segments, n, of_modules, [&](int i, int m, int cost, int rows) { atomicAdd(&places[place(cost)], rows); });
  __syncthreads();
  int mine = places[threadIdx.x], end = mine;
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(~0u, end, d);
    if (lane >= d) end += other;
  }
  if (lane == 31) warp_totals[warp] = end;
  __syncthreads();
  for (int w = 0; w < warp; w++) end += warp_totals[w];
  places[threadIdx.x] = end - mine;
  if (threadIdx.x == THREADS - 1) units->count = end, units->team_size = team_size;
  __syncthreads();
  each_unit(group, segments, n, of_modules, [&](int i, int m, int cost, int rows) {
    int at = atomicAdd(&places[place(cost)], rows);
    for (int r = 0; r < rows; r++) units->ids[at + r] = i + MAX_SEGMENTS * (m + 4 * r);
  });
  __syncthreads();
  for (int block = threadIdx.x; block < num_blocks; block += THREADS) {
    Start& start = work.starts[list * MAX_BLOCKS + block];
    int ids[2] = {-1, -1}, num_teams = num_blocks / team_size;
    for (int turn = 0; turn < 2; turn++) {
      int at = place_of(block / team_size, turn, num_teams);
      if (at < units->count) ids[turn] = units->ids[at];
    }
    start.ids[0] = ids[0], start.ids[1] = ids[1], start.team_size = team_size, start.count = units->count;
    if (ids[0] >= 0) start.segment = segments[ids[0] % MAX_SEGMENTS];
  }
}
#endif
