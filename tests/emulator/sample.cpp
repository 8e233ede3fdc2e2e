// cuda/sample.cu as a library.
#include "emulator.h"
#include "sample.cu"

#include "cluster.cuh"

extern "C" void run(int rows, const float* raw, const float* logits, const int* counts, const float* temperature, const int* top_k,
                    const float* top_p, const float* min_p, const float* uniform, int vocab, int* ids) {
  launch(rows, THREADS, [=] { sample(raw, logits, counts, temperature, top_k, top_p, min_p, uniform, vocab, ids); });
}
