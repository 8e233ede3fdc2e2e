// Order between blocks of one kernel, and between a kernel and the one before it.
#pragma once

// Until here a kernel that was launched `programmatic` may run beside the kernel before it, and must not read what that writes.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a `programmatic` next kernel start as soon as all blocks have come here.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Of a whole warp: what its lanes wrote before is seen by whoever sees the new count.
__device__ __forceinline__ void signal(int* counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
  }
}

// Of a whole warp: until `counter` has reached `target`. Whoever counts it up must not wait for this block.
__device__ __forceinline__ void wait_for(const int* counter, int target) {
  if (threadIdx.x % 32 == 0) {
    int count;
    while (true) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
      if (count >= target) break;
      __nanosleep(20);
    }
    __threadfence();
  }
  __syncwarp();
}
