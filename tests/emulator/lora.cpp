// cuda/lora.cu as a library: each function launches kernels.
#include "emulator.h"
#include "lora.cu"
#if !HAS_CLUSTER
#include "cluster.cuh"
#endif

extern "C" void run_work(const Pool* pool, const Groups* groups, const Work* work, const int* num_segments,
                         const int* seg_indptr, const int* seg_adapter, int most_few, int sum_chunks, int num_rows,
                         int num_clusters, int cluster, int expanding_group) {
  launch(pool->num_layers * 4, THREADS, [=] {
    lora_work(*pool, *groups, *work, num_segments, seg_indptr, seg_adapter, most_few, sum_chunks, num_rows, num_clusters, cluster,
              expanding_group);
  });
}

#if HAS_CLUSTER
extern "C" void run_cluster_kernel(const Pool* pool, const Group* group, const Work* work, int list, const Element* x,
                                   Element* delta, int num_rows, int num_clusters, int cluster) {
  num_clusters = min(num_clusters, num_rows * group->num_modules);
  launch(num_clusters * cluster, TEAM_THREADS, [=] { lora_cluster(*pool, *group, *work, list, x, delta); }, cluster);
}
#endif

extern "C" void run_shrink(const Pool* pool, const Group* group, const Work* work, int list, const Element* x) {
  launch(2, THREADS, [=] { lora_shrink(*pool, *group, *work, list, x); });
}

extern "C" void run_expand(const Pool* pool, const Group* group, const Work* work, int list, Element* delta) {
  launch(2, THREADS, [=] { lora_expand(*pool, *group, *work, list, delta); });
}

#if DTYPE != 0 && ALIGNED
extern "C" void run_silu_mul(const Pool* pool, const Group* group, const Work* work, int list, const Element* gate_up,
                             const Element* delta, Element* out) {
  launch(2, THREADS, [=] { lora_silu_mul(*pool, *group, *work, list, gate_up, delta, out); });
}
#endif

extern "C" void seed(unsigned number) { chance.seed(number); }

// While kernels run from here on, behind those before; one about every `rounds`th round, or if it is 0, while somebody waits.
extern "C" void swap_in(void* to, const void* from, long bytes, u64* word, u64 value, int rounds) {
  swap_ins.push_back({to, from, bytes, word, value});
  swap_in_rounds = rounds;
}

extern "C" void forget_swap_ins() { swap_ins.clear(); }

extern "C" void sizes(int* to) {
  to[0] = sizeof(Segment) / 4, to[1] = THREADS, to[2] = MAX_SEGMENTS;
#if HAS_CLUSTER
  to[3] = sizeof(ClusterMemory), to[7] = UNIT_RANKS;
#endif
#if DTYPE != 0
  to[4] = sizeof(ShrinkMemory), to[5] = sizeof(ExpandMemory<1>), to[6] = sizeof(ExpandMemory<2>);
#endif
}
