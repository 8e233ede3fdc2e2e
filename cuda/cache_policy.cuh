// What the cache is told of a read (sm_80 and newer).
#pragma once

// Nobody reads it again soon: it gives way before all else, as to what one kernel leaves in the cache for the next.
__device__ __forceinline__ unsigned long long last_read() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
