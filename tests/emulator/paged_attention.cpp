// cuda/paged_attention.cu as a library. Its blocks run at the same time.
#include "emulator.h"
#include "paged_attention.cu"

#include "cluster.cuh"

extern "C" void run(int num_blocks, const element* q, element* out, const element* keys, const element* values,
                    const int* num_items, const int4* work, const int* page_indices, float* partials, int* counters,
                    int page_rows, int window, float scale) {
  launch(num_blocks, WARPS * 32, [=] {
    paged_attention(q, out, keys, values, num_items, work, page_indices, partials, counters, page_rows, window, scale);
  }, num_blocks);
}

extern "C" void seed(unsigned number) { chance.seed(number); }
