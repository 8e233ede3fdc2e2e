// Clusters of thread blocks that write to each other's shared memory, and bulk copies to shared memory: sm_90 and newer.
#pragma once

#include "async_copy.cuh"
#include "element.cuh"

extern __shared__ __align__(128) char shared_memory[];

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier in shared memory: a phase ends when one thread has arrived, and as many bytes as it expects.
__device__ __forceinline__ void init_barrier(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of that parity has completed: phases are told apart by their parity alone.
__device__ __forceinline__ void wait_barrier(u64* barrier, int parity) {
  u32 is_done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!is_done);
}

// To where block `rank` of the cluster has what this block has at `to` and `barrier`.
__device__ __forceinline__ void store_to_block(float* to, float4 v, u64* barrier, int rank) {
  asm volatile(
      "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, %0, %6; mapa.shared::cluster.u32 b, %1, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%2, %3, %4, %5}, [b]; }" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(rank)
      : "memory");
}

// Nothing but 16 bytes for the barrier; where they go, nobody reads.
__device__ __forceinline__ void mark_block(float* unread, u64* barrier, int rank) {
  store_to_block(unread, make_float4(0, 0, 0, 0), barrier, rank);
}

// `bytes`, a multiple of 16, between addresses that are, too; they count towards the barrier's phase.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// All threads of the cluster have come to the first before any leaves the second. Nothing but init_barrier is ordered by it.
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
#endif
