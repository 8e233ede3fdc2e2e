// Waiting for what the copy engine writes while a kernel runs.
#pragma once

#include "element.cuh"

#define MAX_WAIT_NS 10000000000ull // then something is broken: the step fails instead of hanging

__device__ __forceinline__ u64 clock_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Of one thread: until the copy engine has raised `*word` to `value`. Whoever meets it at a barrier afterwards sees what
// was copied before that.
__device__ __forceinline__ void wait_for_value(const u64* word, u64 value) {
  for (u64 found, start = clock_ns();;) {
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    if (found >= value) return;
    if (clock_ns() - start > MAX_WAIT_NS) __trap();
  }
}

// Of each thread that asks for bulk copies of what it has waited for: they read through a proxy of their own.
__device__ __forceinline__ void fence_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
