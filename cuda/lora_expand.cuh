// Expand: delta[row, columns] = sum over ranks of scale * sums[row, rank] * B^T[rank, columns].
//
// 64 columns are the rows of four tensor core products, 8 rows of the step their columns, and 16 ranks what is summed. Lane
// 4g + t has columns 8g .. 8g + 8 of ranks 4t .. 4t + 4, and ends with those columns of rows 2t and 2t + 1: 16 bytes either
// way. The fp32 intermediate goes in as two numbers: bf16, 16 leading bits, or beside fp16 weights, which are exact in tf32,
// tf32, 22 bits. Lanes beyond the last rank or column read that one again: against zeros, or not stored.
//
// Of few rows, a warp takes an item, and its weights are on their way before the sums are there. Of many, a block takes
// EXPAND_ROWS rows, and the weights come through a ring of stages in shared memory that all its warps read.
#pragma once

#include "lora_memory.cuh"
#include "lora_work.cuh"
#include "mma.cuh"
#include "sync.cuh"

// Where a segment's sums lie, and how they are added up.
struct Sums {
  const float* at; // of the segment's first row
  int row_stride, part_stride, parts, chunks; // of a part; 0: as of few rows

  __device__ __forceinline__ Sums(const Group& group, const Work& work, const Segment& s)
      : row_stride(s.sums_stride), part_stride(s.tiles() * 16), chunks(s.sum_chunks) {
    at = work.sums + (long long)s.first_row * row_stride;
    parts = ceil_div(ceil_div(group.in, chunk_columns(group.in, s.tiles())), max(1, chunks));
  }

  // Ranks `k` .. `k` + 4 of the group's, those from the `valid`th on are zeros.
  __device__ __forceinline__ void part(float v[4], int row, int p, int k, int valid) const {
    const float* from = at + (long long)row * row_stride + p * part_stride + k;
    if ((size_t)from % 16 == 0 && valid > 0) {
      float4 all = __ldcg((const float4*)from);
      v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = i < valid ? __ldcg(from + i) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = i < valid ? v[i] : 0.0f;
  }

  // Those ranks' sums over all columns.
  __device__ __forceinline__ void total(float v[4], int row, int k, int valid) const {
#if HAS_CLUSTER
    int n = SUM_CHUNKS / chunks; // parts of a quarter of the tree
    auto add_up = [&](float to[4], int p, int count) { // as many as four
      float four[4][4];
#pragma unroll
      for (int j = 0; j < 4; j++) part(four[j], row, p + j, k, j < count && p + j < parts ? valid : 0);
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = (four[0][i] + four[1][i]) + (four[2][i] + four[3][i]);
    };
    if (n == 1) return add_up(v, 0, 4);
    float half[4];
#pragma unroll 1
    for (int q = 0; q < 4; q++) {
      float quarter[4];
      add_up(quarter, q * n, n);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        half[i] = q % 2 ? half[i] + quarter[i] : quarter[i];
        if (q % 2) v[i] = q == 1 ? half[i] : v[i] + half[i];
      }
    }
#else
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = 0;
    int n = chunks ? 1 : SUM_CHUNKS;
    for (int p = 0; p < parts; p += n) {
      float sum[4], next[4];
      part(sum, row, p, k, valid);
      for (int j = 1; j < n && p + j < parts; j++) {
        part(next, row, p + j, k, valid);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += next[i];
      }
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] += sum[i];
    }
#endif
  }
};

// Which module, rows and columns an item of a segment's list is: `rows` x `item_columns` of a module.
struct OutItem {
  SegmentModule module;
  int index;                // of the module in its group
  int out, delta_column;    // of the module
  int column, columns;
  int row, num_rows;
};

__device__ __forceinline__ OutItem out_item(const Group& group, const Segment& s, int rows, int i) {
  OutItem item = {s.modules[0]};
  int row_tiles = ceil_div(s.num_rows, rows);
  item.row = i % row_tiles * rows;
  item.num_rows = min(rows, s.num_rows - item.row);
  i /= row_tiles;
#pragma unroll
  for (int m = 0; m < 3; m++) {
    if (m >= group.num_modules) break;
    item.module = s.modules[m];
    item.index = m;
    item.columns = item_columns(s, item.module.rank);
    item.out = group.out[m];
    int n = ceil_div(item.out, item.columns);
    if (i < n) break;
    i -= n;
    item.delta_column += item.out;
  }
  item.column = i * item.columns;
  return item;
}

// Where a module's B^T lies.
struct WeightRows {
  const SegmentModule& module;
  int bytes, adapter, layer_module;
  bool is_far;

  __device__ __forceinline__ WeightRows(const Group& group, const Segment& s, int layer, int m)
      : module(s.modules[m]), bytes(row_bytes(m == 0 ? group.out[0] : m == 1 ? group.out[1] : group.out[2])),
        adapter(s.adapter), layer_module(layer * NUM_MODULES + group.first_module + m), is_far(s.is_far) {}

  __device__ __forceinline__ const char* at(const Pool& pool, int rank) const {
    return is_far ? far_row(pool, adapter, layer_module, 7, rank) : near_row(module.b, module.b_split, bytes, rank);
  }
};

#if DTYPE != 0
__device__ __forceinline__ float tf32_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// A lane's four ranks of the intermediate, for expand_step.
__device__ __forceinline__ uint4 operand(const float v[4], float scale) {
#if DTYPE == 1
  float a = v[0] * scale, b = v[1] * scale, c = v[2] * scale, d = v[3] * scale;
  u32 ab = pack(a, b), cd = pack(c, d);
  return make_uint4(ab, cd, pack(a - unpack_low(ab), b - unpack_high(ab)), pack(c - unpack_low(cd), d - unpack_high(cd)));
#else
  return make_uint4(__float_as_uint(v[0] * scale), __float_as_uint(v[1] * scale), __float_as_uint(v[2] * scale),
                    __float_as_uint(v[3] * scale));
#endif
}

// acc[64 columns, 8 rows] += w[ranks 4t .. 4t + 4, 8 columns each] v.
__device__ __forceinline__ void expand_step(float acc[4][4], const uint4 w[4], uint4 v) {
  u32 words[4][4] = {{w[0].x, w[1].x, w[2].x, w[3].x}, {w[0].y, w[1].y, w[2].y, w[3].y},
                     {w[0].z, w[1].z, w[2].z, w[3].z}, {w[0].w, w[1].w, w[2].w, w[3].w}};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32* r = words[j]; // columns 8g + 2j and 8g + 2j + 1 of four ranks
#if DTYPE == 1
    u32 a0 = __byte_perm(r[0], r[1], 0x5410), a1 = __byte_perm(r[0], r[1], 0x7632);
    u32 a2 = __byte_perm(r[2], r[3], 0x5410), a3 = __byte_perm(r[2], r[3], 0x7632);
    mma_16(acc[j], a0, a1, a2, a3, v.x, v.y);
    mma_16(acc[j], a0, a1, a2, a3, v.z, v.w);
#else
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float v0 = __uint_as_float(k ? v.z : v.x), v1 = __uint_as_float(k ? v.w : v.y), h0 = tf32_part(v0), h1 = tf32_part(v1);
      float a0 = unpack_low(r[2 * k]), a1 = unpack_high(r[2 * k]), a2 = unpack_low(r[2 * k + 1]), a3 = unpack_high(r[2 * k + 1]);
      mma_tf32(acc[j], a0, a1, a2, a3, h0, h1);
      mma_tf32(acc[j], a0, a1, a2, a3, v0 - h0, v1 - h1);
    }
#endif
  }
}

// 8 columns of row j of 2t and 2t + 1.
__device__ __forceinline__ uint4 columns_of(const float acc[4][4], int j) {
  return make_uint4(pack(acc[0][j], acc[0][j + 2]), pack(acc[1][j], acc[1][j + 2]), pack(acc[2][j], acc[2][j + 2]),
                    pack(acc[3][j], acc[3][j + 2]));
}

__device__ __forceinline__ void store_columns(Element* delta, int stride, int rows, int column, int out, const float acc[4][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++)
    if (j < rows) store_delta(delta + j * stride, column, out, columns_of(acc, j));
}

// 4 steps of 16 ranks x 64 columns: all `steps` of a block for the first 64 columns, then for the next.
__device__ __forceinline__ void load_b(uint4 w[4][4], const Pool& pool, const WeightRows& rows, int out, int column, int first,
                                       int steps) {
  int lane = threadIdx.x % 32, t = lane % 4, k = 0, last = (out - 1) / 8 * 8;
  column += lane / 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int rank = min(first + k * 16 + t * 4 + j, rows.module.rank - 1);
      w[i][j] = load_once(rows.at(pool, rank) + min(column, last) * 2);
    }
    if (++k == steps) k = 0, column += 64;
  }
}

__device__ __forceinline__ void expand_few(const Pool& pool, const Group& group, const Work& work, const Segment& s,
                                           int layer, int i, Element* delta, bool& has_waited) {
  OutItem item = out_item(group, s, 8, i);
  WeightRows b(group, s, layer, item.index);
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rank = item.module.rank, first_rank = item.module.first_rank;
  uint4 w[4][4];
  if (rank) load_b(w, pool, b, item.out, item.column, 0, min(4, ceil_div(rank, 16)));
  wait_once(has_waited);
  Sums sums(group, work, s);
  delta += (long long)(s.first_row + item.row + t * 2) * group.out_stride + item.delta_column;
  float acc[4][4] = {};
  int rows = item.num_rows - t * 2, column = item.column + g * 8;
  if (!rank)
    for (int j = 0; j < item.columns; j += 64) store_columns(delta, group.out_stride, rows, column + j, item.out, acc);
  for (int first = 0; first < rank; first += RANK_BLOCK) {
    int steps = ceil_div(min(RANK_BLOCK, rank - first), 16), k = 0;
    if (first) load_b(w, pool, b, item.out, item.column, first, steps);
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int at = first + j * 16 + t * 4;
      float total[4];
      sums.total(total, item.row + min(g, item.num_rows - 1), first_rank + at, j < steps ? rank - at : 0);
      v[j] = operand(total, item.module.scale);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i * 64 < steps * item.columns) {
        expand_step(acc, w[i], k == 0 ? v[0] : k == 1 ? v[1] : k == 2 ? v[2] : v[3]);
        if (++k == steps) {
          k = 0;
          if (first + RANK_BLOCK >= rank) {
            store_columns(delta, group.out_stride, rows, column, item.out, acc);
            column += 64;
#pragma unroll
            for (int j = 0; j < 16; j++) acc[j / 4][j % 4] = 0;
          }
        }
      }
    }
  }
}

// What a block of many rows keeps of the modules that it expands together.
template <int modules>
struct ExpandMemory {
  uint4 v[WARPS][modules][RANK_BLOCK / 16][32];         // a lane's operands: nobody else reads them
  uint4 w[EXPAND_STAGES][modules][RANK_BLOCK][64 / 8];  // 64 columns; 8 of them swizzled by their rank
};

// Of a whole block: for every 64 columns of `begin` .. `end`, `consumer.expect(column)`, and when they are there
// `consumer.take(column, acc)`, of EXPAND_ROWS rows from `row` on and the `modules` from `first_module` on. More than
// RANK_BLOCK ranks take a turn for each RANK_BLOCK: IS_LARGE.
template <bool IS_LARGE, int modules, typename Consumer>
__device__ __forceinline__ void expand_tiles(ExpandMemory<modules>& memory, const Pool& pool, const Group& group,
                                             const Work& work, const Segment& s, int layer, int first_module, int row,
                                             int begin, int end, Consumer& consumer) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, most = 0;
  int my_row = row + warp * 8 + g;
  int end_of_rows = first_module == 0 ? group.out[0] : first_module == 1 ? group.out[1] : group.out[2];
#pragma unroll
  for (int m = 0; m < modules; m++) most = max(most, s.modules[first_module + m].rank);
  int blocks = IS_LARGE ? ceil_div(most, RANK_BLOCK) : 1, num_turns = ceil_div(end - begin, 64) * blocks;
  auto ranks = [&](int m, int block) { return min(RANK_BLOCK, s.modules[first_module + m].rank - block * RANK_BLOCK); };
  // This thread's pieces of a stage: 8 columns of ranks `my_rank` and `my_rank` + RANK_BLOCK / 2.
  int my_rank = threadIdx.x / 8, my_column = begin + threadIdx.x % 8 * 8, fill_block = 0, fill_stage = 0, left = num_turns;
  const char* source[modules][2];
  auto aim = [&](int block) {
#pragma unroll
    for (int m = 0; m < modules; m++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int r = my_rank + j * RANK_BLOCK / 2;
        WeightRows b(group, s, layer, first_module + m);
        source[m][j] = r < ranks(m, block) ? b.at(pool, block * RANK_BLOCK + r) : nullptr;
      }
  };
  auto fill = [&] { // the next stage, zeros up to the next 16 ranks
    if (left-- > 0) {
      if (IS_LARGE) aim(fill_block);
#pragma unroll
      for (int m = 0; m < modules; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int r = my_rank + j * RANK_BLOCK / 2;
          bool is_valid = source[m][j] && my_column < end_of_rows;
          if (r < ceil_div(ranks(m, fill_block), 16) * 16)
            copy_async(&memory.w[fill_stage][m][r][threadIdx.x % 8 ^ r / 4 % 4 * 2],
                       source[m][j] + (is_valid ? my_column * 2 : 0), is_valid);
        }
      if (++fill_block == blocks) fill_block = 0, my_column += 64;
      if (++fill_stage == EXPAND_STAGES) fill_stage = 0;
    }
    commit_copies();
  };
  auto load_v = [&](int block) {
    Sums sums(group, work, s);
#pragma unroll
    for (int m = 0; m < modules; m++) {
      const SegmentModule& module = s.modules[first_module + m];
      for (int k = 0; k < ranks(m, block); k += 16) {
        int at = block * RANK_BLOCK + k + t * 4;
        float total[4];
        sums.total(total, min(my_row, s.num_rows - 1), module.first_rank + at, module.rank - at);
        memory.v[warp][m][k / 16][lane] = operand(total, module.scale);
      }
    }
  };
  __syncthreads(); // the item before has been read
  if (!IS_LARGE) aim(0);
  for (int i = 0; i < EXPAND_STAGES - 1; i++) fill();
  if (!IS_LARGE) load_v(0);
  float acc[modules][4][4] = {};
  int column = begin, block = 0, stage = 0;
#pragma unroll 1
  for (int turn = 0; turn < num_turns; turn++) {
    if (block == 0) consumer.expect(column);
    wait_copies<EXPAND_STAGES - 2>();
    __syncthreads();
    fill();
    if (IS_LARGE) load_v(block);
#pragma unroll
    for (int m = 0; m < modules; m++)
      for (int k = 0; k < ranks(m, block); k += 16) {
        uint4 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = memory.w[stage][m][k + t * 4 + j][g ^ t * 2];
        expand_step(acc[m], w, memory.v[warp][m][k / 16][lane]);
      }
    if (++stage == EXPAND_STAGES) stage = 0;
    if (++block < blocks) continue;
    consumer.take(column, acc);
    block = 0, column += 64;
#pragma unroll
    for (int e = 0; e < modules * 16; e++) acc[e / 16][e / 4 % 4][e % 4] = 0;
  }
}

template <int modules, typename Consumer>
__device__ __forceinline__ void expand_many(ExpandMemory<modules>& memory, const Pool& pool, const Group& group, const Work& work,
                                            const Segment& s, int layer, int first_module, int row, int begin, int end,
                                            Consumer& consumer) {
  bool is_large = false;
#pragma unroll
  for (int m = 0; m < modules; m++) is_large |= s.modules[first_module + m].rank > RANK_BLOCK;
  if (is_large) expand_tiles<true>(memory, pool, group, work, s, layer, first_module, row, begin, end, consumer);
  else expand_tiles<false>(memory, pool, group, work, s, layer, first_module, row, begin, end, consumer);
}

// Columns of a lane's rows, to memory.
struct Store {
  Element* delta;
  int stride, rows, out;

  __device__ __forceinline__ void expect(int) {}
  __device__ __forceinline__ void take(int column, const float acc[1][4][4]) {
    store_columns(delta, stride, rows, column + threadIdx.x % 32 / 4 * 8, out, acc[0]);
  }
};

__device__ __forceinline__ void expand_many(ExpandMemory<1>& memory, const Pool& pool, const Group& group, const Work& work,
                                            const Segment& s, int layer, int i, Element* delta) {
  OutItem item = out_item(group, s, EXPAND_ROWS, i);
  int first = threadIdx.x / 32 * 8 + threadIdx.x % 4 * 2;
  delta += (long long)(s.first_row + item.row + first) * group.out_stride + item.delta_column;
  Store store = {delta, group.out_stride, item.num_rows - first, item.out};
  int end = min(item.out, item.column + item.columns);
  expand_many<1>(memory, pool, group, work, s, layer, item.index, item.row, item.column, end, store);
}
#endif
