// Copies of 16 bytes from global to shared memory that a thread does not wait for (sm_80 and newer).
#pragma once

#include "cache_policy.cuh"

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Zeros if not `is_valid`: then `from` is not read.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_valid) {
  copy_async(shared_address(to), from, is_valid);
}

// The same of what is read for the last time.
__device__ __forceinline__ void copy_last(unsigned to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(is_valid ? 16 : 0), "l"(last_read())
               : "memory");
}

// The copies since the last commit are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` groups are on their way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
