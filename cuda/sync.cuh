// Order between a kernel and the one before it.
#pragma once

// Until here a kernel that was launched `programmatic` may run beside the kernel before it, and must not read what that
// writes, nor write what it reads.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_once(bool& has_waited) {
  if (!has_waited) wait_for_previous_kernel();
  has_waited = true;
}

// Lets a `programmatic` next kernel start as soon as all blocks have come here.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
