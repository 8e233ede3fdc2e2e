// cuda/chunk_attention.cu as a library.
#include "emulator.h"
#include "chunk_attention.cu"

#include "cluster.cuh"

extern "C" void attend(int num_blocks, const element* q, element* out, const element* keys, const element* values,
                       const int* num_items, const int4* work, const int* query_indptr, const int* seq_lens,
                       const int* page_indptr, const int* page_indices, int page_rows, int window, float scale) {
  launch(num_blocks, WARPS * 32, [=] {
    chunk_attention(q, out, keys, values, num_items, work, query_indptr, seq_lens, page_indptr, page_indices, page_rows,
                    window, scale, 0);
  });
}
