// cuda/paged_attention.cu as a library.
#include "emulator.h"
#include "paged_attention.cu"

#include "cluster.cuh"

extern "C" void attend(int num_blocks, const element* q, element* out, const element* keys, const element* values,
                       const int* num_items, const int4* work, const int* page_indices, float* partials, int page_rows,
                       int window, float scale) {
  launch(num_blocks, WARPS * 32, [=] {
    paged_attention(q, out, keys, values, num_items, work, page_indices, partials, page_rows, window, scale);
  });
}

extern "C" void merge(int num_blocks, element* out, const int* counts, const int2* spans, const float* partials) {
  launch(num_blocks, MERGE_WARPS * 32, [=] { merge_splits(out, counts, spans, partials); });
}
