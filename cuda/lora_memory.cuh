// Loads and stores of 8 elements (16 bytes). Rows of weights start on 16 bytes; rows of x and delta do if ALIGNED.
#pragma once

#include "async_copy.cuh"
#include "element.cuh"
#include "memory.cuh"

#ifndef ALIGNED
#define ALIGNED 1
#endif

#if DTYPE != 0
__device__ __forceinline__ u32 masked(u32 pair, int valid) { return valid > 1 ? pair : valid > 0 ? pair & 0xffffu : 0; }

// What lies behind a row's end may be anything.
__device__ __forceinline__ uint4 mask_tail(uint4 v, int valid) {
#if !ALIGNED
  v = make_uint4(masked(v.x, valid), masked(v.y, valid - 2), masked(v.z, valid - 4), masked(v.w, valid - 6));
#endif
  return v;
}

// Elements k .. k + 8 of a row of x, zeros from `end` on. Not through the read-only path: x may have been written while
// this kernel started.
__device__ __forceinline__ uint4 load_x(const Element* row, int k, int end) {
  uint4 v;
#if ALIGNED
  v = load_if(k < end, row + k);
#else
  u32 e[8];
  for (int j = 0; j < 8; j++) e[j] = k + j < end ? ((const volatile Element*)row)[k + j] : 0;
  v = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
#endif
  return v;
}

// The same into shared memory, by an asynchronous copy where the row allows it.
__device__ __forceinline__ void copy_x(void* to, const Element* row, int k, int end) {
#if ALIGNED
  copy_async(to, row + (k < end ? k : 0), k < end);
#else
  *(uint4*)to = load_x(row, k, end);
#endif
}

// Columns k .. k + 8 of a row of delta, those below `end`.
__device__ __forceinline__ void store_delta(Element* row, int k, int end, uint4 v) {
#if ALIGNED
  if (k < end) *(uint4*)(row + k) = v;
#else
  u32 w[4] = {v.x, v.y, v.z, v.w};
  for (int j = 0; j < 8; j++)
    if (k + j < end) row[k + j] = (Element)(w[j / 2] >> j % 2 * 16);
#endif
}
#endif
