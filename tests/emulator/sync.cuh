// In place of cuda/sync.cuh: kernels run one after the other.
#pragma once
inline void wait_for_previous_kernel() {}
inline void wait_once(bool&) {}
inline void let_next_kernel_start() {}
