// silu_mul that expands by itself: out[row, column] = silu(gate + delta) * (up + delta), where delta of many rows is never
// in memory. It is rounded to an element first, as if it had been: the result has the same bits.
#pragma once

#include "lora_expand.cuh"
#include "silu.cuh"

#if DTYPE != 0 && ALIGNED
// 8 columns of rows 2t and 2t + 1, of gate and of up; zeros from row `rows` on.
struct GateUp {
  uint4 at[2][2];

  __device__ __forceinline__ void load(const Element* from, const Group& group, int rows) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int j = 0; j < 2; j++) at[m][j] = load_if(j < rows, from + m * group.out[0] + (long long)j * group.out_stride);
  }
};

__device__ __forceinline__ u32 silu_mul_pair(u32 gate, u32 up, u32 gate_delta, u32 up_delta) {
  return pack(silu_mul<true>(unpack_low(gate) + unpack_low(gate_delta), unpack_low(up) + unpack_low(up_delta)),
              silu_mul<true>(unpack_high(gate) + unpack_high(gate_delta), unpack_high(up) + unpack_high(up_delta)));
}

__device__ __forceinline__ uint4 silu_mul_columns(uint4 gate, uint4 up, uint4 gate_delta, uint4 up_delta) {
  return make_uint4(silu_mul_pair(gate.x, up.x, gate_delta.x, up_delta.x), silu_mul_pair(gate.y, up.y, gate_delta.y, up_delta.y),
                    silu_mul_pair(gate.z, up.z, gate_delta.z, up_delta.z), silu_mul_pair(gate.w, up.w, gate_delta.w, up_delta.w));
}

// The product's columns of a lane's rows, to memory.
struct SiluMul {
  const Group& group;
  const Element* gate_up; // of the lane's first row and column
  Element* out;
  int rows, end;      // of them, of the columns
  int line, line_end; // from there to the lane's line of 64 columns, of the warp's of gate and up; where its lines end
  GateUp in;

  __device__ __forceinline__ void prefetch_line(int column) {
    if (column < line_end) prefetch(gate_up + column + line);
  }

  __device__ __forceinline__ void expect(int column) {
    in.load(gate_up + column, group, column + threadIdx.x % 32 / 4 * 8 < end ? rows : 0);
    prefetch_line(column + 64);
  }

  __device__ __forceinline__ void take(int column, const float acc[2][4][4]) {
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (j < rows && column + threadIdx.x % 32 / 4 * 8 < end)
        *(uint4*)(out + (long long)j * group.out[0] + column) =
            silu_mul_columns(in.at[0][j], in.at[1][j], columns_of(acc[0], j), columns_of(acc[1], j));
  }
};

// Of a whole block: EXPAND_ROWS rows x SILU_COLUMNS of a segment of many rows.
__device__ __forceinline__ void silu_mul_many(ExpandMemory<2>& memory, const Pool& pool, const Group& group, const Work& work,
                                              const Segment& s, int layer, int i, const Element* gate_up, Element* out) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, inner = group.out[0], row_tiles = ceil_div(s.num_rows, EXPAND_ROWS);
  int row = i % row_tiles * EXPAND_ROWS, begin = i / row_tiles * SILU_COLUMNS, end = min(inner, begin + SILU_COLUMNS);
  int first = row + threadIdx.x / 32 * 8 + t * 2, rows = s.num_rows - first;
  gate_up += (long long)(s.first_row + first) * group.out_stride + g * 8;
  out += (long long)(s.first_row + first) * inner + g * 8;
  int line = (lane % 8 - t * 2) * group.out_stride + lane / 8 % 2 * inner - g * 8;
  SiluMul consumer = {group, gate_up, out, rows, end, line, lane < 16 && lane % 8 - t * 2 < rows ? end : 0};
  consumer.prefetch_line(begin);
  expand_many<2>(memory, pool, group, work, s, layer, 0, row, begin, end, consumer);
}

// Of a warp: 8 rows x SILU_COLUMNS of a segment of few rows, whose delta is in memory if it has an adapter.
__device__ __forceinline__ void silu_mul_rest(const Group& group, const Segment& s, int i, const Element* gate_up,
                                              const Element* delta, Element* out) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, inner = group.out[0], row_tiles = ceil_div(s.num_rows, 8);
  int first = i % row_tiles * 8 + t * 2, begin = i / row_tiles * SILU_COLUMNS, rows = s.num_rows - first;
  long long row = s.first_row + first;
#pragma unroll 2
  for (int column = begin + g * 8; column < min(inner, begin + SILU_COLUMNS); column += 64) {
    GateUp in, added;
    in.load(gate_up + row * group.out_stride + column, group, rows);
    added.load(delta + row * group.out_stride + column, group, s.ranks ? rows : 0);
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (j < rows)
        *(uint4*)(out + (row + j) * inner + column) =
            silu_mul_columns(in.at[0][j], in.at[1][j], added.at[0][j], added.at[1][j]);
  }
}
#endif
