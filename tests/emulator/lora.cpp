// cuda/lora.cu as a library: each function launches one kernel.
#include "emulator.h"
#include "lora.cu"

extern "C" void run_work(const Pool* pool, const Groups* groups, const Work* work, const int* num_segments,
                         const int* seg_indptr, const int* seg_adapter) {
  launch(pool->num_layers * 4, 256, [=] { lora_work(*pool, *groups, *work, num_segments, seg_indptr, seg_adapter); });
}

extern "C" void run_lora(const Pool* pool, const Group* group, const Work* work, int list, const Element* x, Element* delta,
                         int num_blocks) {
  launch(num_blocks, THREADS, [=] { lora_shrink(*pool, *group, *work, list, x); });
  launch(num_blocks, THREADS, [=] { lora_expand(*pool, *group, *work, list, delta); });
}

extern "C" void sizes(int* to) {
  to[0] = sizeof(Segment) / 4, to[1] = THREADS;
#if HAS_RING
  to[2] = sizeof(ShrinkRing), to[3] = sizeof(ExpandRing);
#endif
}
