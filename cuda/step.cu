// What a step's ops share, made once from the plan's arrays on the device: a thread per entry.
// counts: the plan's scalars (1 num_rows, 2 num_decode, 3 num_requests, 5 num_sampled).
#include "splits.cuh"
#include "sync.cuh"

// ids [rows]: references to the previous step's `sampled` resolved; sample_index [num_sampled];
// rotation [rows, half] (cos, sin) of position * frequency.
// Rows beyond counts[1] are a graph's padding: token 0 at position 0. Sampled rows beyond counts[5] take row 0.
extern "C" __global__ void step_rows(
    const int* __restrict__ counts, const int* __restrict__ token_ids, const int* __restrict__ positions,
    const int* __restrict__ sample_rows, const int* __restrict__ sampled, const float* __restrict__ frequencies,
    float scaling, int half, int rows, int num_sampled, int* __restrict__ ids, int* __restrict__ sample_index,
    float2* __restrict__ rotation) {
    let_next_kernel_start();
    const int step = gridDim.x * blockDim.x;
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    for (int row = first; row < rows; row += step) {
        int id = row < counts[1] ? token_ids[row] : 0;
        // A row whose sampling failed has no token (-1): its request has ended, and what the row computes is discarded.
        if (id < 0) id = max(sampled[-1 - id], 0);
        ids[row] = id;
    }
    for (int i = first; i < num_sampled; i += step) sample_index[i] = i < counts[5] ? sample_rows[i] : 0;
    for (int i = first; i < rows * half; i += step) {
        const int row = i / half;
        const float angle = row < counts[1] ? positions[row] * frequencies[i % half] : 0.0f;
        float sine, cosine;
        sincosf(angle, &sine, &cosine);
        rotation[i] = make_float2(cosine * scaling, sine * scaling);
    }
}

// Exclusive prefix sum of one value per thread; `total` of the block.
__device__ int exclusive_sum(int value, int* warp_sums, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
        if (i < warp) before += warp_sums[i];
        total += warp_sums[i];
    }
    return before + sum - value;
}

// One block. decode items (request, split | splits of the request << 16, place of the split's first page in
// page_indices, seq_len), those of a request side by side: spans [num_decode] (the first one, how many);
// prefill items (request, row tile, 0, 0).
// A row tile is `tile_rows` rows of a request.
// It runs beside step_rows, whose results it does not need; the plan is read past L1, which may have the last step's. Attention
// reads the lists before it waits for the kernel before: so the next one does not start early here.
extern "C" __global__ void attention_work(
    const int* __restrict__ counts, const int* __restrict__ query_indptr, const int* __restrict__ seq_lens,
    const int* __restrict__ page_indptr, int window, int tile_rows, int page_tokens,
    int* __restrict__ num_items, int4* __restrict__ decode, int4* __restrict__ prefill, int2* __restrict__ spans) {
    extern __shared__ int starts[];  // [blockDim.x + 1]
    __shared__ int warp_sums[32];
    const int num_decode = __ldcg(counts + 2), num_requests = __ldcg(counts + 3);
    for (int is_prefill = 0; is_prefill < 2; ++is_prefill) {
        const int begin = is_prefill ? num_decode : 0, end = is_prefill ? num_requests : num_decode;
        int before = 0;
        for (int base = begin; base < end; base += blockDim.x) {
            const int request = base + threadIdx.x;
            int count = 0;
            if (request < end && is_prefill) {
                const int rows = __ldcg(query_indptr + request + 1) - __ldcg(query_indptr + request);
                count = (rows + tile_rows - 1) / tile_rows;
            } else if (request < end) {
                const int seq_len = __ldcg(seq_lens + request);
                count = split_of(seq_len - 1) - split_of(oldest_visible(seq_len, window)) + 1;
            }
            int total;
            starts[threadIdx.x] = exclusive_sum(count, warp_sums, total);
            if (threadIdx.x == 0) starts[blockDim.x] = total;
            if (!is_prefill && request < end) spans[request] = make_int2(before + starts[threadIdx.x], count);
            __syncthreads();
            for (int i = threadIdx.x; i < total; i += blockDim.x) {
                int low = 0, high = min(end - base, static_cast<int>(blockDim.x));  // the last with starts <= i
                while (high - low > 1) {
                    const int middle = (low + high) / 2;
                    if (starts[middle] <= i) low = middle; else high = middle;
                }
                const int r = base + low, j = i - starts[low];
                if (is_prefill) {
                    prefill[before + i] = make_int4(r, j, 0, 0);
                } else {
                    const int seq_len = __ldcg(seq_lens + r), first = split_of(oldest_visible(seq_len, window));
                    const int splits = split_of(seq_len - 1) - first + 1;
                    const int page = __ldcg(page_indptr + r) + split_start(first + j) / page_tokens;
                    decode[before + i] = make_int4(r, j | splits << 16, page, seq_len);
                }
            }
            before += total;
            __syncthreads();
        }
        if (threadIdx.x == 0) num_items[is_prefill] = before;
    }
    wait_for_previous_kernel();  // whoever waits for this kernel relies on the one before, too
}

// table [max_requests, width]: the pages of prefill request blockIdx.x, its own last page beyond its end;
// lengths of requests that are not there are 0.
extern "C" __global__ void page_tables(
    const int* __restrict__ counts, const int* __restrict__ query_indptr, const int* __restrict__ seq_lens,
    const int* __restrict__ page_indptr, const int* __restrict__ page_indices, int width, int row_elements,
    int* __restrict__ table, int* __restrict__ query_lens, int* __restrict__ kv_lens, int* __restrict__ offsets) {
    const int i = blockIdx.x, request = counts[2] + i;
    const bool exists = request < counts[3];
    const int last_row = query_indptr[counts[3]], first_row = query_indptr[counts[2]];
    const int start = exists ? query_indptr[request] : last_row;
    if (threadIdx.x == 0) {
        query_lens[i] = exists ? query_indptr[request + 1] - start : 0;
        kv_lens[i] = exists ? seq_lens[request] : 0;
        offsets[i] = (start - first_row) * row_elements;
        if (i == static_cast<int>(gridDim.x) - 1) offsets[i + 1] = (last_row - first_row) * row_elements;
    }
    const int begin = exists ? page_indptr[request] : 0;
    const int num_pages = exists ? page_indptr[request + 1] - begin : 0;
    for (int p = threadIdx.x; p < width; p += blockDim.x)
        table[static_cast<size_t>(i) * width + p] = num_pages ? page_indices[begin + min(p, num_pages - 1)] : 0;
}

// Zeroes what lies behind the end of prefill request blockIdx.x in its last page, K and V of layer blockIdx.y / 2: cuDNN
// multiplies it by 0, which takes no NaN away. pages: rows of `row_bytes` (of 16 bytes each), page_rows a page.
extern "C" __global__ void clear_tails(
    const int* __restrict__ counts, const int* __restrict__ seq_lens, const int* __restrict__ page_indptr,
    const int* __restrict__ page_indices, int page_tokens, int page_rows, int row_bytes, uint4* __restrict__ pages) {
    const int request = counts[2] + blockIdx.x;
    if (request >= counts[3]) return;
    const int used = (seq_lens[request] - 1) % page_tokens + 1, row_vectors = row_bytes / 16;
    const size_t page = page_indices[page_indptr[request] + (seq_lens[request] - 1) / page_tokens];
    uint4* row = pages + (page * page_rows + static_cast<size_t>(blockIdx.y) * page_tokens + used) * row_vectors;
    for (int i = threadIdx.x; i < (page_tokens - used) * row_vectors; i += blockDim.x) row[i] = make_uint4(0, 0, 0, 0);
}
