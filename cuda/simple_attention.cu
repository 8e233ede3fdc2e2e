// Causal attention of any rows over pages, in any element type and head dimension: what the tensor-core kernels lack.
// q, out [rows, HEADS, HEAD_DIM]; keys, values: a layer's views of the pool, token t of page p at row p * page_rows + t of
// [KV_HEADS, HEAD_DIM]. All arithmetic is fp32 FMA.
// A block takes (row, head) pairs in turn under a constant grid; its warps take visible tokens in turn from position 0 on,
// a lane holds every 32nd element of the head; the warps' results are merged in their order.
#include "vectors.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int WARPS = 8;
constexpr int PIECES = (HEAD_DIM + 31) / 32;

__device__ __forceinline__ int request_of(int row, int num_requests, const int* query_indptr) {
    int low = 0, high = num_requests;  // the last request with query_indptr <= row
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (query_indptr[middle] <= row) low = middle; else high = middle;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) simple_attention(
    const element* __restrict__ q, element* __restrict__ out, const element* __restrict__ keys,
    const element* __restrict__ values, const int* __restrict__ counts, const int* __restrict__ query_indptr,
    const int* __restrict__ seq_lens, const int* __restrict__ page_indptr, const int* __restrict__ page_indices,
    int page_rows, int window, float scale) {
    __shared__ float outs[WARPS][HEAD_DIM], maxima[WARPS], sums[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int total = counts[1] * HEADS;
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x) {
        const int row = unit / HEADS, head = unit % HEADS, kv_head = head / GROUP;
        const int request = request_of(row, counts[3], query_indptr);
        const int position = seq_lens[request] - (query_indptr[request + 1] - row);
        const int first = window > 0 ? max(position - window + 1, 0) : 0;
        const int* pages = page_indices + page_indptr[request];
        const size_t place = static_cast<size_t>(unit) * HEAD_DIM;
        float query[PIECES], acc[PIECES] = {}, most = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int d = p * 32 + lane;
            query[p] = d < HEAD_DIM ? to_float(q[place + d]) * scale : 0.0f;
        }
        for (int token = first / WARPS * WARPS + warp; token <= position; token += WARPS) {
            if (token < first) continue;
            const size_t kv_row = static_cast<size_t>(pages[token / PAGE_TOKENS]) * page_rows + token % PAGE_TOKENS;
            const size_t at = (kv_row * KV_HEADS + kv_head) * HEAD_DIM;
            float score = 0.0f;
#pragma unroll
            for (int p = 0; p < PIECES; ++p) {
                const int d = p * 32 + lane;
                if (d < HEAD_DIM) score += query[p] * to_float(keys[at + d]);
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(~0u, score, offset);
            const float next = fmaxf(most, score), shrink = expf(most - next), weight = expf(score - next);
            most = next;
            sum = sum * shrink + weight;
#pragma unroll
            for (int p = 0; p < PIECES; ++p) {
                const int d = p * 32 + lane;
                if (d < HEAD_DIM) acc[p] = acc[p] * shrink + weight * to_float(values[at + d]);
            }
        }
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
            if (p * 32 + lane < HEAD_DIM) outs[warp][p * 32 + lane] = acc[p];
        if (lane == 0) {
            maxima[warp] = most;
            sums[warp] = sum;
        }
        __syncthreads();
        for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * 32) {
            float best = -INFINITY, value = 0.0f, norm = 0.0f;
            for (int w = 0; w < WARPS; ++w) best = fmaxf(best, maxima[w]);
            for (int w = 0; w < WARPS; ++w) {
                const float factor = expf(maxima[w] - best);
                norm += sums[w] * factor;
                value += outs[w][d] * factor;
            }
            from_float(value / norm, out[place + d]);
        }
        __syncthreads();
    }
}
